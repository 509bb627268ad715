"""A picture of worst cases of a `rotation` run.

    python -m benchmarks.experiments.worst_cases FOLDER [--out PNG] [--images N]

A row for each solver's network of seed 0, and test images as they are above: each turned and shifted to where a grid on
the box has the network's least margin, with what the network then says; red where that is wrong.
"""

import argparse
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.errors import UsageError
from benchmarks.show.report import load, short_names
from benchmarks.study.files import cell_path, load_point
from benchmarks.study.registry import build_instance, parse
from bilevel.report import save_figure
from problems import families
from problems.images import load as load_images
from problems.images import scores, split
from problems.rotation import GRID, search, warp_all


def draw(folder: Path, path: Path, count: int) -> Path:
    """Write the picture of the run in `folder` to `path`, with `count` test images; return `path`.

    Raises:
        UsageError: no finished cell of `rotation` with seed 0.
    """
    from matplotlib.figure import Figure

    run = load(folder)
    chosen = [
        (k, cell)
        for k, (cell, result) in enumerate(run.results)
        if parse(cell.problem)[0] == "rotation" and cell.seed == 0 and result is not None and result["metrics"]
    ]
    if not chosen:
        raise UsageError(f"{folder}: no finished cell of rotation with seed 0. Run one: bilevax run --suite rotation")
    chosen = [(k, cell) for k, cell in chosen if cell.problem == chosen[0][1].problem]
    defaults = {p.name: p.default for p in inspect.signature(families()["rotation"].make).parameters.values()}
    params = defaults | parse(chosen[0][1].problem)[1]
    images = load_images(params["data"])
    train, val, test = (int(params[name]) for name in ("train", "val", "test"))
    Z, targets = (part[:count] for part in split(images, 0, train, val, test, params["dtype"]).test)
    angle, shift = float(params["angle"]), float(params["shift"])
    names = short_names([cell.solver for _, cell in chosen])
    like = build_instance(chosen[0][1].problem, 0).problem.init

    labels = np.argmax(targets, axis=1)
    rows = [("as they are", Z, labels)]
    for k, cell in chosen:
        x, _ = load_point(cell_path(folder, k, cell).with_suffix(".npz"), *like(jax.random.key(0)))
        _, worst = search(x, Z, targets, angle, shift, GRID)
        moved = warp_all(Z, worst, angle, shift)
        rows.append((names[cell.solver], moved, np.asarray(jnp.argmax(scores(x, moved), axis=1))))
    figure = Figure(figsize=(1.0 * count + 2.4, 1.15 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, pictures, said) in zip(axes, rows, strict=True):
        for k, ax in enumerate(line):
            ax.imshow(np.clip(np.asarray(pictures[k]), 0, 1).squeeze(), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.set_title(str(said[k]), fontsize=8, pad=1, color="k" if said[k] == labels[k] else "r")
        short = name.replace("[", "\n").replace("]", "").replace(",", "\n")
        line[0].set_ylabel(short, fontsize=6, rotation=0, ha="right", va="center")
    return save_figure(figure, path, dpi=70)


def main() -> None:
    """Read the arguments, draw, say where."""
    parser = argparse.ArgumentParser(description="worst rotations and shifts of a rotation run")
    parser.add_argument("folder", type=Path, help="of `bilevax run --suite rotation`")
    parser.add_argument("--out", type=Path, help="default: worst-cases.png in the folder")
    parser.add_argument("--images", type=int, default=10)
    options = parser.parse_args()
    print(draw(options.folder, options.out or options.folder / "worst-cases.png", options.images))


if __name__ == "__main__":
    main()
