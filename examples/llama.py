"""A Llama-shaped decoder that ends at its hidden states, its parameters sharded over a mesh of three axes.

Parameters are a plain tree of float32 arrays, the layers' stacked. The batch is sharded over `data` and `fsdp`;
parameters over `fsdp`, and over `tensor` by heads, by the MLP's inner columns and by the vocabulary. All functions
here run under `jax.set_mesh` with a mesh of `AXES`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import with_sharding_constraint
from jax.sharding import PartitionSpec as P
from language_model import rotary

AXES = ("data", "fsdp", "tensor")
# The axes that share a batch's sequences.
BATCH = ("data", "fsdp")
HIDDEN = P(BATCH, None, None)
HEADS = P(BATCH, None, "tensor", None)

Tree = dict[str, Any]


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    kv_heads: int
    rope_base: float = 500_000.0
    norm_epsilon: float = 1e-5

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.heads


CONFIGS = {
    # Trains in seconds on a CPU.
    "tiny": LlamaConfig(32768, 128, 384, 4, 8, 4),
    # Llama 3.2 1B, but for a head of its own, where the original's is the embedding.
    "llama3-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8),
    "llama3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8),
}


@dataclass(frozen=True)
class Parameter:
    """How one parameter is made and where its parts lie; `deviation` is that of its random numbers (None: ones)."""

    shape: tuple[int, ...]
    spec: P
    deviation: float | None

    @property
    def is_matrix(self) -> bool:
        """Whether it is part of a matrix product or a table of rows, not a norm's scale."""
        return self.deviation is not None


# Specs of one layer's parameters; the stacked ones have a dimension more in front.
LAYER_SPECS = {
    "attention_norm": P(None),
    "query": P("fsdp", "tensor", None),
    "key": P("fsdp", "tensor", None),
    "value": P("fsdp", "tensor", None),
    "attention_out": P("tensor", None, "fsdp"),
    "mlp_norm": P(None),
    "gate": P("fsdp", "tensor"),
    "up": P("fsdp", "tensor"),
    "down": P("tensor", "fsdp"),
}
# By columns alone: each device looks its columns up for the tokens of all that share the table, and they swap.
EMBEDDING_SPEC = P(None, ("fsdp", "tensor"))
HEAD_SPEC = P("fsdp", "tensor")


def parameters(config: LlamaConfig) -> Tree:
    """The tree of all parameters' descriptions."""
    hidden, mlp, head_size = config.hidden_size, config.mlp_size, config.head_size
    shapes = {
        "attention_norm": (hidden,),
        "query": (hidden, config.heads, head_size),
        "key": (hidden, config.kv_heads, head_size),
        "value": (hidden, config.kv_heads, head_size),
        "attention_out": (config.heads, head_size, hidden),
        "mlp_norm": (hidden,),
        "gate": (hidden, mlp),
        "up": (hidden, mlp),
        "down": (mlp, hidden),
    }
    # What adds to the residual stream, 2 times a layer, starts smaller (GPT-2).
    deviations = dict.fromkeys(shapes, 0.02) | {
        "attention_norm": None,
        "mlp_norm": None,
        "attention_out": 0.02 / (2 * config.layers) ** 0.5,
        "down": 0.02 / (2 * config.layers) ** 0.5,
    }
    return {
        "embedding": Parameter((config.vocab_size, hidden), EMBEDDING_SPEC, 0.02),
        "layers": {
            name: Parameter((config.layers, *shape), P(None, *LAYER_SPECS[name]), deviations[name])
            for name, shape in shapes.items()
        },
        "norm": Parameter((hidden,), P(None), None),
        "head": Parameter((hidden, config.vocab_size), HEAD_SPEC, 0.02),
    }


def initial_parameters(config: LlamaConfig, key: jax.Array) -> Tree:
    """Random parameters in float32; what they are doesn't depend on the mesh."""
    leaves, tree = jax.tree.flatten(parameters(config))
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        jnp.ones(leaf.shape) if leaf.deviation is None else leaf.deviation * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    )


def flops_per_token(config: LlamaConfig, length: int) -> int:
    """Floating-point operations that a training step needs for each token: forward, and twice that backward.

    Six for each parameter in a matrix product (the embedding is a table of rows) and `6·length·hidden` for each
    layer's causal attention. What is computed a second time to save memory is not counted.
    """
    tree = parameters(config)
    matrices = [tree["head"], *tree["layers"].values()]
    weights = sum(size_of(leaf) for leaf in matrices if leaf.is_matrix)
    return 6 * weights + 6 * config.layers * config.hidden_size * length


def parameter_count(config: LlamaConfig) -> int:
    """All parameters."""
    return sum(size_of(leaf) for leaf in jax.tree.leaves(parameters(config)))


def size_of(parameter: Parameter) -> int:
    """Numbers in it."""
    size = 1
    for length in parameter.shape:
        size *= length
    return size


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(weight: jax.Array, spec: P, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A float32 weight in `dtype`, whole over `fsdp`: the cast comes first, so that half the bytes travel.

    Its gradient is summed over the batch's axes straight into the weight's own sharding.
    """
    whole = P(*(None if axis == "fsdp" else axis for axis in spec))
    return with_sharding_constraint(with_sharding_constraint(weight.astype(dtype), spec), whole)


def _gathered_forward(weight: jax.Array, spec: P, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, None]:
    return gathered(weight, spec, dtype), None


def _gathered_backward(spec: P, dtype: jax.typing.DTypeLike, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    del dtype
    return (with_sharding_constraint(cotangent, spec).astype(jnp.float32),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm, computed in float32."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype)


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal grouped-query attention: cuDNN's on a GPU, for the dtypes that it has."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    implementation = "cudnn" if half and jax.default_backend() == "gpu" else None
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=implementation)


def layer(config: LlamaConfig, x: jax.Array, weights: Tree) -> jax.Array:
    """`[B, T, H]` to `[B, T, H]`, gathering this layer's weights and no other's."""
    matrices = {
        name: gathered(weight, LAYER_SPECS[name], x.dtype)
        for name, weight in weights.items()
        if not name.endswith("norm")
    }
    normed = rms_norm(x, weights["attention_norm"], config.norm_epsilon)
    query, key, value = (
        with_sharding_constraint(jnp.einsum("bth,hnd->btnd", normed, matrices[name]), HEADS)
        for name in ("query", "key", "value")
    )
    attended = attention(rotary(query, config.rope_base), rotary(key, config.rope_base), value)
    x = with_sharding_constraint(x + jnp.einsum("btnd,ndh->bth", attended, matrices["attention_out"]), HIDDEN)
    normed = rms_norm(x, weights["mlp_norm"], config.norm_epsilon)
    gated = jax.nn.silu(normed @ matrices["gate"]) * (normed @ matrices["up"])
    return with_sharding_constraint(x + gated @ matrices["down"], HIDDEN)


def hidden_states(config: LlamaConfig, params: Tree, tokens: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`[B, T]` tokens to the last hidden states `[B, T, H]`; of a layer, only its input is kept for its gradient."""
    shared = with_sharding_constraint(tokens, P("data", None))
    columns = with_sharding_constraint(params["embedding"][shared], P("data", None, ("fsdp", "tensor"))).astype(dtype)
    # One axis at a time: XLA would do both at once by way of an array that is whole on every device.
    x = with_sharding_constraint(with_sharding_constraint(columns, P("data", None, "fsdp")), HIDDEN)
    # A scan's body is compiled once, and its own loop keeps the second forward pass from being merged into the first.
    body = jax.checkpoint(partial(layer, config), prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
    x, _ = jax.lax.scan(lambda x, weights: (body(x, weights), None), x, params["layers"])
    return rms_norm(x, params["norm"], config.norm_epsilon)
