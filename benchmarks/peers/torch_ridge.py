"""The ridge hypergradient by torchopt, as a program of its own: it needs torch and NumPy, and nothing of bilevax.

`python torch_ridge.py data.npz`: reads Z, t, V, s and points [n, features]; prints JSON with versions, seconds of the
first call and of each later one, and the gradients. One thread, float64, the same stops as the others.
"""

import sys

from standalone import report


def main(path: str) -> None:
    """Measure and print JSON."""
    import numpy as np
    import torch
    import torchopt

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with np.load(path) as file:
        Z, t, V, s, points = (torch.from_numpy(file[name]) for name in ("Z", "t", "V", "s", "points"))

    def lower(w, x):
        return 0.5 * torch.mean((Z @ w - t) ** 2) + 0.5 * torch.sum(torch.exp(x) * w**2)

    stationary = torch.func.grad(lower, argnums=0)

    @torchopt.diff.implicit.custom_root(
        stationary, argnums=1, solve=torchopt.linear_solve.solve_cg(rtol=1e-12, atol=1e-12, maxiter=1000)
    )
    def solve(w, x):
        w = w.clone().detach().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [w], max_iter=1000, tolerance_grad=1e-11, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = lower(w, x.detach())
                loss.backward()
            return loss

        optimizer.step(closure)
        return w.detach()

    def call(x):
        x = x.clone().requires_grad_(True)
        w = solve(torch.zeros_like(x).requires_grad_(True), x)
        return torch.autograd.grad(0.5 * torch.mean((V @ w - s) ** 2), x)[0].numpy()

    report(call, points, f"torchopt {torchopt.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
