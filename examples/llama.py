"""A Llama-shaped decoder that ends at its hidden states, on one device or on a mesh of three axes.

Parameters are a plain tree of arrays, with the layers' stacked. Under `jax.set_mesh` with a mesh of `AXES` the batch is
sharded over `data` and `fsdp`, the parameters over `fsdp`, and over `tensor` by heads, by the MLP's inner columns and
by the vocabulary. Without a mesh nothing is sharded.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
# The axes that share a batch's sequences.
BATCH = ("data", "fsdp")
HIDDEN = P(BATCH, None, None)
HEADS = P(BATCH, None, "tensor", None)

Tree = Any


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a decoder, and the dtype of its arithmetic."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    kv_heads: int
    tie_embeddings: bool = False
    dtype: str = "float32"
    # The MLP processes the sequence in this many pieces, to save memory.
    mlp_pieces: int = 1
    rope_base: float = 500_000.0
    norm_epsilon: float = 1e-5
    # Of an attention head; None: hidden_size / heads.
    head_size: int | None = None

    @property
    def size_of_head(self) -> int:
        return self.head_size or self.hidden_size // self.heads


@dataclass(frozen=True)
class Parameter:
    """The shape and sharding of a parameter, and the standard deviation of its random numbers (None: ones)."""

    shape: tuple[int, ...]
    spec: P
    deviation: float | None

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix or an embedding, not the scale of a norm."""
        return self.deviation is not None


# Sharded by columns alone: each device looks up its columns for the tokens of all devices, which then exchange them.
EMBEDDING_SPEC = P(None, ("fsdp", "tensor"))
HEAD_SPEC = P("fsdp", "tensor")


def layer_parameters(config: LlamaConfig) -> dict[str, Parameter]:
    """The descriptions of one layer's parameters."""
    hidden, mlp, size = config.hidden_size, config.mlp_size, config.size_of_head
    # The residual stream gets 2 sums per layer, whose weights start smaller (GPT-2).
    residual = 0.02 / (2 * config.layers) ** 0.5
    return {
        "attention_norm": Parameter((hidden,), P(None), None),
        "query": Parameter((hidden, config.heads, size), P("fsdp", "tensor", None), 0.02),
        "key": Parameter((hidden, config.kv_heads, size), P("fsdp", "tensor", None), 0.02),
        "value": Parameter((hidden, config.kv_heads, size), P("fsdp", "tensor", None), 0.02),
        "attention_out": Parameter((config.heads, size, hidden), P("tensor", None, "fsdp"), residual),
        "mlp_norm": Parameter((hidden,), P(None), None),
        "gate": Parameter((hidden, mlp), P("fsdp", "tensor"), 0.02),
        "up": Parameter((hidden, mlp), P("fsdp", "tensor"), 0.02),
        "down": Parameter((mlp, hidden), P("tensor", "fsdp"), residual),
    }


def parameters(config: LlamaConfig) -> Tree:
    tree: Tree = {
        "embedding": Parameter((config.vocab_size, config.hidden_size), EMBEDDING_SPEC, 0.02),
        "layers": {
            name: Parameter((config.layers, *each.shape), P(None, *each.spec), each.deviation)
            for name, each in layer_parameters(config).items()
        },
        "norm": Parameter((config.hidden_size,), P(None), None),
    }
    if not config.tie_embeddings:
        tree["head"] = Parameter((config.hidden_size, config.vocab_size), HEAD_SPEC, 0.02)
    return tree


def initial_parameters(config: LlamaConfig, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Tree:
    """Random parameters, the same on any mesh."""
    leaves, tree = jax.tree.flatten(parameters(config))
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        jnp.ones(leaf.shape, dtype)
        if leaf.deviation is None
        else (leaf.deviation * jax.random.normal(key, leaf.shape)).astype(dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    )


def parameter_count(config: LlamaConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters(config)))


def flops_per_token(config: LlamaConfig, length: int) -> int:
    """The floating-point operations of a training step for each token: the forward pass, and twice that backward.

    There are six for each parameter in a matrix product (the last layer's included, the lookup of an embedding not) and
    `6·length·heads·(head size)` for each layer's causal attention. What is computed a second time to save memory does
    not count.
    """
    matrices = [leaf for leaf in parameters(config)["layers"].values() if leaf.is_matrix]
    weights = sum(math.prod(leaf.shape) for leaf in matrices) + config.vocab_size * config.hidden_size
    return 6 * weights + 6 * config.layers * config.heads * config.size_of_head * length


def sharded(x: jax.Array, spec: P) -> jax.Array:
    """The array, sharded if there is a mesh."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)


def placed(spec: P) -> NamedSharding | None:
    """The sharding on the mesh that is set, or None without one; for arrays outside of jit."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else NamedSharding(mesh, spec)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(weight: jax.Array, spec: P, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A weight in `dtype`, gathered over `fsdp` after the cast, so that half as many bytes are sent.

    Its gradient is summed over the batch's axes directly into the sharding of the weight.
    """
    whole = P(*(None if axis == "fsdp" else axis for axis in spec))
    return sharded(sharded(weight.astype(dtype), spec), whole)


def _gathered_forward(weight: jax.Array, spec: P, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    return _gathered(weight, spec, dtype), jnp.zeros((0,), weight.dtype)


def _gathered_backward(spec: P, dtype: Any, like: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    del dtype
    return (sharded(cotangent, spec).astype(like.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def wide(x: jax.Array) -> jax.Array:
    """The array in float32, or in float64 if it is that."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    mean_square = jnp.mean(jnp.square(wide(x)), axis=-1, keepdims=True)
    return (wide(x) * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)


def rotary(x: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding of `[B, T, heads, head size]`."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half) / half)
    angle = wide(jnp.arange(x.shape[1]))[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(wide(x), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def has_cudnn_attention(query: jax.Array) -> bool:
    """Whether cuDNN's attention takes such queries `[B, T, heads, head size]`."""
    is_16_bit = query.dtype in (jnp.bfloat16, jnp.float16)
    return is_16_bit and query.shape[-1] % 8 == 0 and jax.default_backend() == "gpu"


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """Causal grouped-query attention by cuDNN, of any length; `mask` `[B or 1, 1, T, T]` hides more tokens."""
    length = query.shape[1]
    # JAX refuses the gradient of an odd length. One more token at the end makes it even: no other token sees it.
    more = length % 2
    query, key, value = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (query, key, value))
    if mask is not None:
        # The added token must see something: itself.
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, more), (0, more)), constant_values=True)
    attended = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, scale=scale, implementation="cudnn"
    )
    return attended[:, :length]


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal grouped-query attention: cuDNN's where it can be used, else with all weights in memory."""
    if has_cudnn_attention(query):
        return cudnn_attention(query, key, value)
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    scores = wide(jnp.einsum("btkgd,bskd->bkgts", grouped, key)) * size**-0.5
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(batch, length, heads, size)


def mlp(matrices: Tree, x: jax.Array, pieces: int) -> jax.Array:
    """SwiGLU of `[B, T, H]`; of several pieces of the sequence one at a time, computed again in the backward pass."""

    def of_piece(x: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ matrices["gate"]) * (x @ matrices["up"])) @ matrices["down"]

    if pieces == 1:
        return of_piece(x)
    batch, length, size = x.shape
    split = x.reshape(batch, pieces, length // pieces, size).swapaxes(0, 1)
    return jax.lax.map(jax.checkpoint(of_piece, prevent_cse=False), split).swapaxes(0, 1).reshape(x.shape)


def layer(config: LlamaConfig, x: jax.Array, weights: Tree) -> jax.Array:
    """`[B, T, H]` to `[B, T, H]`, with the weights of this layer gathered and no other's."""
    described = layer_parameters(config)
    matrices = {
        name: _gathered(weights[name], each.spec, x.dtype) for name, each in described.items() if each.is_matrix
    }
    normed = rms_norm(x, weights["attention_norm"], config.norm_epsilon)
    query, key, value = (
        sharded(jnp.einsum("bth,hnd->btnd", normed, matrices[name]), HEADS) for name in ("query", "key", "value")
    )
    attended = attention(rotary(query, config.rope_base), rotary(key, config.rope_base), value)
    x = sharded(x + jnp.einsum("btnd,ndh->bth", attended, matrices["attention_out"]), HIDDEN)
    return sharded(x + mlp(matrices, rms_norm(x, weights["mlp_norm"], config.norm_epsilon), config.mlp_pieces), HIDDEN)


def hidden_states(config: LlamaConfig, params: Tree, tokens: jax.Array) -> jax.Array:
    """`[B, T]` tokens to the last hidden states `[B, T, H]`; for the gradient, only each layer's input is kept."""
    shared = sharded(tokens, P("data", None))
    columns = sharded(params["embedding"][shared], P("data", None, ("fsdp", "tensor"))).astype(config.dtype)
    # One axis at a time: for both at once, XLA would make an array that is whole on every device.
    x = sharded(sharded(columns, P("data", None, "fsdp")), HIDDEN)
    # The body of a scan is compiled once, and XLA cannot merge the second forward pass into the first.
    body = jax.checkpoint(partial(layer, config), prevent_cse=False)
    x, _ = jax.lax.scan(lambda x, weights: (body(x, weights), None), x, params["layers"])
    return rms_norm(x, params["norm"], config.norm_epsilon)


def last_layer(config: LlamaConfig, params: Tree) -> tuple[jax.Array, str]:
    """The last layer's kernel and its layout: `[H, V]`, or the embedding's `[V, H]` if tied."""
    if config.tie_embeddings:
        return params["embedding"].astype(config.dtype), "vh"
    return sharded(params["head"].astype(config.dtype), HEAD_SPEC), "hv"


def whole_last_layer(config: LlamaConfig, params: Tree) -> tuple[jax.Array, str]:
    """The last layer's kernel and its layout, for logits that are all in memory: gathered over `fsdp` if untied."""
    if config.tie_embeddings:
        return last_layer(config, params)
    return _gathered(params["head"], HEAD_SPEC, config.dtype), "hv"


def full_logits(config: LlamaConfig, params: Tree, hidden: jax.Array) -> jax.Array:
    """Hidden states `[..., H]` to logits `[..., V]` in float32 or float64, all of them in memory."""
    kernel, layout = whole_last_layer(config, params)
    return wide(jnp.einsum(f"...h,{layout}->...v", hidden, kernel))
