"""Sums of token losses, through full logits or through jliger, as `jliger.accumulate_gradients` wants them."""

from collections.abc import Callable

import decoder
import jax
import jax.numpy as jnp
import optax
from llama import LlamaConfig, Tree

import jliger

Sums = Callable[[Tree, Tree], tuple[jax.Array, jax.Array]]
HEADS = ("full", "jliger")


def full_sums(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The usual way, with logits `[B, T, V]` in memory; a label below 0 doesn't count."""
    logits = jnp.einsum("bth,vh->btv", hidden, kernel)
    counted = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(decoder.wide(logits), jnp.maximum(labels, 0))
    return jnp.sum(losses, where=counted), jnp.sum(counted)


def jliger_sums(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, chunk_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The same, with a chunk of the logits at a time."""
    loss, metrics = jliger.fused_linear_cross_entropy(
        hidden,
        kernel,
        labels,
        where=labels >= 0,
        kernel_layout="vh",
        reduction="sum",
        return_metrics=True,
        chunk_size=chunk_size,
        # The Triton kernels take no float64.
        implementation="xla" if hidden.dtype == jnp.float64 else None,
    )
    return loss, metrics.weight


def sums_of(head: str, config: LlamaConfig, dtype: jax.typing.DTypeLike, pieces: int = 1) -> Sums:
    """The loss function of parameters and a batch `{"tokens", "labels"}`, each `[B, T]`."""
    of_head = {"full": full_sums, "jliger": jliger_sums}[head]

    def sums(params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
        hidden = decoder.hidden_states(config, params, batch["tokens"], dtype, pieces)
        return of_head(hidden, params["embedding"].astype(dtype), batch["labels"])

    return sums
