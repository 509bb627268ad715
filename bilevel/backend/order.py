"""Calls of LAPACK, one after the other."""

from jax import Array


def after(later: Array, earlier: Array) -> Array:
    """`later`, made to wait for `earlier`, an array that broadcasts against it; NaN or infinite where that is.

    XLA's CPU thread pool can deadlock on two batched calls of LAPACK that do not wait for each other (jaxlib 0.10 to
    0.12 on two cores): as many calls as threads are started, and each waits for a thread. Whoever calls LAPACK twice on
    data that do not depend on each other says so by this function.
    """
    return later + 0 * earlier
