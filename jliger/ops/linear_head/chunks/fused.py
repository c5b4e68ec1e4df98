"""The fused pass: gradients are computed together with the loss, with three products."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Int

from jliger.ops.linear_head.chunks.grad_accumulators import add_chunk, after_chunks, before_chunks
from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens, write_stats
from jliger.ops.linear_head.chunks.sizes import forward_chunk
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks
from jliger.ops.linear_head.types import GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import RowStats, get_rows
from jliger.ops.logits.objectives import CoefficientRule


def fused_pass(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    rule: CoefficientRule,
    per_token: Any,
    merge: Callable[[RowStats], RowStats] | None = None,
) -> tuple[RowStats, Gradients]:
    """Statistics, and the gradients of a loss whose coefficients follow from each token's own statistics.

    Args:
      config: how logits are computed.
      wanted: the dtypes of the gradients that are wanted. Gradients of parameters are summed over chunks in float32.
      operands: of `[T]` tokens.
      rule: computes the coefficients of each token's logit gradients. If it needs no statistics, one launch computes
        statistics and gradients.
      per_token: the arguments of `rule` beside the statistics, arrays `[T]`.
      merge: combines this device's statistics with those of the other vocabulary shards; None if the vocabulary is not
        sharded. The statistics that are returned are not merged.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    dtype = operands.hidden.dtype
    vocab = operands.kernel.shape[config.vocab_dim]
    blocks = Blocks.make(config, operands.head, dtype, rows.alignment)
    packed = PackedTokens.of(operands, forward_chunk(config, operands.labels.shape[0], vocab))

    def step(size: int, index: Int[Array, ""] | int, carry: tuple[RowStats, Gradients]) -> tuple[RowStats, Gradients]:
        stats, grads = carry
        start = index * packed.chunk
        chunk = Chunk.make(packed.slots(start, size), operands, rows.alignment)
        columns, block = blocks.block(blocks.full_span, chunk)
        product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
        parts = (product, block, config.logit_map(vocab))
        arguments = chunk.take(per_token)
        if merge is None and not rule.needs_stats:
            coefficients = rule(None, *arguments)
            result, logit_grads = rows.row_stats_and_grads(*parts, config.stats_wanted, coefficients, dtype=dtype)
        else:
            # Gradients need the statistics of all columns, so the merge comes between two launches.
            result = rows.row_stats(*parts, config.stats_wanted)
            merged = result if merge is None else merge(result)
            coefficients = rule(merged, *arguments)
            logit_grads = rows.row_grads(*parts, merged.max, merged.log_sum, coefficients, dtype=dtype)
        return write_stats(stats, result, start), add_chunk(config, wanted, grads, chunk, columns, logit_grads)

    initial = (packed.empty_stats(config, operands.hidden), before_chunks(wanted, operands))
    stats, grads = packed.loop(step, initial, (packed.chunk,))
    return packed.restore(stats), after_chunks(wanted, grads, operands.head)
