"""Passes that save logits for the backward pass: three products, and `[T, V]` of memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.ops.linear_head.chunks.grad_accumulators import add_chunk, after_chunks, before_chunks
from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens
from jliger.ops.linear_head.chunks.sizes import forward_chunk
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks
from jliger.ops.linear_head.types import GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import Coefficients, RowStats, get_rows


def stats_and_logits_pass(config: HeadConfig, operands: Operands) -> tuple[RowStats, Float[Array, "T V"]]:
    """The statistics, and the product they were computed from, both in the order of the tokens.

    Uncounted tokens are computed too: to restore the order of packed tokens would take a second array of logits.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    vocab = operands.kernel.shape[config.vocab_dim]
    blocks = Blocks.make(config, operands.head, operands.hidden.dtype, rows.alignment)
    counted = _where_counted(operands)
    chunk = Chunk.make(jnp.arange(operands.labels.shape[0]), counted, rows.alignment)
    columns, block = blocks.block(blocks.full_span, chunk)
    product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
    stats = rows.row_stats(product, block, config.logit_map(vocab), config.stats_wanted)
    if operands.counted is None:
        return stats, product[:, :vocab]
    empty = jax.tree.map(jnp.zeros_like, stats)._replace(prediction=jnp.full_like(stats.prediction, -1))
    stats = jax.tree.map(lambda field, none: jnp.where(operands.counted, field, none), stats, empty)
    return stats, product[:, :vocab]


def saved_logits_pass(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
) -> Gradients:
    """Gradients for any coefficients, from `operands.logits`; other arguments as in `recompute_pass`."""
    assert operands.logits is not None
    num_tokens, vocab = operands.logits.shape
    # All tokens are packed, counted or not, because the saved logits are in the order of the tokens.
    packed = PackedTokens.of(operands._replace(counted=None), forward_chunk(config, num_tokens, vocab))
    counted = _where_counted(operands)
    per_token = row_max, log_sum, coefficients
    if operands.counted is not None:
        per_token = jax.tree.map(lambda array: jnp.where(operands.counted, array, 0), per_token)
    # Pads tokens to whole chunks. Padding makes a copy: only if needed.
    rest = packed.num_chunks * packed.chunk - num_tokens
    product = jnp.pad(operands.logits, ((0, rest), (0, 0))) if rest != 0 else operands.logits
    return gradients_of_saved(
        config, wanted, counted._replace(logits=product), packed, per_token, lambda index: index * packed.chunk
    )


def gradients_of_saved(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    packed: PackedTokens,
    per_token: tuple[Float[Array, " T"], Float[Array, " T"], Coefficients],
    first_row: Callable[[Any], Any],
) -> Gradients:
    """Gradients of packed tokens; `first_row` is the row of `operands.logits` that a chunk begins with."""
    assert operands.logits is not None
    rows = get_rows(config.implementation, config.compute_capability)
    dtype, vocab = operands.hidden.dtype, operands.logits.shape[1]
    product = operands.logits
    blocks = Blocks.make(config, operands.head, dtype, rows.alignment)
    padding = blocks.head.kernel.shape[config.vocab_dim] - vocab

    def step(size: int, index: Int[Array, ""] | int, grads: Gradients) -> Gradients:
        chunk = Chunk.make(packed.slots(index * packed.chunk, size), operands, rows.alignment)
        columns, block = blocks.block(blocks.full_span, chunk)
        part = jax.lax.dynamic_slice_in_dim(product, first_row(index), size)
        part = jnp.pad(part, ((0, 0), (0, padding))) if padding else part
        logit_grads = rows.row_grads(part, block, config.logit_map(vocab), *chunk.take(per_token), dtype=dtype)
        return add_chunk(config, wanted, grads, chunk, columns, logit_grads)

    grads = packed.loop(step, before_chunks(wanted, operands), (packed.chunk,))
    return after_chunks(wanted, grads, operands.head)


def _where_counted(operands: Operands) -> Operands:
    """Operands with hidden states of 0 and label −1 for uncounted tokens, whose hidden states may be NaN."""
    if operands.counted is None:
        return operands
    counted = operands.counted[:, None]
    return operands._replace(
        hidden=jnp.where(counted, operands.hidden, 0),
        labels=jnp.where(operands.counted, operands.labels, -1),
        adapted=None if operands.adapted is None else jnp.where(counted, operands.adapted, 0),
    )
