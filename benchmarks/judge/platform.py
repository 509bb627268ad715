"""Is this machine fit to be believed? What `bilevax doctor` checks, and the short form that every run does once.

Each check is one `Check`: what was found, whether it is a fault, and what to do about it. Trials that could hang, or
that need another environment, run in processes of their own (`platform_probe`).
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.backend import compilation

PACKAGES = ("bilevax", "jax", "jaxlib", "numpy", "scipy", "optax")
PATIENCE = 120  # seconds that a probe may take
SPUN = 4.0  # times slower beside a busy process: more than sharing a core explains
SHORT_TRIALS = 15  # of each run's short form: at 3 % wrong executables a third of such machines is found at once


class Check(NamedTuple):
    """One line of the table: name; what was found; "ok", "note" or "fault"; what to do, empty where nothing is."""

    name: str
    found: str
    verdict: str
    advice: str = ""


class Kernel(NamedTuple):
    """name; a function to compile; its arguments; what NumPy makes of them."""

    name: str
    function: Callable
    arguments: tuple[np.ndarray, ...]
    exact: Any


def check_all(progress: Callable[[str], None] = lambda name: None) -> list[Check]:
    """Every check, in the table's order; `progress` is told the name of each before it begins."""
    found = []
    for check in CHECKS:
        progress(check.__name__.replace("_", " "))
        found.append(check())
    return found


def check_quickly() -> dict[str, Any]:
    """The short form, below two seconds: what stands beside a run's results. {"faults": [sentences], "trials": n}."""
    checks = [products(), compile_trials(SHORT_TRIALS)]
    return {"faults": [f"{c.found}. {c.advice}" for c in checks if c.verdict == "fault"], "trials": SHORT_TRIALS}


def quick_check(folder: Path) -> dict[str, Any]:
    """`check_quickly`, once for each machine, jaxlib and setting of XLA: what `folder` remembers is not done again."""
    key = [platform.node(), platform.machine(), jax.__version__, os.environ.get("XLA_FLAGS", "")]
    path = folder / "platform.json"
    try:
        known = json.loads(path.read_text("utf8"))
        if known["key"] == key:
            return known["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never written, or damaged: it is done again
    from bilevel.backend.files import write_atomically

    found = check_quickly()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs two seconds again
        write_atomically(path, json.dumps({"key": key, "found": found}).encode())
    return found


def versions() -> Check:
    """Versions, and whether this jaxlib's compiler makes the faulty fusions."""
    text = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    text = f"Python {platform.python_version()}, {text}"
    if compilation.safe():
        return Check("versions", text, "ok")
    advice = f"Set XLA_FLAGS=--{compilation.FLAG}= , or unset {compilation.SWITCH}."
    return Check("versions", f"{text}; this jaxlib's faulty CPU fusions are on", "fault", advice)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> Check:
    """What JAX computes on."""
    found = jax.devices()
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in found})
    return Check("devices", f"{len(found)}: {', '.join(kinds)}", "ok")


def threads() -> Check:
    """Cores of this process, and the threads of the BLAS behind JAX's LAPACK calls."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    blas = os.environ.get("OPENBLAS_NUM_THREADS", "as many as cores")
    return Check("threads", f"{cores} cores; OPENBLAS_NUM_THREADS: {blas}", "ok")


def floats() -> Check:
    """Whether float64 is on."""
    on = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    advice = "" if on else 'Accuracy beyond 1e-6 needs jax.config.update("jax_enable_x64", True).'
    return Check("floats", "float64" if on else "float32 only", "ok" if on else "note", advice)


def products() -> Check:
    """The error of a float32 product against NumPy's in float64, as JAX is set, and as this library asks for it."""
    A = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    exact = A.astype(np.float64) @ A.astype(np.float64)

    def error(precision: str | None) -> float:
        with jax.default_matmul_precision(precision or "default"):
            return float(np.abs(np.asarray(jax.jit(lambda A: A @ A)(A)) - exact).max() / np.abs(exact).max())

    plain, asked = error(None), error("highest")
    found = f"float32 products: error {plain:.1e} by default, {asked:.1e} in the library's own"
    if asked > 1e-5:
        return Check("products", found, "fault", "The highest precision is not honoured here: use float64.")
    if plain > 1e-5:
        return Check("products", found, "note", "Your own f and g may ask for jax.default_matmul_precision('highest').")
    return Check("products", found, "ok")


def cache() -> Check:
    """The folder of compiled programs that commands keep."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not folder:
        return Check("cache", "no compilation cache", "note", "Unset BILEVAX_CACHE=off to keep compiled programs.")
    files = list(Path(folder).glob("*")) if Path(folder).is_dir() else []
    size = sum(file.stat().st_size for file in files) / 2**20
    return Check("cache", f"{folder}: {len(files)} files, {size:.0f} MiB", "ok")


def known_kernels() -> Iterator[Kernel]:
    """Dots and reductions, as losses have them."""
    rng = np.random.default_rng(1)
    Z, w, A = rng.random((800, 65)), rng.standard_normal((65, 10)), rng.standard_normal((60, 60))
    logits = Z @ w
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    zero, even = np.zeros((65, 10)), np.full((800, 10), -np.log(10))
    yield Kernel("log_softmax(Z @ 0)", lambda Z, w: jax.nn.log_softmax(Z @ w), (Z, zero), even)
    yield Kernel("log_softmax(Z @ w)", lambda Z, w: jax.nn.log_softmax(Z @ w), (Z, w), shifted - log_sum)
    yield Kernel("sum of squares", lambda Z, w: jnp.sum((Z @ w) ** 2), (Z, w), np.sum(logits**2))
    yield Kernel("Z'(Z w)", lambda Z, w: Z.T @ (Z @ w), (Z, w), Z.T @ logits)
    yield Kernel("row sums", lambda A: jnp.sum(jnp.abs(A), axis=1), (A,), np.abs(A).sum(axis=1))


def compile_trials(number: int = 200, kernels: Iterable[Kernel] | None = None) -> Check:
    """`number` fresh executables of a handful of kernels in turn, each against NumPy."""
    kernels = list(known_kernels() if kernels is None else kernels)
    wrong: dict[str, int] = {}
    kept = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)  # afresh, each time
    try:
        for k in range(number):
            name, function, arguments, exact = kernels[k % len(kernels)]
            once = lambda *given, function=function: function(*given)  # noqa: E731  # a new function: nothing is cached
            found = np.asarray(jax.jit(once)(*(jnp.asarray(a, float) for a in arguments)), np.float64)
            if not np.allclose(found, exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max()):
                wrong[name] = wrong.get(name, 0) + 1
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
    text = f"{sum(wrong.values())} of {number} fresh executables are wrong"
    if not wrong:
        return Check("compile trials", text, "ok")
    advice = f"Numbers of this process cannot be trusted: set XLA_FLAGS=--{compilation.FLAG}= , or use another jaxlib."
    which = ", ".join(f"{name}: {count}" for name, count in wrong.items())
    return Check("compile trials", f"{text} ({which})", "fault", advice)


def _probe(kind: str, **variables: str | None) -> dict[str, Any] | str:
    """What `platform_probe` finds in a process of its own with these variables (None unsets one), or why not."""
    environment = {name: value for name, value in (os.environ | variables).items() if value is not None}
    command = [sys.executable, "-m", "benchmarks.judge.platform_probe", kind]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {PATIENCE} s"
    if done.returncode:
        return f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return json.loads(done.stdout)


def lapack() -> Check:
    """Six batches of singular values in one program, which do not wait for each other; some jaxlibs come to a halt."""
    found = _probe("svd")
    if isinstance(found, str):
        advice = "Do not put independent batched LAPACK calls in one program (bilevel's own are put in order)."
        return Check("LAPACK", f"batches side by side: {found}", "note" if "no end" in found else "fault", advice)
    wrong = found["error"] > 1e-8
    text = f"batches side by side: {found['seconds']:.2f} s, error {found['error']:.0e}"
    return Check("LAPACK", text, "fault" if wrong else "ok", "Use another jaxlib or SciPy." if wrong else "")


def spinning() -> Check:
    """A small factorisation beside one busy process, with BLAS threads as a program gets them and with one."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        given = compilation.user_environment().get("OPENBLAS_NUM_THREADS")
        as_set, one = (_probe("cholesky", OPENBLAS_NUM_THREADS=number) for number in (given, "1"))
    finally:
        busy.kill()
        busy.wait()
    if isinstance(as_set, str) or isinstance(one, str):
        return Check("BLAS threads", f"not measured: {as_set if isinstance(as_set, str) else one}", "note")
    text = f"50 x 50 Cholesky beside a busy process: {as_set['ms']:.3f} ms, {one['ms']:.3f} ms with one BLAS thread"
    if as_set["ms"] > SPUN * one["ms"]:
        advice = "BLAS threads wait for each other by spinning: set OPENBLAS_NUM_THREADS=1 where cores are shared."
        return Check("BLAS threads", text, "note", advice)
    return Check("BLAS threads", text, "ok")


def determinism() -> Check:
    """One key, one run, in two processes and with one and two BLAS threads: are the bits the same?"""
    runs = {"again": _probe("solve"), "one": _probe("solve", OPENBLAS_NUM_THREADS="1"),
            "two": _probe("solve", OPENBLAS_NUM_THREADS="2")}  # fmt: skip
    failed = [run for run in runs.values() if isinstance(run, str)]
    if failed:
        return Check("determinism", f"not measured: {failed[0]}", "note")
    bits = {name: run["bits"] for name, run in runs.items() if not isinstance(run, str)}
    if bits["again"] not in (bits["one"], bits["two"]):
        return Check("determinism", "two processes give other bits", "fault", "Runs do not repeat on this machine.")
    if bits["one"] != bits["two"]:
        advice = "Set OPENBLAS_NUM_THREADS to the same number wherever runs are to repeat to the bit."
        return Check("determinism", "the same bits in two processes, others with two BLAS threads", "note", advice)
    return Check("determinism", "the same bits in two processes, and with one and two BLAS threads", "ok")


def memory_maps() -> Check:
    """Memory maps in use: every compiled program takes some, and at the system's limit LLVM ends the process."""
    try:
        used = len(Path("/proc/self/maps").read_text().splitlines())
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return Check("memory maps", "not told by this system", "ok")
    full = used > most / 2
    advice = "Raise vm.max_map_count, or call jax.clear_caches() between problems." if full else ""
    return Check("memory maps", f"{used} of {most} in use", "note" if full else "ok", advice)


CHECKS = (
    versions, devices, threads, floats, products, cache, compile_trials, lapack, spinning, determinism, memory_maps,
)  # fmt: skip
