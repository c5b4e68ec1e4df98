"""Passes that save the logits of as many tokens as a budget allows, and compute those of the others again."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens, write_stats
from jliger.ops.linear_head.chunks.recompute import recompute_pass
from jliger.ops.linear_head.chunks.saved_logits import gradients_of_saved
from jliger.ops.linear_head.chunks.sizes import forward_chunk
from jliger.ops.linear_head.chunks.stats import stats_pass
from jliger.ops.linear_head.chunks.types import dtypes_of_sums
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks
from jliger.ops.linear_head.types import GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import Coefficients, RowStats, get_rows


def stats_and_some_logits_pass(
    config: HeadConfig, operands: Operands, num_saved: int
) -> tuple[RowStats, Float[Array, "K V"], Int[Array, " T"]]:
    """The statistics, the products of the first `num_saved` counted tokens, and each token's row of these, or −1."""
    counted = _counted(operands)
    rows = get_rows(config.implementation, config.compute_capability)
    vocab = operands.kernel.shape[config.vocab_dim]
    place = counted.cumsum(dtype=jnp.int32) - 1
    row_of = jnp.where(counted & (place < num_saved), place, -1)
    logits = jnp.zeros_like(operands.hidden, config.logits_dtype, shape=(num_saved, vocab))
    if num_saved == 0:
        return stats_pass(config, operands, low_memory=True), logits, row_of
    blocks = Blocks.make(config, operands.head, operands.hidden.dtype, rows.alignment)
    packed, saved = _packed_by_row(config, row_of, num_saved, vocab)

    def step(
        size: int, index: Int[Array, ""] | int, carry: tuple[RowStats, Float[Array, "K V"]]
    ) -> tuple[RowStats, Float[Array, "K V"]]:
        stats, logits = carry
        chunk = Chunk.make(packed.slots(index * packed.chunk, size), operands, rows.alignment)
        columns, block = blocks.block(blocks.full_span, chunk)
        product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
        part = rows.row_stats(product, block, config.logit_map(vocab), config.stats_wanted)
        start = (_first_row(packed, num_saved, index), 0)
        logits = jax.lax.dynamic_update_slice(logits, product[:, :vocab], start)
        return write_stats(stats, part, index * packed.chunk), logits

    empty = packed.empty_stats(config, operands.hidden)
    stats, logits = packed.loop(step, (empty, logits), (packed.chunk,))
    others = operands._replace(counted=counted & ~saved)
    stats_of_others = stats_pass(config, others, low_memory=True, skip_empty=True)
    stats = jax.tree.map(lambda own, other: jnp.where(saved, own, other), packed.restore(stats), stats_of_others)
    return stats, logits, row_of


def partly_saved_pass(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
) -> Gradients:
    """Gradients for any coefficients, with `operands.logits` of some tokens; other arguments as in `recompute_pass`."""
    assert operands.logits is not None
    assert operands.logit_rows is not None
    assert operands.row_of is not None
    num_saved, vocab = operands.logits.shape
    per_token = row_max, log_sum, coefficients
    if num_saved == 0:
        return recompute_pass(config, wanted, operands, *per_token)
    # On Auto axes XLA may have moved tokens or logits to other devices since they were saved. What is here is found by
    # number, and tokens whose logits are elsewhere are computed again.
    first, places = operands.logit_rows[0], jnp.arange(num_saved, dtype=jnp.int32)
    row = operands.row_of - first
    inside = (operands.row_of >= 0) & (row >= 0) & (row < num_saved)
    in_order = (operands.logit_rows == first + places).at[jnp.where(inside, row, 0)].get(mode="clip")
    packed, saved = _packed_by_row(config, jnp.where(inside & in_order, row, -1), num_saved, vocab)
    in_sums = dtypes_of_sums(wanted, operands.hidden.dtype)
    grads = gradients_of_saved(
        config, in_sums, operands, packed, per_token, lambda index: _first_row(packed, num_saved, index)
    )
    others = operands._replace(counted=_counted(operands) & ~saved)
    return recompute_pass(config, wanted, others, *per_token, grads)


def _counted(operands: Operands) -> Bool[Array, " T"]:
    return jnp.ones_like(operands.labels, bool) if operands.counted is None else operands.counted


def _packed_by_row(
    config: HeadConfig, row_of: Int[Array, " T"], num_saved: int, vocab: int
) -> tuple[PackedTokens, Bool[Array, " T"]]:
    """Tokens in the order of their rows of logits, up to the first row without a token, and which tokens these are.

    Chunks need not divide the rows. Places that are too many are empty places of the first chunk, whose rows overlap
    with those of the second: so no chunk goes beyond the last row.
    """
    num_tokens = row_of.shape[0]
    chunk = min(forward_chunk(config, num_saved, vocab), num_saved)
    padding = -num_saved % chunk
    order = jnp.argsort(jnp.where(row_of < 0, num_saved, row_of), stable=True).astype(jnp.int32)
    rows = jnp.arange(num_saved, dtype=jnp.int32)
    token_of = order.at[rows].get(mode="fill", fill_value=0)
    has_token = (rows < num_tokens) & (row_of[token_of] == rows)
    count = has_token.sum(dtype=jnp.int32)
    # As in `PackedTokens.make`, the indices of empty places are out of range and differ from each other.
    token_of = jnp.where(has_token, token_of, num_tokens + rows)
    empty = num_tokens + num_saved + jnp.arange(padding, dtype=jnp.int32)
    own = chunk - padding
    token_of = jnp.concatenate([token_of[:own], empty, token_of[own:]])
    return PackedTokens(token_of, count + padding, num_tokens, chunk), (row_of >= 0) & (row_of < count)


def _first_row(packed: PackedTokens, num_saved: int, index: Int[Array, ""] | int) -> Int[Array, ""]:
    """The row of logits that a chunk begins with."""
    return jnp.maximum(index * packed.chunk - (packed.token_of.shape[0] - num_saved), 0)
