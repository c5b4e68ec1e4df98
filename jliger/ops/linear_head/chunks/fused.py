"""The forward form: gradients together with the loss, three products."""

from collections.abc import Callable

from jaxtyping import Array, Int

from jliger.ops.linear_head.chunks.grad_accumulators import add_chunk, after_chunks, before_chunks
from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens, write_stats
from jliger.ops.linear_head.chunks.sizes import forward_chunk
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks
from jliger.ops.linear_head.types import GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import Coefficients, RowStats, get_rows


def fused_pass(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    coefficients: Coefficients,
    merge: Callable[[RowStats], RowStats] | None = None,
) -> tuple[RowStats, Gradients]:
    """Stats, and the gradients of a loss whose coefficients are known beforehand.

    Args:
      config: how logits come about.
      wanted: which gradients, in which dtypes; the kernel's and the bias's are sums over chunks in float32 before.
      operands: of `[T]` tokens.
      coefficients: of each token's logit gradients, `[T]`.
      merge: makes stats of all columns from those of the head's, if it has but some; the stats returned are the head's.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    dtype = operands.hidden.dtype
    vocab = operands.kernel.shape[config.vocab_dim]
    blocks = Blocks.make(config, operands.head, dtype, rows.alignment)
    packed = PackedTokens.make(operands.counted, forward_chunk(config, operands.labels.shape[0], vocab))

    def step(size: int, index: Int[Array, ""] | int, carry: tuple[RowStats, Gradients]) -> tuple[RowStats, Gradients]:
        stats, grads = carry
        start = index * packed.chunk
        chunk = Chunk.make(packed.slots(start, size), operands, rows.alignment)
        columns, block = blocks.block(blocks.full_span, chunk)
        product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
        parts = (product, block, config.logit_map(vocab))
        chunk_coefficients = chunk.take(coefficients)
        if merge is None:
            result, logit_grads = rows.row_stats_and_grads(*parts, config.stats_wanted, chunk_coefficients, dtype=dtype)
        else:
            result = rows.row_stats(*parts, config.stats_wanted)
            all_columns = merge(result)
            logit_grads = rows.row_grads(*parts, all_columns.max, all_columns.log_sum, chunk_coefficients, dtype=dtype)
        return write_stats(stats, result, start), add_chunk(config, wanted, grads, chunk, columns, logit_grads)

    initial = (packed.empty_stats(config, operands.hidden), before_chunks(wanted, operands))
    stats, grads = packed.loop(step, initial, (packed.chunk,))
    return packed.restore(stats), after_chunks(wanted, grads, operands.head)
