"""A small transformer over short sequences, in flax's nnx: what `alignment` takes for rewards and policies.

Blocks of causal self-attention and a two-layer network, each before its layer norm, on sums of embeddings of tokens
and places (Radford et al. 2019). Parameters are plain dictionaries and `apply` a pure function, so that a problem keeps
its functions static; flax is imported where a network is made, not before.

Reference: Vaswani et al. Attention is all you need. NeurIPS 2017, arXiv:1706.03762, section 3.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.backend.extras import extra

PyTree = Any


class Size(NamedTuple):
    """The size of a network; with the defaults and 9 tokens some 26,000 numbers."""

    tokens: int
    """Kinds of tokens, the one before the start among them."""
    places: int
    """The longest input."""
    outputs: int
    """Numbers for each place."""
    width: int = 32
    """Of embeddings; a multiple of the heads."""
    blocks: int = 2
    heads: int = 2


@functools.cache
def _template(size: Size, dtype: Any) -> tuple[Any, Any]:
    """(graph, parameters) of nnx: the structure, and where a dictionary of parameters goes."""
    with extra("irl"):
        from flax import nnx

    class Block(nnx.Module):
        """Attention to what came before, and a two-layer network at each place."""

        def __init__(self, rngs: Any) -> None:
            linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
            norm = functools.partial(nnx.LayerNorm, size.width, dtype=dtype, param_dtype=dtype, rngs=rngs)
            self.before, self.between = norm(), norm()
            self.seen, self.out = linear(size.width, 3 * size.width), linear(size.width, size.width)
            self.up, self.down = linear(size.width, 4 * size.width), linear(4 * size.width, size.width)

        def __call__(self, h: Array) -> Array:
            n, T, _ = h.shape
            split = self.seen(self.before(h)).reshape(n, T, 3, size.heads, size.width // size.heads)
            query, key, value = (split[:, :, k] for k in range(3))
            scores = jnp.einsum("nihd,njhd->nhij", query, key) / (size.width / size.heads) ** 0.5
            earlier = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), scores.shape)
            weights = jax.nn.softmax(jnp.where(earlier, scores, float(jnp.finfo(h.dtype).min)), axis=-1)
            h = h + self.out(jnp.einsum("nhij,njhd->nihd", weights, value).reshape(n, T, size.width))
            return h + self.down(jax.nn.gelu(self.up(self.between(h))))

    class Transformer(nnx.Module):
        """Tokens [n, T] -> [n, T, outputs]."""

        def __init__(self, rngs: Any) -> None:
            embed = functools.partial(nnx.Embed, features=size.width, dtype=dtype, param_dtype=dtype, rngs=rngs)
            self.token, self.place = embed(size.tokens), embed(size.places)
            self.blocks = nnx.List([Block(rngs) for _ in range(size.blocks)])
            self.norm = nnx.LayerNorm(size.width, dtype=dtype, param_dtype=dtype, rngs=rngs)
            self.head = nnx.Linear(size.width, size.outputs, dtype=dtype, param_dtype=dtype, rngs=rngs)

        def __call__(self, tokens: Array) -> Array:
            places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
            h = self.token(tokens) + self.place(places)
            for block in self.blocks:
                h = block(h)
            return self.head(self.norm(h))

    with jax.numpy_dtype_promotion("standard"):
        return nnx.split(Transformer(nnx.Rngs(0)), nnx.Param)


def initial(size: Size, key: Array) -> PyTree:
    """Parameters drawn with `key`: matrices N(0, 1/rows), embeddings N(0, 1/width), biases 0, gains 1."""
    from flax import nnx

    shapes = nnx.to_pure_dict(_template(size, jnp.zeros(()).dtype)[1])
    leaves, structure = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))

    def drawn(path: Any, leaf: Array, key: Array) -> Array:
        name = str(path[-1].key)
        if leaf.ndim < 2:
            return jnp.ones_like(leaf) if name == "scale" else jnp.zeros_like(leaf)
        rows = leaf.shape[1] if name == "embedding" else leaf.shape[0]
        return jax.random.normal(key, leaf.shape, leaf.dtype) / rows**0.5

    return jax.tree.unflatten(structure, [drawn(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)])


def apply(size: Size, parameters: PyTree, tokens: Array) -> Array:
    """The network's outputs, shape [n, T, outputs], for whole numbers [n, T]."""
    from flax import nnx

    graph, params = _template(size, jnp.zeros(()).dtype)
    state = jax.tree.map(lambda leaf: leaf, params)
    nnx.replace_by_pure_dict(state, parameters)
    with jax.numpy_dtype_promotion("standard"):  # flax promotes its statistics to float32 at least
        return nnx.merge(graph, state)(tokens)
