"""The fused pass for distillation from a teacher's top k: three products, of which one is the logits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.ops.linear_head.chunks.grad_accumulators import add_chunk, after_chunks, before_chunks
from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens, write_stats
from jliger.ops.linear_head.chunks.sizes import forward_chunk
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks
from jliger.ops.linear_head.types import GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import Block, LogitMap
from jliger.ops.logits.distillation_types import Comparison, DistillationCoefficients, LabelledStudent
from jliger.ops.logits.top_k_divergence import StudentSoftmax, TeacherColumns, TopKDivergence, column_logits
from jliger.ops.logits.top_k_kl import StudentRows, StudentStats, get_student_rows
from jliger.ops.logits.top_k_xla import at_columns


class StudentMerge(NamedTuple):
    """Merges over the devices that shard the vocabulary.

    Attributes:
      stats: merges statistics.
      logits: adds logits, of which each device has those of its own columns, and 0 for others.
    """

    stats: Callable[[StudentStats], StudentStats]
    logits: Callable[[Float[Array, "C K"]], Float[Array, "C K"]]


class _Student(NamedTuple):
    """A chunk's products, and what the row functions read beside them.

    Attributes:
      rows: the row functions.
      product: the products; `−inf` in the teacher's columns, if the others are compared by themselves.
      block: the arrays that belong to the logits.
      logit_map: how logits are computed.
      ids: the teacher's columns on this device; −1 for those on others.
      by_product: the derivatives of the logits in these columns by the products.
    """

    rows: StudentRows
    product: Float[Array, "C V"]
    block: Block
    logit_map: LogitMap
    ids: Int[Array, "C K"]
    by_product: Float[Array, "C K"]


def top_k_kl_pass(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    coefficients: DistillationCoefficients | None,
    start: Int[Array, ""] | int,
    merge: StudentMerge | None = None,
) -> tuple[Comparison, Gradients | None]:
    """The student's statistics and the divergence of each token, and the student's gradients.

    Args:
      config: how logits are computed, and compared.
      wanted: the dtypes of the wanted gradients. Those of the kernel and the bias are summed over chunks in float32.
      operands: arrays of `[T]` tokens.
      coefficients: coefficients of the logit gradients, `[T]`; None for no gradients, which are then not computed.
      start: this device's first column.
      merge: merges over the vocabulary shards; None if unsharded. The returned statistics are merged.
    """
    divergence = config.teacher
    assert isinstance(divergence, TopKDivergence)
    rows = get_student_rows(config.implementation, config.compute_capability)
    dtype, vocab = operands.hidden.dtype, operands.kernel.shape[config.vocab_dim]
    blocks = Blocks.make(config, operands.head, dtype, rows.alignment)
    packed = PackedTokens.of(operands, forward_chunk(config, operands.labels.shape[0], vocab))

    def step(
        size: int, index: Int[Array, ""] | int, carry: tuple[Comparison, Gradients]
    ) -> tuple[Comparison, Gradients]:
        result, grads = carry
        place = index * packed.chunk
        chunk = Chunk.make(packed.slots(place, size), operands, rows.alignment)
        columns, block = blocks.block(blocks.full_span, chunk)
        product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
        student, teacher, label_logit = _at_columns_of_teacher(
            divergence, (rows, product, block, config.logit_map(vocab)), chunk, operands, start, merge
        )
        of_chunk = None if coefficients is None else chunk.take(coefficients)
        stats, value, logit_grads = _compared(divergence, student, teacher, of_chunk, merge, dtype)
        if logit_grads is not None:
            grads = add_chunk(config, wanted, grads, chunk, columns, logit_grads)
        comparison = Comparison(LabelledStudent(stats.softmax, label_logit, stats.hard_log_sum), value)
        return write_stats(result, comparison, place), grads

    initial = (packed.empty_stats(config, operands.hidden), before_chunks(wanted, operands))
    result, grads = packed.loop(step, initial, (packed.chunk,))
    return packed.restore(result), None if coefficients is None else after_chunks(wanted, grads, operands.head)


def _at_columns_of_teacher(
    divergence: TopKDivergence,
    logits: tuple[StudentRows, Float[Array, "C V"], Block, LogitMap],
    chunk: Chunk,
    operands: Operands,
    start: Int[Array, ""] | int,
    merge: StudentMerge | None,
) -> tuple[_Student, TeacherColumns, Float[Array, " C"] | None]:
    """The student, the teacher's columns with the student's logits there, and the logit of the label."""
    rows, product, block, logit_map = logits
    assert chunk.teacher_ids is not None
    here = chunk.teacher_ids - start
    here = jnp.where((chunk.teacher_ids < 0) | (here < 0) | (here >= logit_map.width), -1, here)
    # The label's logit is one more column's.
    ids = jnp.concatenate([here, chunk.labels[:, None]], axis=1) if divergence.with_labels else here
    values, by_product = column_logits(product, block, logit_map, ids)
    if divergence.remainder:
        # The products are read before they are masked, so that XLA can mask them in place.
        product, values, by_product = jax.lax.optimization_barrier((product, values, by_product))
        if product.dtype == jnp.float16:
            # What overflowed is −∞ too, and is no column of the teacher's.
            product = jnp.maximum(product, jnp.finfo(product.dtype).min)
        product = at_columns(product, here).set(-jnp.inf, mode="drop", unique_indices=True)
    values = values if merge is None else merge.logits(values)
    k = here.shape[1]
    log_r, rest = chunk.take((operands.teacher_logprobs, operands.teacher_rest))
    log_r = jnp.where(chunk.teacher_ids < 0, -jnp.inf, log_r)
    return (
        _Student(rows, product, block, logit_map, here, by_product[:, :k]),
        TeacherColumns(chunk.teacher_ids, log_r, rest, values[:, :k]),
        values[:, k] if divergence.with_labels else None,
    )


def _compared(
    divergence: TopKDivergence,
    student: _Student,
    teacher: TeacherColumns,
    coefficients: DistillationCoefficients | None,
    merge: StudentMerge | None,
    dtype: jax.typing.DTypeLike,
) -> tuple[StudentStats, Float[Array, " C"], Float[Array, "C V"] | None]:
    """The student's statistics, the divergence, and the logit gradients, if there are coefficients."""
    student_map = divergence.student_map(student.logit_map)
    parts = student.product, student.block, student_map
    # One launch, unless statistics must be merged over devices first, or gradients need more of them.
    if coefficients is not None and merge is None and divergence.in_one_launch:
        of_rows, shares = divergence.known(teacher, coefficients)
        stats, logit_grads = student.rows.student_stats_and_grads(*parts, of_rows, student.ids, shares, dtype=dtype)
        return stats, divergence.value(StudentSoftmax(stats, None), teacher), logit_grads
    stats = student.rows.student_stats(*parts)
    stats = stats if merge is None else merge.stats(stats)
    softmax = StudentSoftmax(stats, None)
    if divergence.remainder:
        softmax = StudentSoftmax(divergence.of_all_columns(stats, teacher), stats)
    logit_grads = None
    if coefficients is not None:
        is_label = student.ids == student.block.labels[:, None]
        terms = divergence.gradients(softmax, teacher, coefficients, is_label)
        of_columns = student.ids, terms.column_grads * student.by_product
        logit_grads = student.rows.student_grads(*parts, terms.stats, terms.coefficients, *of_columns, dtype=dtype)
    return softmax.all, divergence.value(softmax, teacher), logit_grads
