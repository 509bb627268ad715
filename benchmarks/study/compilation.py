"""Compiled programs: kept between runs, made quickly, and run beside other programs without waiting for them."""

import os
from pathlib import Path
from typing import Any


def use_quick_compilation(folder: str = "xla") -> None:
    """Keep compiled programs between runs in `folder` of the user's cache (BILEVAX_CACHE=off switches that off).

    And on the CPU let XLA write loops by its older emitters, where jaxlib still has them: the same time to run, a
    quarter less to compile (a first run of SOBA on a quadratic 7.5 to 5.3 s, on hyper-cleaning 13.6 to 9.6 s). XLA
    reads its flags when it starts, and stops at one that it does not know; what else the user has set stays.
    """
    import jax

    from bilevel.backend import compilation

    one_blas_thread()
    if os.environ.get("BILEVAX_CACHE", "") != "off":
        # An executable that is wrong stays wrong in the cache: programs made otherwise have a folder of their own.
        kind = f"{folder}-{jax.__version__}" + ("" if compilation.safe() else "-unsafe")
        keep_programs(str(cache_folder() / kind))
    if jax.__version_info__[:2] == (0, 10):
        xla_flags("--xla_cpu_use_fusion_emitters=false")


def cache_folder() -> Path:
    """The user's folder for what commands keep between runs."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("bilevax"))


def keep_programs(cache: str) -> None:
    """Keep compiled programs in the folder `cache`, unless another one is set."""
    import jax

    config: Any = jax.config  # whose stubs do not know this one
    if config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def xla_flags(flags: str) -> None:
    """Set flags of XLA for this process and its children, before what the user has set, of which the last counts."""
    from bilevel.backend.compilation import set_variable

    given = os.environ.get("XLA_FLAGS", "")
    if flags not in given:
        set_variable("XLA_FLAGS", f"{flags} {given}".strip())


def one_blas_thread() -> None:
    """One thread for the OpenBLAS behind JAX's LAPACK calls, in this process and its children, unless the user has set
    OPENBLAS_NUM_THREADS; before SciPy's linear algebra is loaded.

    Its threads wait for each other by spinning: where another process takes a core, each call of a small factorisation
    waits for the scheduler (docs/platform.md has the figures, and the size from which more threads pay).
    """
    from bilevel.backend.compilation import set_variable

    if "OPENBLAS_NUM_THREADS" not in os.environ:
        set_variable("OPENBLAS_NUM_THREADS", "1")
