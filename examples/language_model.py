"""A small decoder-only language model in Flax NNX that ends at its hidden states."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the language model."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    tie_embeddings: bool
    dtype: str


def rotary(x: jax.Array, base: float = 10000.0) -> jax.Array:
    """Rotary position embedding of `[B, T, heads, head size]`, computed in float32."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        size, dtype = config.hidden_size, DTYPES[config.dtype]
        self.heads = config.heads
        self.attention_norm = nnx.RMSNorm(size, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(size, 3 * size, use_bias=False, dtype=dtype, rngs=rngs)
        self.attention_out = nnx.Linear(size, size, use_bias=False, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(size, dtype=dtype, rngs=rngs)
        self.mlp_in = nnx.Linear(size, 4 * size, use_bias=False, dtype=dtype, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * size, size, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, H]` to `[B, T, H]`."""
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
        attended = jax.nn.dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        x = x + self.attention_out(attended.reshape(x.shape))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    """Decoder-only transformer that ends at the hidden states; the last layer is left to the loss."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        size, dtype = config.hidden_size, DTYPES[config.dtype]
        self.dtype = dtype
        self.embedding = nnx.Embed(
            config.vocab_size, size, embedding_init=nnx.initializers.normal(0.02), dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(size, dtype=dtype, rngs=rngs)
        kernel_init = nnx.initializers.normal(0.02)
        self.head = (
            None
            if config.tie_embeddings
            else nnx.Linear(size, config.vocab_size, use_bias=False, kernel_init=kernel_init, rngs=rngs)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[B, T]` tokens to `[B, T, H]` hidden states."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def last_layer(self) -> tuple[jax.Array, str]:
        """The last layer's kernel and its layout: `[H, V]`, or the embedding's `[V, H]` where tied."""
        if self.head is None:
            return self.embedding.embedding[...].astype(self.dtype), "vh"
        return self.head.kernel[...].astype(self.dtype), "hv"

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[..., H]` to float32 logits `[..., V]`, all of them in memory."""
        kernel, layout = self.last_layer()
        logits = jnp.einsum("...h,hv->...v" if layout == "hv" else "...h,vh->...v", hidden, kernel)
        return logits.astype(jnp.float32)

    def full_logits(self, tokens: jax.Array) -> jax.Array:
        """`[B, T]` tokens to float32 logits `[B, T, V]`."""
        return self.logits(self(tokens))
