"""What JAX and the machine need: trees, precision, devices, traced programs, files. Knows nothing of problems."""

from bilevel.backend import compilation as compilation  # first of all: XLA reads its flags once, when it starts
from bilevel.backend.tree import norm as norm
