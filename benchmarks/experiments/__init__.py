"""Studies of their own, each a command: `python -m benchmarks.experiments.NAME`."""
