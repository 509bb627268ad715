"""Many devices give the result of one: eight forced host devices in one subprocess, which checks everything at once."""

import os
import subprocess

import pytest


@pytest.mark.process
@pytest.mark.slow
def test_eight_devices_give_the_result_of_one(program):
    quick = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"  # compiling is what it costs
    # XLA aborts where a virtual device is 40 s late for a collective; eight of them on a busy machine once were, so
    # one program at a time, and a patience as long as the test's own
    patient = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    flags = f"--xla_force_host_platform_device_count=8 {quick} {patient}"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
    }
    done = subprocess.run(
        program("eight_devices"), env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
