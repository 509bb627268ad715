"""Bounds with proofs, as functions of a problem's constants; the assumptions that they rest on, as checks."""

from bilevel.theory.batches import Expected, Noise, Tables, after_steps, expected_step, saba_steps, soba_steps
from bilevel.theory.bounds import (
    Errors,
    Sensitivity,
    Steps,
    aid_bias,
    aid_matrix,
    aid_steps,
    chebyshev,
    contraction,
    growth,
    sensitivity,
    single_loop_matrix,
    single_loop_steps,
)

__all__ = [
    "Errors",
    "Expected",
    "Noise",
    "Sensitivity",
    "Steps",
    "Tables",
    "after_steps",
    "aid_bias",
    "aid_matrix",
    "aid_steps",
    "chebyshev",
    "contraction",
    "expected_step",
    "growth",
    "saba_steps",
    "sensitivity",
    "single_loop_matrix",
    "single_loop_steps",
    "soba_steps",
]
