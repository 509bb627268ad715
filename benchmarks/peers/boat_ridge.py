"""The ridge hypergradient by boat-torch, as a program of its own: it needs torch and NumPy, and nothing of bilevax.

`python boat_ridge.py data.npz`: reads and prints what `torch_ridge.py` does. The lower level is solved by heavy-ball
steps from w = 0 with the best constants for the eigenvalues at each point (which are not timed), as many as bring its
rate to 1e-13: boat-torch takes optimisers of torch and a number of steps, no tolerance. Then its CG on the fixed-point
map. Its own writing of losses goes to the null device. One thread, float64.
"""

import math
import os
import sys

from standalone import report


def lower(feed, x_model, w_model, params=None):
    """|Z w - t|^2/(2 n) + sum_i exp(x_i) w_i^2/2."""
    (w,) = w_model.parameters() if params is None else params
    (x,) = x_model.parameters()
    return 0.5 * ((feed["Z"] @ w - feed["t"]) ** 2).mean() + 0.5 * (x.exp() * w**2).sum()


def upper(feed, x_model, w_model, params=None):
    """|V w - s|^2/(2 n); boat-torch wants x in it, so 0 times its sum is added."""
    (w,) = w_model.parameters() if params is None else params
    (x,) = x_model.parameters()
    return 0.5 * ((feed["V"] @ w - feed["s"]) ** 2).mean() + 0 * x.sum()


def main(path: str) -> None:
    """Measure and print JSON."""
    from importlib.metadata import version

    import numpy as np
    import torch
    from boat_torch import Problem

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with np.load(path) as file:
        Z, t, V, s, points = (torch.from_numpy(file[name]) for name in ("Z", "t", "V", "s", "points"))
    losses = {f"{level}_level_loss": {"function": f"{__name__}.{level}"} for level in ("lower", "upper")}

    class Parameters(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = torch.nn.Parameter(values.clone())

    def prepare(x):
        """A problem at x."""
        values = torch.linalg.eigvalsh(Z.T @ Z / len(t) + torch.diag(x.exp()))
        low, high = math.sqrt(values[0]), math.sqrt(values[-1])
        rate = (high - low) / (high + low)
        x_model, w_model = Parameters(x), Parameters(torch.zeros_like(x))
        x_var, w_var = list(x_model.parameters()), list(w_model.parameters())
        settings = {
            "fo_op": None, "gm_op": ["NGD"], "na_op": ["CG"], "CG": {"tolerance": 1e-12, "k": 1000},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0}, "RGT": {"truncate_iter": 0},
            "lower_level_model": w_model, "upper_level_model": x_model, "lower_level_var": w_var,
            "upper_level_var": x_var, "upper_level_opt": torch.optim.SGD(x_var, lr=1.0),
            "lower_level_opt": torch.optim.SGD(w_var, lr=4 / (low + high) ** 2, momentum=rate**2),
            "lower_iters": math.ceil(math.log(1e-13) / math.log(rate)), "device": "cpu", "accumulate_grad": False,
            "return_grad": True, "copy_last_param": False, "loss_log_path": os.devnull,
        }  # fmt: skip
        return Problem(settings, losses).build_ll_solver().build_ul_solver()

    def call(problem):
        return problem.run_iter({"Z": Z, "t": t}, {"V": V, "s": s}, 0)[0][0].numpy()

    report(call, points, f"boat-torch {version('boat-torch')}, torch {torch.__version__}", prepare)


if __name__ == "__main__":
    main(sys.argv[1])
