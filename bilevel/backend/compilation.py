"""Safe compilation: the one flag of XLA that this library sets, and the user's own environment for other programs.

From jaxlib 0.10.2 on, XLA's CPU compiler rewrites some dots and reductions into "YNN" fusions, a few per cent of which
come out wrong: NaN from log_softmax(Z @ 0), say (docs/platform.md has the counts). An empty list of kinds of fusion
switches them off. XLA reads `XLA_FLAGS` when its first backend starts, after `import jax`, so that importing this
library is early enough, unless a backend is up already.
"""

import itertools
import os
import warnings
from typing import Any

import jax

FLAG = "xla_cpu_experimental_ynn_fusion_type"
SWITCH = "BILEVAX_XLA_FLAGS"  # "off": the library leaves XLA_FLAGS alone
AFFECTED = (0, 10, 2)  # the first jaxlib that makes these fusions
KNOWN = (0, 9, 2)  # the first that is known to know the flag, as 0.10 to 0.12 do: XLA aborts on others
OWN = ("XLA_FLAGS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")  # variables that the library or its commands may change
GIVEN = "BILEVAX_GIVEN_"  # + one of them: what the user had set, for child processes; empty where it was not set


def _backend_is_up() -> bool:
    """Whether XLA has read its flags. JAX has no public word for it; False where its private one is gone."""
    bridge: Any = getattr(getattr(jax, "_src", None), "xla_bridge", None)
    asked = getattr(bridge, "backends_are_initialized", None)
    return bool(asked()) if asked is not None else False


def remember(name: str) -> None:
    """Keep what the user has set as `name`, before it is changed for the first time."""
    os.environ.setdefault(GIVEN + name, os.environ.get(name, ""))


def set_variable(name: str, value: str) -> None:
    """Set an environment variable of this process and its children, and remember what the user had."""
    remember(name)
    os.environ[name] = value


def user_environment() -> dict[str, str]:
    """The environment as the user has it, for programs that are not ours: another interpreter may have another XLA."""
    environment = dict(os.environ)
    for name in OWN:
        given = environment.pop(GIVEN + name, None)
        if given is not None:
            environment.pop(name, None)
            environment |= {name: given} if given else {}
    return environment


def _read(flags: str) -> list[str]:
    """The words of `XLA_FLAGS` that XLA reads: it stops at the first one without dashes, as in
    `--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1`.
    """
    return list(itertools.takewhile(lambda word: word.startswith("--"), flags.split()))


def protect() -> dict[str, str] | None:
    """Switch the faulty fusions off; called by `import bilevel`.

    Nothing is done where the user has set the flag himself, or BILEVAX_XLA_FLAGS=off. Where a backend is up already, a
    RuntimeWarning names the cure, and the result are compiler options for this library's own top-level compilations.
    They must not be given to anything that people nest in their own jit: JAX refuses them there.
    """
    version = jax.__version_info__[:3]
    flags = os.environ.get("XLA_FLAGS", "")
    own = any(word.startswith(f"--{FLAG}=") for word in _read(flags))
    if version < KNOWN or own or os.environ.get(SWITCH, "") == "off":
        return None
    in_file = flags.strip() != "" and not flags.strip().startswith("-")  # XLA takes such a value for a file's name
    if not _backend_is_up() and not in_file:
        set_variable("XLA_FLAGS", f"--{FLAG}= {flags}".strip())  # first, where XLA surely reads it
        return None
    if version >= AFFECTED:
        cause = "XLA_FLAGS names a file" if in_file else "JAX runs already"
        before = "Import bilevel before the first computation, or set XLA_FLAGS="
        cure = f"Add --{FLAG}= to it" if in_file else f"{before}--{FLAG}="
        warnings.warn(
            f"bilevel: jaxlib {jax.__version__} may compile wrong code for the CPU, and {cause}. "
            f"{cure} "
            f"({SWITCH}=off silences this; `bilevax doctor` tells more).",
            RuntimeWarning,
            stacklevel=3,
        )
        return {FLAG: ""}
    return None


def safe() -> bool:
    """Whether the fusions are off in this process, or were never made."""
    return jax.__version_info__[:3] < AFFECTED or f"--{FLAG}=" in _read(os.environ.get("XLA_FLAGS", ""))


COMPILER_OPTIONS = protect()
