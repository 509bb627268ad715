"""Many devices give the result of one: eight forced host devices in one subprocess, which checks everything at once."""

import os
import subprocess

import pytest


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], pytest.param(["--all"], marks=pytest.mark.nightly)], ids=["some", "all"])
def test_eight_devices_give_the_result_of_one(program, options):
    quick = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"  # compiling is what it costs
    flags = f"--xla_force_host_platform_device_count=8 {quick}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*program("eight_devices"), *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
