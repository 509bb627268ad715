"""What JAX and the machine need: trees, precision, devices, traced programs, files. Knows nothing of problems."""
