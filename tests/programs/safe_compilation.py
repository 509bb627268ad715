"""What the environment and the compiled code are like after `import bilevel`: printed as JSON for a test to read.

    python safe_compilation.py [early] [count N] [fused] [solve]

early: a computation starts JAX's backend before the import. count N: log_softmax(Z @ 0), compiled N times afresh.
fused: whether a dot is compiled to one of the faulty fusions. solve: five steps of AID.
"""

import json
import os
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

if "early" in sys.argv:
    jnp.ones(3).sum().block_until_ready()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bilevel
    from bilevel.backend import compilation
up = compilation._backend_is_up() and "early" not in sys.argv

wrong = 0
if "count" in sys.argv:
    Z = jnp.asarray(np.random.default_rng(0).random((800, 65), np.float32))
    for _ in range(int(sys.argv[sys.argv.index("count") + 1])):
        jax.clear_caches()
        found = jax.jit(lambda Z: jax.nn.log_softmax(Z @ jnp.zeros((65, 10), Z.dtype)))(Z)
        wrong += not np.allclose(found, -np.log(10), atol=1e-5)

fused = None
if "fused" in sys.argv:
    fused = "ynn_fusion" in jax.jit(lambda Z: Z @ Z.T).lower(jnp.ones((3, 100))).compile().as_text()

solved = False
if "solve" in sys.argv:
    problem = bilevel.BilevelProblem(
        upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
        lower=bilevel.Minimize(lambda x, y, batch: jnp.sum((y - x) ** 2)),
        init=lambda key: (jnp.zeros(2), jnp.zeros(2)),
    )
    solution = bilevel.solve(problem, bilevel.AID(), key=jax.random.key(0), max_steps=5)
    solved = bool(np.isfinite(solution.record["value"]).all())
answer = {
    "flags": os.environ.get("XLA_FLAGS"),
    "user": compilation.user_environment().get("XLA_FLAGS"),
    "marks": [name for name in compilation.user_environment() if name.startswith(compilation.GIVEN)],
    "warned": [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)],
    "options": compilation.COMPILER_OPTIONS,
    "started_by_import": up,
    "fused": fused,
    "wrong": wrong,
    "solved": solved,
}
print(json.dumps(answer))
