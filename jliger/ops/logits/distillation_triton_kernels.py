"""The Triton kernels that compare the student's rows with the teacher's: one program per pair of rows.

Each pair is read two or three times: for the two softmaxes, for the divergence, and for the gradients. The gradients of
`KL(teacher ‖ student)` do not depend on the divergence, so its last two passes are fused. Passes alternate in
direction: each starts with the columns that the previous one read last, which are still in the cache.

`jliger.ops.logits.triton_tiles` explains tiles, and the use of NamedTuples and None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from jliger.ops.logits.triton_tiles import (
    Shape,
    Softmax,
    columns_inside,
    is_column,
    load_label_logit,
    load_logits,
    load_or_none,
    row_at,
    softmax_of_row,
    store_if_wanted,
    store_label_grad,
    store_padding,
    store_tile,
    tile_columns,
    where_inside,
    whole_tiles,
)

_TINIEST = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


class PairShape(NamedTuple):
    """Compile-time shape of a pair of rows, and the options of the divergence.

    Attributes:
      student, teacher: the shapes of the rows, which have equal stride and width.
      beta: as in `jliger.ops.logits.distillation.DistillationMap`.
      inverse_temperature: multiplies the logits.
    """

    student: Shape
    teacher: Shape
    beta: float
    inverse_temperature: float


class _Stats(NamedTuple):
    """Pointers to `jliger.ops.logits.distillation.DistillationStats`, `[T]` each; None for those not wanted."""

    student_max: Any
    student_log_sum: Any
    student_prediction: Any
    teacher_max: Any
    teacher_log_sum: Any
    teacher_prediction: Any
    label_logit: Any
    hard_log_sum: Any


class _Pair(NamedTuple):
    """A pair of rows and their softmax statistics, of which the divergence needs `max` and `log_sum`."""

    student: Any
    teacher: Any
    of_student: Any
    of_teacher: Any


class _Coefficients(NamedTuple):
    """One row's `jliger.ops.logits.distillation.DistillationCoefficients`; without labels, the last two are None."""

    soft: Any
    probability: Any
    label: Any


@triton.jit
def _compared(pair, columns, inside, SHAPE: tl.constexpr, EVICTION: tl.constexpr):
    """The student's logits in some columns, their derivative by the product, `p`, `q`, and the terms of `D`.

    `jliger.ops.logits.distillation_types` defines the last three.
    """
    logits, by_product = load_logits(pair.student, columns, inside, SHAPE.student, EVICTION)
    teacher_logits, _ = load_logits(pair.teacher, columns, inside, SHAPE.teacher, EVICTION)
    log_p = (logits - pair.of_student.max) * SHAPE.inverse_temperature - pair.of_student.log_sum
    log_r = (teacher_logits - pair.of_teacher.max) * SHAPE.inverse_temperature - pair.of_teacher.log_sum
    p, r = tl.exp(log_p), tl.exp(log_r)
    # A factor of 0 gives a term of 0, even if its logarithm is −inf. The test is `== 0`, which is false for NaN, so
    # that NaN propagates.
    if SHAPE.beta == 0:
        q = -r
        terms = tl.where(r == 0, 0.0, r * (log_r - log_p))
    elif SHAPE.beta == 1:
        q = tl.where(p == 0, 0.0, p * (log_p - log_r))
        terms = q
    else:
        m = SHAPE.beta * r + (1 - SHAPE.beta) * p
        # If m is 0, so are both factors of log m, but log m must be finite: 0 · inf is NaN.
        log_m = tl.log(tl.where(m < _TINIEST, _TINIEST, m))
        q = tl.where(p == 0, 0.0, (1 - SHAPE.beta) * p * (log_p - log_m))
        terms = q + tl.where(r == 0, 0.0, SHAPE.beta * r * (log_r - log_m))
    return logits, by_product, p, q, terms


@triton.jit
def _add_divergence_of_tile(
    lane_value,  # [LANES]
    lane_q_sum,  # [LANES]
    start,
    pair,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = tile_columns(start, TILE)
    inside = columns_inside(columns, pair.student, WHOLE)
    _, _, _, q, terms = _compared(pair, columns, inside, SHAPE, "evict_last")
    lane_value += tl.sum(where_inside(inside, terms, 0.0), axis=1)
    lane_q_sum += tl.sum(where_inside(inside, q, 0.0), axis=1)
    return lane_value, lane_q_sum


@triton.jit
def _divergence_of_rows(pair, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """`D` and `Σ_v q_v`, in one pass from the last column to the first."""
    LANES: tl.constexpr = TILE.lanes
    lane_value = tl.zeros([LANES], tl.float32)
    lane_q_sum = tl.zeros([LANES], tl.float32)
    whole = whole_tiles(pair.student, TILE)
    if whole < pair.student.width:
        lane_value, lane_q_sum = _add_divergence_of_tile(lane_value, lane_q_sum, whole, pair, SHAPE, TILE, WHOLE=False)
    for back in tl.range(TILE.size, whole + 1, TILE.size, loop_unroll_factor=TILE.unroll):
        lane_value, lane_q_sum = _add_divergence_of_tile(
            lane_value, lane_q_sum, whole - back, pair, SHAPE, TILE, WHOLE=True
        )
    return tl.sum(lane_value, axis=0), tl.sum(lane_q_sum, axis=0)


@triton.jit
def _pair_grads(pair, columns, inside, q_sum, coefficients, label, SHAPE: tl.constexpr, EVICTION: tl.constexpr):
    """Gradients by the student's products in some columns, and the terms of `D`.

    `label` is subtracted in all of them: pass `coefficients.label` for the label's column, 0 for a tile.
    """
    logits, by_product, p, q, terms = _compared(pair, columns, inside, SHAPE, EVICTION)
    grads = tl.where(coefficients.soft == 0, 0.0, coefficients.soft * (q - p * q_sum))
    if coefficients.probability is not None:
        # The cross entropy with labels is at temperature 1.
        if pair.of_student.hard_log_sum is not None:
            p = tl.exp(logits - pair.of_student.max - pair.of_student.hard_log_sum)
        grads += coefficients.probability * p - label
    return grads * by_product, terms


@triton.jit
def _store_pair_grads_of_tile(
    lane_value,  # [LANES]
    start,
    grads_ptr,
    pair,
    q_sum,
    coefficients,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = tile_columns(start, TILE)
    inside = columns_inside(columns, pair.student, WHOLE)
    grads, terms = _pair_grads(pair, columns, inside, q_sum, coefficients, 0.0, SHAPE, "evict_first")
    store_tile(grads_ptr, columns, inside, grads, SHAPE.student)
    return lane_value + tl.sum(where_inside(inside, terms, 0.0), axis=1)


@triton.jit
def _store_pair_grads_of_row(
    grads_ptr,  # [V]
    pair,
    q_sum,
    coefficients,
    label,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Writes a row's gradients in one pass; returns `D`.

    `BACKWARD` is the direction: the opposite of the previous pass's, to reuse the cache.
    """
    LANES: tl.constexpr = TILE.lanes
    lane_value = tl.zeros([LANES], tl.float32)
    # The padding, and the masked remainder in the tile before it.
    whole = whole_tiles(pair.student, TILE)
    store_padding(grads_ptr, whole + TILE.size, SHAPE.student, TILE)
    if whole < SHAPE.student.stride:
        lane_value = _store_pair_grads_of_tile(
            lane_value, whole, grads_ptr, pair, q_sum, coefficients, SHAPE, TILE, WHOLE=False
        )
    for done in tl.range(0, whole, TILE.size, loop_unroll_factor=TILE.unroll):
        if BACKWARD:
            from_start = whole - TILE.size - done
        else:
            from_start = done
        lane_value = _store_pair_grads_of_tile(
            lane_value, from_start, grads_ptr, pair, q_sum, coefficients, SHAPE, TILE, WHOLE=True
        )
    if label is not None:
        has_label = is_column(label, pair.student)
        label_grad, _ = _pair_grads(pair, label, has_label, q_sum, coefficients, coefficients.label, SHAPE, "")
        store_label_grad(grads_ptr, pair.student, label, label_grad)
    return tl.sum(lane_value, axis=0)


@triton.jit
def _load_softmax(index, max_ptr, log_sum_ptr, hard_log_sum_ptr):
    row_max, log_sum = tl.load(max_ptr + index), tl.load(log_sum_ptr + index)
    return Softmax(row_max, log_sum, load_or_none(hard_log_sum_ptr, index), None, None, None)


@triton.jit
def _store_softmax(softmax, index, max_ptr, log_sum_ptr, prediction_ptr):
    tl.store(max_ptr + index, softmax.max)
    tl.store(log_sum_ptr + index, softmax.log_sum)
    tl.store(prediction_ptr + index, softmax.prediction)


@triton.jit
def _store_stats_of_rows(stats, index, student, teacher, label, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Writes both rows' statistics, in one pass from the first column to the last; returns the pair with them."""
    label_logit = load_label_logit(student, label, SHAPE.student)
    BY: tl.constexpr = SHAPE.inverse_temperature
    WITH_HARD_SUM: tl.constexpr = stats.hard_log_sum is not None
    of_student = softmax_of_row(student, BY, WITH_HARD_SUM, False, False, SHAPE.student, TILE)
    of_teacher = softmax_of_row(teacher, BY, False, False, False, SHAPE.teacher, TILE)
    _store_softmax(of_student, index, stats.student_max, stats.student_log_sum, stats.student_prediction)
    _store_softmax(of_teacher, index, stats.teacher_max, stats.teacher_log_sum, stats.teacher_prediction)
    store_if_wanted(stats.label_logit, index, label_logit)
    store_if_wanted(stats.hard_log_sum, index, of_student.hard_log_sum)
    return _Pair(student, teacher, of_student, of_teacher)


@triton.jit
def distillation_stats_kernel(
    student_ptr,  # [T, V]
    teacher_ptr,  # [T, V]
    student_bias_ptr,  # [V] or None
    teacher_bias_ptr,  # [V] or None
    width_ptr,  # [] or None
    labels_ptr,  # [T] or None
    student_max_ptr,  # [T], written
    student_log_sum_ptr,  # [T], written
    student_prediction_ptr,  # [T], written
    teacher_max_ptr,  # [T], written
    teacher_log_sum_ptr,  # [T], written
    teacher_prediction_ptr,  # [T], written
    label_logit_ptr,  # [T], written, or None
    hard_log_sum_ptr,  # [T], written, or None
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    # 64 bits: index · stride exceeds 32 bits for more than 2³¹ logits.
    index = tl.program_id(0).to(tl.int64)
    student = row_at(index, student_ptr, student_bias_ptr, None, None, width_ptr, SHAPE.student)
    teacher = row_at(index, teacher_ptr, teacher_bias_ptr, None, None, width_ptr, SHAPE.teacher)
    stats = _Stats(
        student_max_ptr,
        student_log_sum_ptr,
        student_prediction_ptr,
        teacher_max_ptr,
        teacher_log_sum_ptr,
        teacher_prediction_ptr,
        label_logit_ptr,
        hard_log_sum_ptr,
    )
    _store_stats_of_rows(stats, index, student, teacher, load_or_none(labels_ptr, index), SHAPE, TILE)


@triton.jit
def distillation_divergence_kernel(
    student_ptr,  # [T, V]
    teacher_ptr,  # [T, V]
    student_bias_ptr,  # [V] or None
    teacher_bias_ptr,  # [V] or None
    width_ptr,  # [] or None
    student_max_ptr,  # [T]
    student_log_sum_ptr,  # [T]
    teacher_max_ptr,  # [T]
    teacher_log_sum_ptr,  # [T]
    value_ptr,  # [T], written
    q_sum_ptr,  # [T], written
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    pair = _Pair(
        row_at(index, student_ptr, student_bias_ptr, None, None, width_ptr, SHAPE.student),
        row_at(index, teacher_ptr, teacher_bias_ptr, None, None, width_ptr, SHAPE.teacher),
        _load_softmax(index, student_max_ptr, student_log_sum_ptr, None),
        _load_softmax(index, teacher_max_ptr, teacher_log_sum_ptr, None),
    )
    value, q_sum = _divergence_of_rows(pair, SHAPE, TILE)
    tl.store(value_ptr + index, value)
    tl.store(q_sum_ptr + index, q_sum)


@triton.jit
def distillation_grads_kernel(
    student_ptr,  # [T, V]
    teacher_ptr,  # [T, V]
    student_bias_ptr,  # [V] or None
    teacher_bias_ptr,  # [V] or None
    width_ptr,  # [] or None
    labels_ptr,  # [T] or None
    student_max_ptr,  # [T]
    student_log_sum_ptr,  # [T]
    hard_log_sum_ptr,  # [T] or None
    teacher_max_ptr,  # [T]
    teacher_log_sum_ptr,  # [T]
    q_sum_ptr,  # [T]
    soft_ptr,  # [T]
    probability_ptr,  # [T] or None
    label_coefficient_ptr,  # [T] or None
    grads_ptr,  # [T, V], written
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    pair = _Pair(
        row_at(index, student_ptr, student_bias_ptr, None, None, width_ptr, SHAPE.student),
        row_at(index, teacher_ptr, teacher_bias_ptr, None, None, width_ptr, SHAPE.teacher),
        _load_softmax(index, student_max_ptr, student_log_sum_ptr, hard_log_sum_ptr),
        _load_softmax(index, teacher_max_ptr, teacher_log_sum_ptr, None),
    )
    coefficients = _Coefficients(
        tl.load(soft_ptr + index), load_or_none(probability_ptr, index), load_or_none(label_coefficient_ptr, index)
    )
    q_sum, label = tl.load(q_sum_ptr + index), load_or_none(labels_ptr, index)
    grads_ptr += index * SHAPE.student.stride
    _store_pair_grads_of_row(grads_ptr, pair, q_sum, coefficients, label, SHAPE, TILE, BACKWARD=True)


@triton.jit
def distillation_stats_and_grads_kernel(
    student_ptr,  # [T, V]
    teacher_ptr,  # [T, V]
    student_bias_ptr,  # [V] or None
    teacher_bias_ptr,  # [V] or None
    width_ptr,  # [] or None
    labels_ptr,  # [T] or None
    soft_ptr,  # [T]
    probability_ptr,  # [T] or None
    label_coefficient_ptr,  # [T] or None
    student_max_ptr,  # [T], written
    student_log_sum_ptr,  # [T], written
    student_prediction_ptr,  # [T], written
    teacher_max_ptr,  # [T], written
    teacher_log_sum_ptr,  # [T], written
    teacher_prediction_ptr,  # [T], written
    label_logit_ptr,  # [T], written, or None
    hard_log_sum_ptr,  # [T], written, or None
    value_ptr,  # [T], written
    q_sum_ptr,  # [T], written
    grads_ptr,  # [T, V], written
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    student = row_at(index, student_ptr, student_bias_ptr, None, None, width_ptr, SHAPE.student)
    teacher = row_at(index, teacher_ptr, teacher_bias_ptr, None, None, width_ptr, SHAPE.teacher)
    # Loaded before the first pass, so that the last pass does not wait for them.
    label = load_or_none(labels_ptr, index)
    coefficients = _Coefficients(
        tl.load(soft_ptr + index), load_or_none(probability_ptr, index), load_or_none(label_coefficient_ptr, index)
    )
    stats = _Stats(
        student_max_ptr,
        student_log_sum_ptr,
        student_prediction_ptr,
        teacher_max_ptr,
        teacher_log_sum_ptr,
        teacher_prediction_ptr,
        label_logit_ptr,
        hard_log_sum_ptr,
    )
    pair = _store_stats_of_rows(stats, index, student, teacher, label, SHAPE, TILE)
    grads_ptr += index * SHAPE.student.stride
    if SHAPE.beta == 0:
        # KL(teacher ‖ student): Σ q = −Σ r = −1 is known, so one pass computes both the divergence and the gradients.
        q_sum = -1.0
        value = _store_pair_grads_of_row(grads_ptr, pair, q_sum, coefficients, label, SHAPE, TILE, BACKWARD=True)
    else:
        value, q_sum = _divergence_of_rows(pair, SHAPE, TILE)
        _store_pair_grads_of_row(grads_ptr, pair, q_sum, coefficients, label, SHAPE, TILE, BACKWARD=False)
    tl.store(value_ptr + index, value)
    tl.store(q_sum_ptr + index, q_sum)
