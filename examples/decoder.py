"""A Llama-shaped decoder on one device, for long sequences and for any floating-point dtype; its head is its embedding.

Of a layer's forward pass only its input is kept, and its MLP goes over pieces of the sequence, each computed again in
the backward pass: the MLP's inner columns exist for one piece at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import llama
from llama import LlamaConfig, Tree

CONFIGS = {
    # Seconds on a CPU.
    "tiny": LlamaConfig(vocab_size=16384, hidden_size=64, mlp_size=192, layers=2, heads=4, kv_heads=2),
    # GPT-2's sizes and vocabulary, rounded down to thousands.
    "small": LlamaConfig(vocab_size=50_000, hidden_size=768, mlp_size=2048, layers=12, heads=12, kv_heads=12),
    # Llama 3.2 1B.
    "llama3.2-1b": LlamaConfig(vocab_size=128256, hidden_size=2048, mlp_size=8192, layers=16, heads=32, kv_heads=8),
}


def initial_parameters(config: LlamaConfig, key: jax.Array, dtype: jax.typing.DTypeLike) -> Tree:
    """Random parameters: the tree of `llama` without its head."""
    params = llama.initial_parameters(config, key)
    return {
        name: jax.tree.map(lambda leaf: leaf.astype(dtype), part) for name, part in params.items() if name != "head"
    }


def parameter_count(config: LlamaConfig) -> int:
    """All parameters; the head is the embedding."""
    return llama.parameter_count(config) - config.vocab_size * config.hidden_size


def wide(x: jax.Array) -> jax.Array:
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm."""
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


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal grouped-query attention: cuDNN's where there is one, else with all weights in memory."""
    if query.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "gpu":
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    scores = wide(jnp.einsum("btkgd,bskd->bkgts", grouped, key)) * size**-0.5
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(batch, length, heads, size)


def mlp(weights: Tree, x: jax.Array, pieces: int) -> jax.Array:
    """SwiGLU of `[B, T, H]`, a piece of the sequence at a time."""

    def of_piece(x: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]

    if pieces == 1:
        return of_piece(x)
    batch, length, size = x.shape
    split = x.reshape(batch, pieces, length // pieces, size).swapaxes(0, 1)
    return jax.lax.map(jax.checkpoint(of_piece, prevent_cse=False), split).swapaxes(0, 1).reshape(x.shape)


def layer(config: LlamaConfig, pieces: int, x: jax.Array, weights: Tree) -> jax.Array:
    """`[B, T, H]` to `[B, T, H]`."""
    matrices = {name: weight.astype(x.dtype) for name, weight in weights.items() if not name.endswith("norm")}
    normed = rms_norm(x, weights["attention_norm"], config.norm_epsilon)
    query, key, value = (jnp.einsum("bth,hnd->btnd", normed, matrices[name]) for name in ("query", "key", "value"))
    attended = attention(rotary(query, config.rope_base), rotary(key, config.rope_base), value)
    x = x + jnp.einsum("btnd,ndh->bth", attended, matrices["attention_out"])
    return x + mlp(matrices, rms_norm(x, weights["mlp_norm"], config.norm_epsilon), pieces)


def hidden_states(
    config: LlamaConfig, params: Tree, tokens: jax.Array, dtype: jax.typing.DTypeLike, pieces: int = 1
) -> jax.Array:
    """`[B, T]` tokens to the last hidden states `[B, T, H]`; `pieces` divides the length."""
    body = jax.checkpoint(partial(layer, config, pieces), prevent_cse=False)
    x = params["embedding"].astype(dtype)[tokens]
    x, _ = jax.lax.scan(lambda x, weights: (body(x, weights), None), x, params["layers"])
    return rms_norm(x, params["norm"], config.norm_epsilon)
