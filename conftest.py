"""Test settings: float64, no silent broadcasting or promotion, a compilation cache; warnings are errors."""

import os
from pathlib import Path

import jax
import platformdirs
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
if os.environ.get("BILEVAX_CACHE", "") != "off":
    jax.config.update("jax_compilation_cache_dir", str(Path(platformdirs.user_cache_dir("bilevax")) / "xla-tests"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture
def key() -> jax.Array:
    """The one key of a test."""
    return jax.random.key(0)
