"""The largest logits of every token, with one product."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens, write_stats
from jliger.ops.linear_head.chunks.sizes import part_sizes, selection_tile, stats_chunk
from jliger.ops.linear_head.chunks.stats import merge_stats
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks, Span
from jliger.ops.linear_head.types import HeadConfig, Operands
from jliger.ops.logits import RowStats, StatsWanted, get_rows
from jliger.ops.logits.top_k import TopLogits, get_top_logits, merge_top_logits
from jliger.ops.logits.top_k_types import NO_COLUMN, TopKStats


def top_k_pass(config: HeadConfig, operands: Operands) -> TopKStats:
    """The `config.top_k` largest logits of each token, with 0.5 GiB of logits on a GPU.

    Uncounted tokens get statistics of 0, and ids of −1.

    Args:
      config: how logits are computed.
      operands: arrays of `[T]` tokens. The labels are not used.
    """
    k = config.top_k
    assert k is not None
    rows = get_rows(config.implementation, config.compute_capability)
    top_logits = get_top_logits(config.implementation, config.compute_capability)
    num_tokens, vocab = operands.labels.shape[0], operands.kernel.shape[config.vocab_dim]
    dtype = operands.hidden.dtype
    # A kernel of another dtype is cast block by block, so that it is never held in both.
    in_blocks = operands.kernel.dtype != dtype
    chunk_size, width = (
        selection_tile(config, num_tokens, vocab) if in_blocks else (stats_chunk(config, num_tokens, vocab), vocab)
    )
    blocks = Blocks.make(config, operands.head, dtype, rows.alignment, width)
    packed = PackedTokens.of(operands, chunk_size)

    def step(size: int, index: Int[Array, ""] | int, stats: TopKStats) -> TopKStats:
        chunk = Chunk.make(packed.slots(index * packed.chunk, size), operands, rows.alignment)

        def block_step(span: Span, merged: tuple[TopLogits, RowStats] | None) -> tuple[TopLogits, RowStats]:
            columns, block = blocks.block(span, chunk)
            product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
            logit_map = config.logit_map(span.width)
            top = top_logits(product, block, logit_map, k)
            top = top._replace(ids=jnp.where(top.ids == NO_COLUMN, NO_COLUMN, top.ids + span.start))
            result = rows.row_stats(product, block, logit_map, StatsWanted())
            if merged is None:
                return top, result
            return merge_top_logits(top, merged[0]), merge_stats(result, merged[1])

        top, result = blocks.sweep(block_step, None)
        return write_stats(stats, TopKStats(top, result.max, result.log_sum), index * packed.chunk)

    sizes = part_sizes(packed.chunk) if in_blocks else (packed.chunk,)
    return packed.restore(packed.loop(step, packed.empty_stats(config, operands.hidden), sizes))
