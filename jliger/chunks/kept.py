"""Logits kept for the backward pass, where memory allows: three products, and `[T, V]` of memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.chunks.blocks import Blocks
from jliger.chunks.grad_sums import add_chunk, after_chunks, before_chunks
from jliger.chunks.queue import Chunk, Queue
from jliger.chunks.sizes import forward_chunk
from jliger.chunks.types import Grads, GradTypes, Head, Tokens
from jliger.config import HeadConfig
from jliger.products import logits_product
from jliger.rows import Coefficients, RowStats, get_rows


def kept_stats(config: HeadConfig, tokens: Tokens, head: Head) -> tuple[RowStats, Float[Array, "T V"]]:
    """Stats, and the product that they are of, in the tokens' order.

    Tokens that don't count are computed too: leaving them out would take a copy of all that is kept.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    vocab = head.kernel.shape[config.vocab_dim]
    blocks = Blocks.make(config, head, tokens.hidden.dtype, rows.alignment)
    counted = _where_counted(tokens)
    chunk = Chunk.make(jnp.arange(tokens.labels.shape[0]), counted, rows.alignment)
    columns, block = blocks.block(blocks.full_span, counted.labels)
    product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
    stats = rows.row_stats(product, block, config.logit_map(vocab), config.stats_wanted)
    empty = jax.tree.map(jnp.zeros_like, stats)._replace(prediction=jnp.full_like(stats.prediction, -1))
    stats = jax.tree.map(lambda field, none: jnp.where(tokens.counted, field, none), stats, empty)
    return stats, product[:, :vocab]


def kept_form(
    config: HeadConfig,
    wanted: GradTypes,
    tokens: Tokens,
    head: Head,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
) -> Grads:
    """Gradients for any coefficients, from `tokens.logits`; the other arguments are the recompute form's."""
    assert tokens.logits is not None
    rows = get_rows(config.implementation, config.compute_capability)
    dtype = tokens.hidden.dtype
    num_tokens, vocab = tokens.logits.shape
    blocks = Blocks.make(config, head, dtype, rows.alignment)
    queue = Queue.make(jnp.full_like(tokens.counted, True), forward_chunk(config, num_tokens, vocab))
    counted = _where_counted(tokens)
    per_token = jax.tree.map(lambda array: jnp.where(tokens.counted, array, 0), (row_max, log_sum, coefficients))
    # Padded, if at all, to whole chunks, and to the columns of the padded kernel.
    width = blocks.head.kernel.shape[config.vocab_dim]
    rest = ((0, queue.num_chunks * queue.chunk - num_tokens), (0, width - vocab))
    product = jnp.pad(tokens.logits, rest) if rest != ((0, 0), (0, 0)) else tokens.logits

    def step(size: int, index: Int[Array, ""] | int, grads: Grads) -> Grads:
        start = index * queue.chunk
        chunk = Chunk.make(queue.slots(start, size), counted, rows.alignment)
        columns, block = blocks.block(blocks.full_span, chunk.labels)
        part = jax.lax.dynamic_slice_in_dim(product, start, size)
        logit_grads = rows.row_grads(part, block, config.logit_map(vocab), *chunk.take(per_token), dtype=dtype)
        return add_chunk(config, wanted, grads, chunk, columns, logit_grads)

    grads = queue.loop(step, before_chunks(wanted, tokens, head), (queue.chunk,))
    return after_chunks(wanted, grads, head)


def _where_counted(tokens: Tokens) -> Tokens:
    """With zeros for what doesn't count, whatever its hidden states hold, and a label that is none."""
    counted = tokens.counted[:, None]
    return tokens._replace(
        hidden=jnp.where(counted, tokens.hidden, 0),
        labels=jnp.where(tokens.counted, tokens.labels, -1),
        adapted=None if tokens.adapted is None else jnp.where(counted, tokens.adapted, 0),
    )
