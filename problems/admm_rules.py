"""ADMM in NumPy, one instance at a time, with the rules of the literature for its penalty: what `admm` is held against.

It shares no line with the family: dense solves in place of eigenvectors, loops in place of maps. A rule is a function
(look) -> rho, called after each step with all that it may look at; before the first step it gets None.

    one                 rho = 1 throughout
    best constant       sqrt(lambda_min lambda_max) of Q, for any h and many steps (Ghadimi et al. 2015)
    residual balancing  rho doubles where |r| > 10 |s|, halves where |s| > 10 |r| (Boyd et al. 2011, eq. 3.13)
    relative residuals  the same with |r|/max(|w|, |z|) and |s|/|lam| (Wohlberg 2017, eqs. 21 and 22)
    spectral            the geometric mean of two Barzilai-Borwein slopes, each where its correlation is above 0.2,
                        every second step (Xu, Figueiredo, Goldstein 2017, Algorithm 1)
    OSQP                rho sqrt(relative primal/relative dual residual), where it changes by more than 5, every fifth
                        step (Stellato et al. 2020, section 5.2)

r = w - z and s = rho (z - z_old). The schedules 3.13, 0.2, 2 and 5 are the papers' and programs' own; rho = 1 at first.

Reference: Boyd, Parikh, Chu, Peleato, Eckstein. Distributed optimization and statistical learning via the alternating
direction method of multipliers. Foundations and Trends in Machine Learning 3, 2011. Wohlberg. ADMM penalty parameter
selection by residual balancing, arXiv:1704.06209. Xu, Figueiredo, Goldstein. Adaptive ADMM with spectral penalty
parameter selection. AISTATS 2017, arXiv:1605.07246. Stellato, Banjac, Goulart, Bemporad, Boyd. OSQP: an operator
splitting solver for quadratic programs. Mathematical Programming Computation 12, 2020, arXiv:1711.08013.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

EPS = float(np.finfo(np.float64).eps)
SOLVED = 1e-6
"""The relative residual that counts as solved: no instance is worth more than that to F."""


class Look(NamedTuple):
    """What a rule sees after step k of 0, 1, …"""

    k: int
    rho: float
    """The penalty of this step."""
    w: np.ndarray
    z: np.ndarray
    lam: np.ndarray
    old_z: np.ndarray
    """The z before the step."""
    old_lam: np.ndarray
    """The lam before the step."""
    numbers: dict[str, Any]
    """Those of the family, as `problems.admm.draw` makes them, with q of this instance."""

    @property
    def primal(self) -> float:
        """The length of w - z."""
        return float(np.linalg.norm(self.w - self.z))

    @property
    def dual(self) -> float:
        """The length of rho (z - z_old)."""
        return float(self.rho * np.linalg.norm(self.z - self.old_z))

    @property
    def scales(self) -> tuple[float, float, float]:
        """The larger of |w| and |z|, |lam|, and |q|."""
        length = np.linalg.norm
        return float(max(length(self.w), length(self.z))), float(length(self.lam)), float(length(self.numbers["q"]))


Rule = Callable[[dict[str, Any]], Callable[[Look | None], float]]


def shrunk(kind: str, numbers: dict[str, Any], v: np.ndarray, rho: float) -> np.ndarray:
    """The z that minimises h(z) + rho/2 |z - v|^2."""
    if kind == "eigen":
        span = numbers["U"][:, numbers["inside"] > 0]
        return span @ (span.T @ v)
    if kind == "qp":
        return np.minimum(np.maximum(v, -1), 1)
    return v - np.minimum(np.maximum(v, -numbers["weight"] / rho), numbers["weight"] / rho)


def run(kind: str, numbers: dict[str, Any], rule: Rule, steps: int) -> list[Look]:
    """The steps of ADMM on one instance, q [d], from z = lam = 0."""
    Q = numbers["U"] @ np.diag(numbers["l"]) @ numbers["U"].T
    z = lam = np.zeros(len(Q))
    ask, looks = rule(numbers), []
    rho = ask(None)
    for k in range(steps):
        w = np.linalg.solve(Q + rho * np.eye(len(Q)), numbers["q"] + rho * z - lam)
        new = shrunk(kind, numbers, w + lam / rho, rho)
        looks.append(Look(k, rho, w, new, lam + rho * (w - new), z, lam, numbers))
        z, lam, rho = new, looks[-1].lam, ask(looks[-1])
    return looks


def progress(kind: str, numbers: dict[str, Any], rule: Rule, steps: int) -> np.ndarray:
    """The terms log(|Q z_K - q + lam_K|/|q|)/K of F, shape [n], of the instances q [n, d]."""
    Q, found = numbers["U"] @ np.diag(numbers["l"]) @ numbers["U"].T, []
    for q in numbers["q"]:
        end = run(kind, {**numbers, "q": q}, rule, steps)[-1]
        found.append(np.hypot(np.linalg.norm(Q @ end.z - q + end.lam) / np.linalg.norm(q), SOLVED))
    return np.log(found) / steps


def constant(rho: float) -> Rule:
    """The penalty rho throughout."""
    return lambda numbers: lambda look: rho


def best_constant(numbers: dict[str, Any]) -> Callable[[Look | None], float]:
    """The constant sqrt(lambda_min lambda_max)."""
    rho = float(np.sqrt(numbers["l"].min() * numbers["l"].max()))
    return lambda look: rho


def balancing(numbers: dict[str, Any], relative: bool = False) -> Callable[[Look | None], float]:
    """Doubling and halving, by residuals or by relative ones."""

    def ask(look: Look | None) -> float:
        if look is None:
            return 1.0
        point, dual, _ = look.scales if relative else (1.0, 1.0, 1.0)
        primal, dual = look.primal / max(point, EPS), look.dual / max(dual, EPS)
        return look.rho * (2.0 if primal > 10 * dual else 0.5 if dual > 10 * primal else 1.0)

    return ask


def relative_balancing(numbers: dict[str, Any]) -> Callable[[Look | None], float]:
    """Doubling and halving by relative residuals."""
    return balancing(numbers, relative=True)


def osqp(numbers: dict[str, Any]) -> Callable[[Look | None], float]:
    """OSQP's estimate, where it differs enough."""

    def ask(look: Look | None) -> float:
        if look is None or (look.k + 1) % 5:
            return 1.0 if look is None else look.rho
        point, dual, q = look.scales
        ratio = (look.primal / max(point, EPS)) / max(look.dual / max(dual, q), EPS)
        factor = float(np.sqrt(max(ratio, EPS)))
        return float(np.clip(look.rho * factor, 1e-6, 1e6)) if not 1 / 5 <= factor <= 5 else look.rho

    return ask


def slope(change: np.ndarray, dual: np.ndarray) -> float | None:
    """The Barzilai-Borwein slope of dual over change, or None where they are not correlated enough."""
    product, longest = float(change @ dual), float(np.linalg.norm(change) * np.linalg.norm(dual))
    if product <= 0.2 * longest or longest == 0:
        return None
    steepest, least = float(dual @ dual) / product, product / float(change @ change)
    return least if 2 * least > steepest else steepest - least / 2


def spectral(numbers: dict[str, Any]) -> Callable[[Look | None], float]:
    """Slopes of grad f over w and of the subgradient over z, between this look and the one before."""
    kept: list[tuple[np.ndarray, ...]] = []

    def ask(look: Look | None) -> float:
        if look is None:
            return 1.0
        if look.k and look.k % 2 == 0:
            return look.rho
        middle = look.old_lam + look.rho * (look.w - look.old_z)  # -grad f(w), by the optimality of w
        now = look.w, -middle, look.z, look.lam
        found = (
            [slope(a - b, c - d) for a, c, b, d in ((*now[i : i + 2], *kept[-1][i : i + 2]) for i in (0, 2))]
            if kept
            else []
        )
        kept.append(now)
        slopes = [number for number in found if number is not None]
        return float(np.clip(np.prod(slopes) ** (1 / len(slopes)), 1e-6, 1e6)) if slopes else look.rho

    return ask


def learnt(tuned: str, x: np.ndarray, widest: float) -> Rule:
    """The rule that x is, as `problems.admm` has it."""

    def start(numbers: dict[str, Any]) -> Callable[[Look | None], float]:
        def ask(look: Look | None) -> float:
            if look is None or tuned == "constant":
                return float(np.exp(x[0]))
            if tuned == "schedule":
                return float(np.exp(x[min(look.k + 1, len(x) - 1)]))
            point, dual, q = look.scales
            ratio = np.hypot(look.primal, EPS) / max(point, EPS) / (np.hypot(look.dual, EPS) / max(dual, q))
            moved = np.log(look.rho) + x[1] * np.exp(-x[3] * look.k) * (np.log(ratio) + x[2])
            return float(np.exp(np.clip(moved, -widest, widest)))

        return ask

    return start


RULES: dict[str, Rule] = {
    "one": constant(1.0),
    "best constant": best_constant,
    "residual balancing": balancing,
    "relative residuals": relative_balancing,
    "spectral": spectral,
    "OSQP": osqp,
}


def of_eigen(numbers: dict[str, Any], steps: int, log_rho: Any, solved: float = SOLVED) -> np.ndarray:
    """F of `eigen` at each of the constants, shape of log_rho, in closed form.

    In the coordinates of Q's eigenvectors the residual after K steps is q_i (rho/(l_i + rho))^K inside of the subspace
    and q_i (l_i/(l_i + rho))^K outside of it.
    """
    l, inside, q = numbers["l"], numbers["inside"] > 0, numbers["q"] @ numbers["U"]
    log_rho = np.asarray(log_rho)[..., None]
    factor = np.where(inside, log_rho, np.log(l)) - np.logaddexp(log_rho, np.log(l))
    shares = np.log(q**2 / np.sum(q**2, axis=1, keepdims=True))
    squares: Any = logsumexp(2 * steps * factor[..., None, :] + shares, axis=-1)
    with np.errstate(divide="ignore"):
        return np.mean(np.logaddexp(squares, 2 * np.log(solved)), axis=-1) / (2 * steps)


def best_of_eigen(numbers: dict[str, Any], steps: int, widest: float, solved: float = SOLVED) -> tuple[float, float]:
    """(log rho, F) at the least F over constants: a grid, refined around the best until F no longer shows it."""
    low, high = -widest, widest
    while high - low > 1e-9:
        grid = np.linspace(low, high, 201)
        k = int(np.argmin(of_eigen(numbers, steps, grid, solved)))
        low, high = grid[max(k - 1, 0)], grid[min(k + 1, 200)]
    best = (low + high) / 2
    return float(best), float(of_eigen(numbers, steps, best, solved))
