"""Compiled programs: kept between runs, and made quickly."""

import os
from pathlib import Path


def use_quick_compilation(folder: str = "xla") -> None:
    """Keep compiled programs between runs in `folder` of the user's cache (BILEVAX_CACHE=off switches that off).

    And on the CPU let XLA write loops by its older emitters, where jaxlib still has them: the same time to run, a
    quarter less to compile (a first run of SOBA on a quadratic 7.5 to 5.3 s, on hyper-cleaning 13.6 to 9.6 s). XLA
    reads its flags when it starts, and stops at one that it does not know; what else the user has set stays.
    """
    import jax
    import platformdirs

    if os.environ.get("BILEVAX_CACHE", "") != "off":
        keep_programs(str(Path(platformdirs.user_cache_dir("bilevax")) / folder))
    if jax.__version_info__[:2] == (0, 10):
        xla_flags("--xla_cpu_use_fusion_emitters=false")


def keep_programs(cache: str) -> None:
    """Keep compiled programs in the folder `cache`, unless another one is set."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def xla_flags(flags: str) -> None:
    """Set flags of XLA for this process and its children, before what the user has set, of which the last counts."""
    given = os.environ.get("XLA_FLAGS", "")
    if flags not in given:
        os.environ["XLA_FLAGS"] = f"{flags} {given}".strip()
