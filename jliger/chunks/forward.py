"""The forward form: gradients together with the loss, three products."""

from collections.abc import Callable

from jaxtyping import Array, Int

from jliger.chunks.blocks import Blocks
from jliger.chunks.grad_sums import add_chunk, after_chunks, before_chunks
from jliger.chunks.queue import Chunk, Queue, write_stats
from jliger.chunks.sizes import forward_chunk
from jliger.chunks.types import Grads, GradTypes, Head, Tokens
from jliger.config import HeadConfig
from jliger.products import logits_product
from jliger.rows import Coefficients, RowStats, get_rows


def forward_form(
    config: HeadConfig,
    wanted: GradTypes,
    tokens: Tokens,
    head: Head,
    coefficients: Coefficients,
    merge: Callable[[RowStats], RowStats] | None = None,
) -> tuple[RowStats, Grads]:
    """Stats, and the gradients of a loss whose coefficients are known beforehand.

    Args:
      config: how logits come about.
      wanted: which gradients, in which dtypes; the kernel's and the bias's are sums over chunks in float32 before.
      tokens: `[T]` of them.
      head: kernel, bias and class weights.
      coefficients: of each token's logit gradients, `[T]`.
      merge: makes stats of all columns from those of the head's, if it has but some; the stats returned are the head's.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    dtype = tokens.hidden.dtype
    vocab = head.kernel.shape[config.vocab_dim]
    blocks = Blocks.make(config, head, dtype, rows.alignment)
    queue = Queue.make(tokens.counted, forward_chunk(config, tokens.labels.shape[0], vocab))

    def step(size: int, index: Int[Array, ""] | int, carry: tuple[RowStats, Grads]) -> tuple[RowStats, Grads]:
        stats, grads = carry
        start = index * queue.chunk
        chunk = Chunk.make(queue.slots(start, size), tokens, rows.alignment)
        columns, block = blocks.block(blocks.full_span, chunk.labels)
        product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
        parts = (product, block, config.logit_map(vocab))
        chunk_coefficients = chunk.take(coefficients)
        if merge is None:
            found, logit_grads = rows.row_stats_and_grads(*parts, config.stats_wanted, chunk_coefficients, dtype=dtype)
        else:
            found = rows.row_stats(*parts, config.stats_wanted)
            all_columns = merge(found)
            logit_grads = rows.row_grads(*parts, all_columns.max, all_columns.log_sum, chunk_coefficients, dtype=dtype)
        return write_stats(stats, found, start), add_chunk(config, wanted, grads, chunk, columns, logit_grads)

    initial = (queue.empty_stats(config, tokens.hidden), before_chunks(wanted, tokens, head))
    stats, grads = queue.loop(step, initial, (queue.chunk,))
    return queue.restore(stats), after_chunks(wanted, grads, head)
