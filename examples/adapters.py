"""LoRA (Hu et al., 2021): low-rank updates of a decoder's matrices, which are trained in place of the matrices.

An adapter of a matrix `[*inputs, *outputs]` is `{"a": [*inputs, rank], "b": [rank, *outputs]}`. The sum of the matrix
and `scale · a · b` is formed only for export: the layers and jliger take matrix and adapter separately.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from decoder import DecoderConfig, Parameter, layer_parameters, stacked
from jax.sharding import PartitionSpec as P
from llama import HEAD_SPEC

Tree = Any
GROUPS = {
    "attention": ("query", "key", "value", "attention_out"),
    "mlp": ("gate", "up", "down"),
    "head": ("head",),
}


def of_matrix(described: Parameter, rank: int) -> dict[str, Parameter]:
    """The descriptions of the two matrices of an adapter, from that of the matrix that it adapts."""
    shape, spec, inputs = described.shape, described.spec, described.inputs
    return {
        "a": Parameter((*shape[:inputs], rank), P(*spec[:inputs], None), inputs),
        "b": Parameter((rank, *shape[inputs:]), P(None, *spec[inputs:]), 1),
    }


def adapter_parameters(config: DecoderConfig, rank: int, groups: tuple[str, ...] = tuple(GROUPS)) -> Tree:
    """The descriptions of all adapters, as a tree; that of the last layer is `[H, V]` with a tied embedding, too."""
    described = layer_parameters(config)
    names = [name for group in groups for name in GROUPS[group] if name in described]
    tree: Tree = {
        "layers": {
            name: {key: stacked(config.layers, each) for key, each in of_matrix(described[name], rank).items()}
            for name in names
        }
    }
    if "head" in groups:
        tree["head"] = of_matrix(Parameter((config.hidden_size, config.vocab_size), HEAD_SPEC, 1), rank)
    return tree


def initial_adapters(config: DecoderConfig, rank: int, groups: tuple[str, ...], key: jax.Array) -> Tree:
    """Float32 adapters that change nothing yet: `b` is 0, and `a` random as in PEFT (Kaiming's uniform)."""
    described = adapter_parameters(config, rank, groups)
    leaves, tree = jax.tree_util.tree_flatten_with_path(described)
    keys = jax.random.split(key, len(leaves))

    def initial(path: Any, leaf: Parameter, key: jax.Array) -> jax.Array:
        if path[-1].key == "b":
            return jnp.zeros(leaf.shape)
        # The leading dimension of stacked adapters is that of the layers.
        first = len(leaf.shape) - 1 - leaf.inputs
        bound = math.prod(leaf.shape[first:-1]) ** -0.5
        return jax.random.uniform(key, leaf.shape, minval=-bound, maxval=bound)

    return tree.unflatten(initial(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True))
