"""Statistics of every token, with one product: for a loss without gradients, and before the recompute pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens, write_stats
from jliger.ops.linear_head.chunks.sizes import forward_chunk, part_sizes, recompute_tile, stats_chunk
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks, Span
from jliger.ops.linear_head.types import HeadConfig, Operands
from jliger.ops.logits import RowStats, get_rows


def stats_pass(config: HeadConfig, operands: Operands, *, low_memory: bool, skip_empty: bool = False) -> RowStats:
    """The statistics of each token's logits.

    Uncounted tokens get statistics of 0, and prediction −1.

    Args:
      config: how logits are computed.
      operands: arrays of `[T]` tokens.
      low_memory: use no more memory than the recompute pass, and never cast the whole kernel at once; a little slower.
      skip_empty: compute nothing if no token counts.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    num_tokens, vocab = operands.labels.shape[0], operands.kernel.shape[config.vocab_dim]
    dtype = operands.hidden.dtype
    in_blocks = low_memory and operands.kernel.dtype != dtype
    if in_blocks:
        chunk_size, width = recompute_tile(config, num_tokens, vocab)
    else:
        chunk_size, width = (stats_chunk if low_memory else forward_chunk)(config, num_tokens, vocab), vocab
    blocks = Blocks.make(config, operands.head, dtype, rows.alignment, width)
    packed = PackedTokens.of(operands, chunk_size)

    def step(size: int, index: Int[Array, ""] | int, stats: RowStats) -> RowStats:
        chunk = Chunk.make(packed.slots(index * packed.chunk, size), operands, rows.alignment)

        def block_step(span: Span, merged: RowStats | None) -> RowStats:
            columns, block = blocks.block(span, chunk)
            product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
            result = rows.row_stats(product, block, config.logit_map(span.width), config.stats_wanted)
            result = result._replace(prediction=result.prediction + span.start)
            return result if merged is None else merge_stats(result, merged)

        return write_stats(stats, blocks.sweep(block_step, None), index * packed.chunk)

    sizes = part_sizes(packed.chunk) if in_blocks else (packed.chunk,)
    empty = packed.empty_stats(config, operands.hidden)
    return packed.restore(packed.loop(step, empty, sizes, skip_empty=skip_empty))


def merge_stats(left: RowStats, right: RowStats) -> RowStats:
    """Merges the statistics of two blocks of the same rows. If their maxima are equal, the left prediction is kept."""
    row_max = jnp.maximum(left.max, right.max)
    parts = [shifted_sums(stats, row_max) for stats in (left, right)]
    sum_exp = parts[0].sum_exp + parts[1].sum_exp
    mean_logit = None
    if parts[0].sum_exp_logit is not None and parts[1].sum_exp_logit is not None:
        mean_logit = (parts[0].sum_exp_logit + parts[1].sum_exp_logit) / sum_exp
    return RowStats(
        max=row_max,
        log_sum=jnp.log(sum_exp),
        label_logit=left.label_logit + right.label_logit,
        prediction=jnp.where(right.max > left.max, right.prediction, left.prediction),
        weighted_sum=jax.tree.map(jnp.add, left.weighted_sum, right.weighted_sum),
        mean_logit=mean_logit,
    )


class ShiftedSums(NamedTuple):
    """Sums over a block's columns, relative to the maximum `m` of all blocks. Sums of several blocks are added.

    Attributes:
      sum_exp: `Σ_v exp(z_v − m)`.
      sum_exp_logit: `Σ_v exp(z_v − m) · (z_v − m)`, or None if not wanted.
    """

    sum_exp: Float[Array, " T"]
    sum_exp_logit: Float[Array, " T"] | None


def shifted_sums(stats: RowStats, row_max: Float[Array, " T"]) -> ShiftedSums:
    """The sums of a block with statistics `stats`; `row_max` is the maximum over all blocks."""
    # A block of only −inf has the lowest finite number as its maximum, so the difference may overflow to −inf. Clamping
    # keeps it finite, and the sum stays 0.
    step = jnp.maximum(stats.max - row_max, jnp.finfo(row_max.dtype).min)
    sum_exp = jnp.exp(stats.log_sum + step)
    if stats.mean_logit is None:
        return ShiftedSums(sum_exp, None)
    return ShiftedSums(sum_exp, jnp.where(sum_exp == 0, 0, sum_exp * (stats.mean_logit + step)))
