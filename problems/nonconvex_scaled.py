"""Lower levels of any dimension that are not convex, degenerate or coupled, with closed-form optima (n of each block).

    bvfsm               f = (x - a)^2 + |y - (a + c) 1|^2,  y_i in argmin sin(x + y_i - c),  x a number, y in R^n;
                        both are `Separable` with one term for each y_i
    bvfsm_constrained   f = (x - a)^2 + |y - a 1|^2,  the same g,  0 <= x + y_i <= 1
    lvhba_llc           f = |x - z|^2/2 + |y - 1|^2/2,  g = |y|^2/2 - x'y + 1'z,  1'(x + y + z) = 0,  lower (y, z)
    bicgaffa            f = (y - 2)'(x - 1) + |z + 3|^2,  the same g,  sum x^power + 1'y + 1'z = 0
    bome_degenerate     f = (x - z)^2/2 + (y - 1)^2/2,  g = y^2/2 - x y: z does not appear below
    meha_lasso          f = 1'y,  g = |y - b|^2/2 + sum_i x_i |y_i|,  b = +-1/n, half of each
    rastrigin           f = (x - 1/2)^2 + |y + 3/10|^2,  g = sum_i d_i^2 + 1 - cos(2 pi d_i),  d = y - x 1
    ring                f = (x - 1)^2 + |y - p|^2,  p = 2 e_1,  g = (|y|^2 - x^2)^2

Optima. bvfsm: x + y_i - c is the nearest minimiser C of the sine to 2 a, where f is least over the lower solutions;
F* = n (C - 2 a)^2/(1 + n). bvfsm_constrained: x + y_i = t, the minimiser of sin(t - c) over [0, 1], and
F* = n (t - 2 a)^2/(1 + n). lvhba_llc: eliminating 1'z leaves y = x + 1 and z free on a plane; by symmetry F is n times
that of n = 1, (3 x + 1)^2/2 + x^2/2, and F* = n/20 at x = -3/10. bicgaffa: y = x + 1 turns f into
|x - 1|^2 + |z + 3|^2, which is 0 at the feasible (1, 2, -3). bome_degenerate: y = x, z free: 0 at 1.
meha_lasso: y_i = soft(b_i, x_i), so that the best is x_i >= 1/n where b_i > 0 and x_i = 0 elsewhere: F* = -1/2. F is
flat where x_i >= 1/n: a run that meets b_i < 0 there may stay.
rastrigin: g >= 0 with equality only at y = x 1, one basin of about 4^n, so that F* = n (4/5)^2/(1 + n). ring: the
minimisers are a sphere of radius x, nearest to p at x e_1: F* = 1/2 at x = 3/2. The last two are of this project.

Settings that work: `SampledPenalty()`; `MEHA(nonsmooth=weighted_l1, prox=soft_threshold, gamma=10.0)` on meha_lasso;
`MEHA()`, `ProxF2SA()` and `BVFSM()` on bome_degenerate, `BVFSM()` on bvfsm; `LVHBA()` on lvhba_llc; on bicgaffa
`BiCGAFFA()`, with `upper_step_size=0.02` where the power is 3.

References: Liu, Liu, Yuan, Zeng, Zhang. A value-function-based interior-point method for non-convex bi-level
    optimization. ICML 2021, arXiv:2106.07991 (bvfsm). Yao, Yu, Zeng, Zhang. Constrained bi-level optimization:
    proximal Lagrangian value function approach and Hessian-free algorithm. ICLR 2024, arXiv:2401.16164 (lvhba_llc).
    Yao, Yin, Zeng, Zhang. Overcoming lower-level constraints in bilevel optimization: a novel approach with regularized
    gap functions. 2024, arXiv:2406.01992 (bicgaffa). Ye et al., arXiv:2209.08709 (bome_degenerate). Liu et al. Moreau
    envelope for nonconvex bi-level optimization. ICML 2024, arXiv:2405.09927 (meha_lasso).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, Full, LinearCoupling, Minimize, Separable, SmoothCoupling
from bilevel.backend.checks import is_count
from bilevel.diagnostics import BY_VALUE
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

PyTree = Any


def _bvfsm_upper(x: Array, y: Array, batch: tuple[Array, Array]) -> Array:
    a, target = batch
    return (x - a) ** 2 / y.size + (y - target) ** 2


def _bvfsm_lower(x: Array, y: Array, batch: Array) -> Array:
    return jnp.sin(x + y - batch)


BVFSM = Separable(_bvfsm_upper), Separable(_bvfsm_lower)


def _blocks(y: Array) -> tuple[Array, Array]:
    return y[: y.size // 2], y[y.size // 2 :]


def _llc_upper(x: Array, y: Array, batch: None) -> Array:
    y, z = _blocks(y)
    return jnp.sum((x - z) ** 2) / 2 + jnp.sum((y - 1) ** 2) / 2


def _llc_lower(x: Array, y: Array, batch: None) -> Array:
    y, z = _blocks(y)
    return y @ y / 2 - x @ y + jnp.sum(z)


def _gaffa_upper(x: Array, y: Array, batch: None) -> Array:
    y, z = _blocks(y)
    return (y - 2) @ (x - 1) + jnp.sum((z + 3) ** 2)


def _cubic(x: Array, y: Array) -> Array:
    total = jnp.sum(x**3) + jnp.sum(y)
    return jnp.stack([total, -total])


def _degenerate_upper(x: Array, y: Array, batch: None) -> Array:
    return (x[0] - y[1]) ** 2 / 2 + (y[0] - 1) ** 2 / 2


def _degenerate_lower(x: Array, y: Array, batch: None) -> Array:
    return y[0] ** 2 / 2 - x[0] * y[0]


def _lasso_upper(x: Array, y: Array, batch: None) -> Array:
    return jnp.sum(y)


def weighted_l1(x: Array, y: Array) -> Array:
    """The non-smooth part sum_i x_i |y_i| of meha_lasso's g, shape []."""
    return x @ jnp.abs(y)


def soft_threshold(x: Array, y: Array, t: Any) -> Array:
    """Its proximal point argmin_z t sum_i x_i |z_i| + |z - y|^2/2 over the box [-1, 1]^n of meha_lasso, shape [n]."""
    return jnp.clip(jnp.sign(y) * jnp.maximum(jnp.abs(y) - jnp.asarray(t, y.dtype) * x, 0), -1, 1)


def _lasso_lower(x: Array, y: Array, batch: Array) -> Array:
    return jnp.sum((y - batch) ** 2) / 2 + weighted_l1(x, y)


def _rastrigin_upper(x: Array, y: Array, batch: None) -> Array:
    return (x[0] - 0.5) ** 2 + jnp.sum((y + 0.3) ** 2)


def _rastrigin_lower(x: Array, y: Array, batch: None) -> Array:
    d = y - x
    return jnp.sum(d**2 + 1 - jnp.cos(2 * jnp.pi * d))


def _ring_upper(x: Array, y: Array, batch: None) -> Array:
    return (x[0] - 1) ** 2 + (y[0] - 2) ** 2 + jnp.sum(y[1:] ** 2)


def _ring_lower(x: Array, y: Array, batch: None) -> Array:
    return (y @ y - x[0] ** 2) ** 2


@functools.cache
def _init(lo: float, hi: float, end: float, dim_x: int, dim_y: int) -> Callable[[Array], tuple[Array, Array]]:
    """Draw x uniform in [lo, hi]^dim_x and y in [-end, end]^dim_y."""

    def init(key: Array) -> tuple[Array, Array]:
        key_x, key_y = jax.random.split(key)
        x = jax.random.uniform(key_x, (dim_x,), float, lo, hi)
        return x, jax.random.uniform(key_y, (dim_y,), float, -end, end)

    return init


CASES = (
    "bvfsm", "bvfsm_constrained", "lvhba_llc", "bicgaffa", "bome_degenerate", "meha_lasso", "rastrigin", "ring",
)  # fmt: skip


def make(seed: int = 0, case: str = "bvfsm", n: int = 1, a: float = 2.0, c: float = 2.0, power: int = 1) -> Instance:
    """One case; the module's docstring has the formulas and why the optima are known.

    Args:
        seed: has no influence; the start is drawn by the solver's key.
        case: a name of `nonconvex_scaled.CASES`.
        n: size of a block, >= 1; even for meha_lasso, 1 for bome_degenerate, >= 2 for ring.
        a: of bvfsm and bvfsm_constrained, in [-3, 3].
        c: of bvfsm and bvfsm_constrained, in [-3, 3].
        power: of bicgaffa, 1 or 3.

    Raises:
        InvalidInput: an unknown case or a parameter outside of its range.
    """
    if case not in CASES:
        invalid("case (nonconvex_scaled)", repr(case), f"one of {', '.join(CASES)}", "Choose a case.")
    fits = {"meha_lasso": n % 2 == 0, "bome_degenerate": n == 1, "ring": n >= 2}.get(case, True)
    if not (is_count(n, 1) and fits):
        invalid("n (nonconvex_scaled)", n, f"a size that {case} has", "Even for meha_lasso, 1 for bome_degenerate.")
    for name, value in (("a", a), ("c", c)):
        if not -3 <= value <= 3:
            invalid(f"{name} (nonconvex_scaled)", value, "a number in [-3, 3]", "Y is a box around the optimum.")
    if power not in (1, 3):
        invalid("power (nonconvex_scaled)", power, "1 or 3", "Choose one.")
    build = {"bvfsm": _bvfsm, "bvfsm_constrained": _bvfsm_constrained, "lvhba_llc": _llc, "bicgaffa": _llc}
    problem, truth = build[case](case, n, a, c, power) if case in build else _uncoupled(case, n)
    tags = {"known-optimum"} | ({"coupled"} if problem.coupling is not None else set())
    tags |= {"nonconvex-lower"} if case in ("bvfsm", "bvfsm_constrained", "rastrigin", "ring") else {"degenerate"}
    return Instance(problem, truth, tags=frozenset(tags), referee=BY_VALUE)


def _problem(
    upper: Callable, lower: Callable, x: tuple[float, float], end: float, sizes: tuple[int, int], **parts: Any
) -> BilevelProblem:
    boxes = Box(*map(floats, x)), Box(*map(floats, (-end, end)))
    return BilevelProblem(upper, Minimize(lower), *boxes, init=_init(*x, end, *sizes), **parts)


def _bvfsm(case: str, n: int, a: float, c: float, power: int) -> tuple[BilevelProblem, Truth]:
    C = -np.pi / 2 + 2 * np.pi * np.round((2 * a + np.pi / 2) / (2 * np.pi))
    x = ((1 - n) * a + n * C) / (1 + n)
    data = {"upper_data": Full((floats(a), floats(a + c))), "lower_data": Full(floats(c))}
    problem = _problem(*BVFSM, (-10.0, 10.0), 10.0, (1, n), **data)
    return problem, Truth(n * (C - 2 * a) ** 2 / (1 + n), floats([x]), floats(np.full(n, C + c - x)))


def _bvfsm_constrained(case: str, n: int, a: float, c: float, power: int) -> tuple[BilevelProblem, Truth]:
    inside = [t for t in c - np.pi / 2 + 2 * np.pi * np.arange(-2, 3) if 0 <= t <= 1]
    t = min([0.0, 1.0, *inside], key=lambda t: np.sin(t - c))
    x = ((1 - n) * a + n * t) / (1 + n)
    A, B = np.vstack([np.eye(n), -np.eye(n)]), np.concatenate([np.ones((n, 1)), -np.ones((n, 1))])
    b = np.concatenate([np.ones(n), np.zeros(n)])
    data = {"upper_data": Full((floats(a), floats(a))), "lower_data": Full(floats(c))}
    coupling = LinearCoupling(floats(A), floats(B), floats(b))
    problem = _problem(*BVFSM, (-9.0, 9.0), 10.0, (1, n), coupling=coupling, **data)
    return problem, Truth(n * (t - 2 * a) ** 2 / (1 + n), floats([x]), floats(np.full(n, t - x)))


def _llc(case: str, n: int, a: float, c: float, power: int) -> tuple[BilevelProblem, Truth]:
    none, ones = np.zeros((0, 2 * n)), np.ones((1, 2 * n))
    linear = LinearCoupling(
        floats(none), floats(none[:, :n]), floats([]), floats(ones), floats(ones[:, :n]), floats([0.0])
    )
    if case == "lvhba_llc":
        problem = _problem(_llc_upper, _llc_lower, (-3.0, 3.0), 8.0, (n, 2 * n), coupling=linear)
        return problem, Truth(0.05 * n, floats(np.full(n, -0.3)), floats(np.repeat([0.7, -0.4], n)))
    coupling = linear if power == 1 else SmoothCoupling(_cubic)
    problem = _problem(_gaffa_upper, _llc_lower, (-2.0, 2.0), 12.0, (n, 2 * n), coupling=coupling)
    return problem, Truth(0.0, floats(np.ones(n)), floats(np.repeat([2.0, -3.0], n)))


def _uncoupled(case: str, n: int) -> tuple[BilevelProblem, Truth]:
    if case == "bome_degenerate":
        problem = _problem(_degenerate_upper, _degenerate_lower, (-3.0, 3.0), 3.0, (1, 2))
        return problem, Truth(0.0, floats([1.0]), floats([1.0, 1.0]))
    if case == "meha_lasso":
        b = np.repeat([1.0, -1.0], n // 2) / n
        problem = _problem(_lasso_upper, _lasso_lower, (0.0, 1.0), 1.0, (n, n), lower_data=Full(floats(b)))
        return problem, Truth(-0.5, None, floats(np.minimum(b, 0)))
    if case == "rastrigin":
        problem = _problem(_rastrigin_upper, _rastrigin_lower, (-1.0, 1.0), 2.0, (1, n))
        x = (0.5 - 0.3 * n) / (1 + n)
        return problem, Truth(n * 0.8**2 / (1 + n), floats([x]), floats(np.full(n, x)))
    problem = _problem(_ring_upper, _ring_lower, (0.5, 2.0), 3.0, (1, n))
    return problem, Truth(0.5, floats([1.5]), floats(1.5 * np.eye(n)[0]))
