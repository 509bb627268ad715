"""float32 products that are float32: on accelerators they are not, unless asked for."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])


def full_precision(function: F) -> F:
    """`function`, for use inside jit, its matrix products in the precision of their arguments.

    By default GPUs round the factors of a float32 product to 10 bits (TF32), TPUs to 7: a Hessian written out so is
    wrong in its fourth digit, and no error estimate would know. `jax_default_matmul_precision`, where set, wins. The
    rule of a custom derivative in `function` may be traced later, outside: its products have to ask for themselves.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        config: Any = jax.config  # whose stubs do not know this one
        with jax.default_matmul_precision(config.jax_default_matmul_precision or "highest"):
            return function(*args, **kwargs)

    return traced  # pyright: ignore[reportReturnType]
