"""The fused pass for distillation: both models' logits in each chunk, and gradients of the student only."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Int

from jliger.ops.linear_head.chunks.grad_accumulators import add_chunk, after_chunks, before_chunks
from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens, write_stats
from jliger.ops.linear_head.chunks.sizes import forward_chunk
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks
from jliger.ops.linear_head.types import GradientDtypes, Gradients, HeadConfig, Operands, TeacherConfig
from jliger.ops.logits.distillation import (
    DistillationBlock,
    DistillationCoefficients,
    DistillationMap,
    DistillationStats,
    Divergence,
    Products,
    get_distillation_rows,
)
from jliger.ops.logits.distillation_types import Comparison


class DistillationMerge(NamedTuple):
    """Merges statistics over the devices that shard the vocabulary."""

    stats: Callable[[DistillationStats], DistillationStats]
    divergence: Callable[[Divergence], Divergence]


def distillation_pass(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    coefficients: DistillationCoefficients | None,
    merge: DistillationMerge | None = None,
) -> tuple[Comparison, Gradients | None]:
    """The statistics and divergence of each token, and the student's gradients.

    Args:
      config: how both models' logits are computed.
      wanted: the dtypes of the wanted gradients. Those of the kernel and the bias are summed over chunks in float32.
      operands: arrays of `[T]` tokens.
      coefficients: coefficients of the logit gradients, `[T]`; None for no gradients, which are then not computed.
      merge: merges statistics over the vocabulary shards; None if unsharded. The returned statistics are merged.
    """
    assert isinstance(config.teacher, TeacherConfig)
    assert operands.teacher_hidden is not None
    rows = get_distillation_rows(config.implementation, config.compute_capability)
    dtype = operands.hidden.dtype
    vocab = operands.kernel.shape[config.vocab_dim]
    blocks = Blocks.make(config, operands.head, dtype, rows.alignment)
    teacher_blocks = Blocks.make(
        config.teacher.head, operands.teacher_head, operands.teacher_hidden.dtype, rows.alignment
    )
    distillation_map = DistillationMap(
        config.logit_map(vocab),
        config.teacher.head.logit_map(vocab),
        config.teacher.beta,
        config.teacher.temperature,
        config.teacher.with_labels,
    )
    packed = PackedTokens.of(operands, forward_chunk(config, operands.labels.shape[0], vocab))

    def step(
        size: int, index: Int[Array, ""] | int, carry: tuple[Comparison, Gradients]
    ) -> tuple[Comparison, Gradients]:
        result, grads = carry
        start = index * packed.chunk
        chunk = Chunk.make(packed.slots(start, size), operands, rows.alignment)
        columns, block = blocks.block(blocks.full_span, chunk)
        teacher_columns, teacher_block = teacher_blocks.block(teacher_blocks.full_span, chunk)
        assert chunk.teacher is not None
        products = Products(
            logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter),
            logits_product(config.teacher.head, chunk.teacher, teacher_columns.kernel),
        )
        parts = (products, DistillationBlock(block, teacher_block), distillation_map)
        # One launch, unless statistics must be merged over devices between its parts, or no gradients are wanted.
        if coefficients is not None and merge is None:
            stats, divergence, logit_grads = rows.distillation_stats_and_grads(
                *parts, chunk.take(coefficients), dtype=dtype
            )
        else:
            stats = rows.distillation_stats(*parts)
            stats = stats if merge is None else merge.stats(stats)
            divergence = rows.distillation_divergence(*parts, stats)
            divergence = divergence if merge is None else merge.divergence(divergence)
            logit_grads = None
            if coefficients is not None:
                q_sum, chunk_coefficients = divergence.q_sum, chunk.take(coefficients)
                logit_grads = rows.distillation_grads(*parts, stats, q_sum, chunk_coefficients, dtype=dtype)
        if logit_grads is not None:
            grads = add_chunk(config, wanted, grads, chunk, columns, logit_grads)
        return write_stats(result, Comparison(stats, divergence.value), start), grads

    initial = (packed.empty_stats(config, operands.hidden), before_chunks(wanted, operands))
    result, grads = packed.loop(step, initial, (packed.chunk,))
    return packed.restore(result), None if coefficients is None else after_chunks(wanted, grads, operands.head)
