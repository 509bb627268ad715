"""Test settings: float64, no silent broadcasting or promotion, quick compilation; warnings are errors.

LLVM does not optimise here: compiling is most of what the tests cost, and takes half as long. The same tests with code
as users get it: `XLA_FLAGS=--xla_backend_optimization_level=3 pytest`; the README's `bilevax run` is judged with it.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

from benchmarks.study.compilation import use_quick_compilation, xla_flags
from bilevel.backend import bounded

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
xla_flags("--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1")
use_quick_compilation("xla-tests")

gc.set_threshold(20_000, 20, 20)  # tracing makes many objects, and little garbage
CROWDED = 0.1  # part of the system's memory maps beyond which a file leaves nothing behind

settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_functions() -> Iterator[None]:
    """Free what a file has compiled: with thousands of executables alive, XLA runs out of memory maps and crashes.

    JAX's own caches stay while there is room, since the next file has the same small operations, and what stays is not
    looked through for garbage again.
    """
    yield
    used, most = bounded.memory_maps() or (1, 1)
    if used > CROWDED * most:
        gc.unfreeze()
        jax.clear_caches()
    bounded.clear()  # collects garbage
    gc.freeze()


@pytest.fixture(scope="session")
def program() -> Callable[[str], list[str]]:
    """The command that runs a file of tests/programs, by its name: what a test starts in a process of its own."""
    folder = Path(__file__).parent / "tests" / "programs"
    return lambda name: [sys.executable, str(folder / f"{name}.py")]


@pytest.fixture
def key() -> jax.Array:
    """The one key of a test."""
    return jax.random.key(0)
