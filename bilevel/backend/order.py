"""Calls of LAPACK, one after the other."""

import jax.numpy as jnp
from jax import Array


def after(later: Array, earlier: Array) -> Array:
    """`later`, made to wait for `earlier`, an array that broadcasts against it; NaN in `earlier` stays there.

    XLA's CPU thread pool can deadlock on two batched calls of LAPACK that do not wait for each other (jaxlib 0.10 to
    0.12 on two cores): as many calls as threads are started, and each waits for a thread. Whoever calls LAPACK twice on
    data that do not depend on each other says so by this function.

    `jax.lax.optimization_barrier` does not do it: XLA takes it out before it orders the calls, and decompositions tied
    by it are as independent in the compiled program as without (jaxlib 0.10.2).
    """
    return later + jnp.where(jnp.isfinite(earlier), 0 * earlier, 0)
