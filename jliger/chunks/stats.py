"""Stats of every token, one product: the loss without gradients, and the first half of the recompute form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jliger.chunks.blocks import Blocks
from jliger.chunks.queue import Chunk, Queue, write_stats
from jliger.chunks.sizes import forward_chunk, part_sizes, recompute_tile, stats_chunk
from jliger.chunks.types import Head, Tokens
from jliger.config import HeadConfig
from jliger.products import logits_product
from jliger.rows import RowStats, get_rows


def token_stats(config: HeadConfig, tokens: Tokens, head: Head, *, lean: bool) -> RowStats:
    """What a loss needs of each token's logits.

    Tokens that don't count get the stats of a row with log-sum-exp 0, label logit 0 and prediction −1.

    Args:
      config: how logits come about.
      tokens: `[T]` of them.
      head: kernel, bias and class weights.
      lean: keep within the recompute form's memory, and never hold the whole kernel in the products' dtype, if that is
        not its own; a little slower.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    num_tokens, vocab = tokens.labels.shape[0], head.kernel.shape[config.vocab_dim]
    dtype = tokens.hidden.dtype
    in_blocks = lean and head.kernel.dtype != dtype
    if in_blocks:
        chunk_size, width = recompute_tile(config, num_tokens, vocab)
    else:
        chunk_size, width = (stats_chunk if lean else forward_chunk)(config, num_tokens, vocab), vocab
    blocks = Blocks.make(config, head, dtype, rows.alignment, width)
    queue = Queue.make(tokens.counted, chunk_size)

    def step(size: int, index: Int[Array, ""] | int, stats: RowStats) -> RowStats:
        chunk = Chunk.make(queue.slots(index * queue.chunk, size), tokens, rows.alignment)

        def block_step(index: Int[Array, ""] | int, merged: RowStats | None) -> RowStats:
            kernel, block, start = blocks.block(index, chunk.labels)
            product = logits_product(config, chunk.hidden, kernel)
            found = rows.row_stats(product, block, blocks.logit_map, with_weighted_sum=config.with_weighted_sum)
            found = found._replace(prediction=found.prediction + start)
            return found if merged is None else merge_stats(found, merged)

        return write_stats(stats, blocks.sweep(block_step, None), index * queue.chunk)

    sizes = part_sizes(queue.chunk) if in_blocks else (queue.chunk,)
    return queue.restore(queue.loop(step, queue.empty_stats(config, tokens.hidden), sizes))


def merge_stats(left: RowStats, right: RowStats) -> RowStats:
    """The stats of two blocks of the same rows together; of equal maxima the left one's prediction stands."""
    row_max = jnp.maximum(left.max, right.max)
    return RowStats(
        max=row_max,
        log_sum=jnp.log(jnp.exp(left.log_sum + (left.max - row_max)) + jnp.exp(right.log_sum + (right.max - row_max))),
        label_logit=left.label_logit + right.label_logit,
        prediction=jnp.where(right.max > left.max, right.prediction, left.prediction),
        weighted_sum=jax.tree.map(jnp.add, left.weighted_sum, right.weighted_sum),
    )
