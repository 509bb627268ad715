"""Modules by the names that they had in version 0.1.0: they keep working for one version, with a DeprecationWarning."""

import difflib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import warnings
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

MOVED = {
    "bilevel.active_set": "bilevel.qp.active_set",
    "bilevel.answer": "bilevel.sampled.answer",
    "bilevel.assumptions": "bilevel.theory.assumptions",
    "bilevel.estimators": "bilevel.parts.estimators",
    "bilevel.gap": "bilevel.diagnostics.gap",
    "bilevel.goldstein": "bilevel.diagnostics.goldstein",
    "bilevel.lagrangian": "bilevel.parts.lagrangian",
    "bilevel.lanes": "bilevel.run.lanes",
    "bilevel.least_distance": "bilevel.qp.least_distance",
    "bilevel.nets": "bilevel.sampled.nets",
    "bilevel.nystrom": "bilevel.linear.nystrom",
    "bilevel.per_sample": "bilevel.oracles.per_sample",
    "bilevel.polyhedral": "bilevel.lower.polyhedral",
    "bilevel.polyhedral_gradient": "bilevel.lower.polyhedral_gradient",
    "bilevel.precision": "bilevel.backend.precision",
    "bilevel.projected": "bilevel.lower.projected",
    "bilevel.projected_gradient": "bilevel.lower.projected_gradient",
    "bilevel.refine": "bilevel.sampled.refine",
    "bilevel.renewal": "bilevel.sampled.renewal",
    "bilevel.sample_oracles": "bilevel.oracles.samples",
    "bilevel.sampling": "bilevel.sampled",
    "bilevel.sharding": "bilevel.backend.sharding",
    "bilevel.solvers.aid": "bilevel.solvers.implicit.aid",
    "bilevel.solvers.aipod": "bilevel.solvers.polyhedral.aipod",
    "bilevel.solvers.amigo": "bilevel.solvers.implicit.amigo",
    "bilevel.solvers.at": "bilevel.solvers.sampled.at",
    "bilevel.solvers.bicgaffa": "bilevel.solvers.coupled.bicgaffa",
    "bilevel.solvers.blocc": "bilevel.solvers.coupled.blocc",
    "bilevel.solvers.bome": "bilevel.solvers.penalty.bome",
    "bilevel.solvers.bvfsm": "bilevel.solvers.penalty.bvfsm",
    "bilevel.solvers.ds_blo": "bilevel.solvers.polyhedral.ds_blo",
    "bilevel.solvers.dsigd": "bilevel.solvers.polyhedral.dsigd",
    "bilevel.solvers.f2cba": "bilevel.solvers.coupled.f2cba",
    "bilevel.solvers.f2sa": "bilevel.solvers.penalty.f2sa",
    "bilevel.solvers.gpbgd": "bilevel.solvers.penalty.gpbgd",
    "bilevel.solvers.itd": "bilevel.solvers.implicit.itd",
    "bilevel.solvers.lvhba": "bilevel.solvers.coupled.lvhba",
    "bilevel.solvers.meha": "bilevel.solvers.penalty.meha",
    "bilevel.solvers.per_sample_penalty": "bilevel.solvers.sampled.per_sample_penalty",
    "bilevel.solvers.pigd": "bilevel.solvers.polyhedral.pigd",
    "bilevel.solvers.saba": "bilevel.solvers.implicit.saba",
    "bilevel.solvers.sampled_penalty": "bilevel.solvers.sampled.sampled_penalty",
    "bilevel.solvers.sflcb": "bilevel.solvers.coupled.sflcb",
    "bilevel.solvers.soba": "bilevel.solvers.implicit.soba",
    "bilevel.solvers.ssigd": "bilevel.solvers.polyhedral.ssigd",
    "bilevel.solvers.stocbio": "bilevel.solvers.implicit.stocbio",
    "bilevel.solvers.vpbgd": "bilevel.solvers.penalty.vpbgd",
    "bilevel.theory_nonsmooth": "bilevel.theory.nonsmooth",
    "bilevel.tracing": "bilevel.backend.tracing",
    "bilevel.tracking": "bilevel.parts.tracking",
    "bilevel.tuning": "bilevel.parts.tuning",
    "irl.control": "irl.deep.control",
    "irl.diagnostics": "irl.tabular.diagnostics",
    "irl.environments": "irl.deep.environments",
    "irl.expert": "irl.deep.expert",
    "irl.imitation": "irl.deep.imitation",
    "irl.networks": "irl.deep.networks",
    "irl.rollouts": "irl.deep.rollouts",
    "irl.sac": "irl.deep.sac",
    "irl.soft": "irl.tabular.soft",
    "irl.spec": "irl.tabular.spec",
}
"""Old dotted name -> new one."""

LASTING = {"bilevel.checkpoint": "bilevel.run.checkpoint"}
"""Other names of modules that stay, without a warning."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an old name after all other finders have failed, and loads the module of the new one under it."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED | LASTING else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """None: an empty module, which `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in its place; the import system takes what it finds there."""
        new = (MOVED | LASTING)[module.__name__]
        if module.__name__ in MOVED:
            text = f"{module.__name__} is {new} now; the old name goes in the next version."
            warnings.warn(text, DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


def lookup(package: str, name: str, solvers: Mapping[str, Any], names: Iterable[str]) -> Any:
    """`package.name` for the `__getattr__` of packages: one of `solvers`, or a module by its old name.

    Raises:
        AttributeError: neither. The message has the nearest of `names`.
    """
    if name in solvers:
        return solvers[name]
    old = f"{package}.{name}"
    if old in MOVED:
        return importlib.import_module(old)
    near = difflib.get_close_matches(name, [*names, *solvers], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module {package!r} has no attribute {name!r}.{hint}")


def version() -> str:
    """The installed version, or "0" where the packages are used from a folder without being installed."""
    try:
        return importlib.metadata.version("bilevax")
    except importlib.metadata.PackageNotFoundError:
        return "0"


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
