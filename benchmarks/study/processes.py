"""One run in several processes that compute together: `bilevax run --processes N`, or one process a machine.

Every process runs the same cells in the same order over one mesh of all devices; the first one alone owns the folder,
writes and prints. `jax.distributed` connects them: on one machine over the loopback address, which `launch` sees to; on
many by the usual environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
GRACE = 5.0  # seconds that the others have to end after one has failed


def launch(count: int, arguments: list[str]) -> int:
    """Run `bilevax` with `arguments` in `count` processes of this machine; the exit code of the first that fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    children = []
    for number in range(count):
        environment = os.environ | {ADDRESS: address, COUNT: str(count), NUMBER: str(number)}
        output = None if number == 0 else subprocess.DEVNULL
        command = [sys.executable, "-m", "benchmarks.cli.main", *arguments]
        children.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    try:
        while any(child.poll() is None for child in children) and not any(child.returncode for child in children):
            time.sleep(0.05)
        end = time.monotonic() + GRACE
        while any(child.poll() is None for child in children) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
    return next((child.returncode for child in children if child.returncode), 0)


def join() -> None:
    """Connect with the other processes that the environment names; nothing where it names none. Before JAX is used."""
    if COUNT not in os.environ or int(os.environ[COUNT]) == 1:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)  # Gloo prints that it is connected, into what `--json` writes
    try:
        jax.distributed.initialize(os.environ[ADDRESS], int(os.environ[COUNT]), int(os.environ[NUMBER]))
        share(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def leads() -> bool:
    """Whether this process owns the folder; true where there is only one."""
    import jax

    return jax.process_index() == 0


def mesh() -> Any:
    """All devices of all processes; None with a single process."""
    import jax

    return None if jax.process_count() == 1 else jax.sharding.Mesh(np.array(jax.devices()), ("data",))


def share(value: Any) -> Any:
    """The first process's `value`, anything that JSON knows, in every process; all of them wait for each other."""
    import jax

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8) if leads() else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    buffer = np.zeros(length, np.uint8)
    if leads():
        buffer[:] = data
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())
