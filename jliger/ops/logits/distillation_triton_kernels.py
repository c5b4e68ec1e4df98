"""The Triton kernels that compare a student's rows with a teacher's: one program for each pair of rows.

A pair is gone through twice or three times: for the two softmaxes, for the divergence, and for the gradients; of
`KL(teacher ‖ student)` the gradients need no divergence, and the last two are one. Each time it is gone through in the
other direction, so that what was read last, and is still in the cache, is read first.

Tiles, and what NamedTuples and None stand for, are in `jliger.ops.logits.triton_tiles`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from jliger.ops.logits.triton_tiles import (
    Row,
    Shape,
    Softmax,
    columns_inside,
    is_column,
    load_label_logit,
    load_logits,
    load_or_none,
    softmax_of_row,
    store_if_wanted,
    store_label_grad,
    store_tile,
    tile_columns,
    where_inside,
)

_TINIEST = tl.constexpr(1.1754943508222875e-38)


class PairShape(NamedTuple):
    """Compile-time shape of a pair, and what its rows are compared by.

    Attributes:
      student, teacher: of equal stride and width.
      beta: as in `jliger.ops.logits.distillation.DistillationMap`.
      inverse_temperature: what logits are multiplied with.
    """

    student: Shape
    teacher: Shape
    beta: float
    inverse_temperature: float


class _Stats(NamedTuple):
    """Pointers to `jliger.ops.logits.distillation.DistillationStats`, `[T]` each, those that are not wanted None."""

    student_max: Any
    student_log_sum: Any
    student_prediction: Any
    teacher_max: Any
    teacher_log_sum: Any
    teacher_prediction: Any
    label_logit: Any
    hard_log_sum: Any


class _Pair(NamedTuple):
    """A pair of rows, and what is known of their softmaxes, of which the divergence asks for `max` and `log_sum`."""

    student: Any
    teacher: Any
    of_student: Any
    of_teacher: Any


class _Coefficients(NamedTuple):
    """A row's `jliger.ops.logits.distillation.DistillationCoefficients`; those of labels are None without labels."""

    soft: Any
    probability: Any
    label: Any


@triton.jit
def _compared(pair, columns, inside, SHAPE: tl.constexpr, EVICTION: tl.constexpr):
    """The student's logits in some columns and their derivative by the product; `p`, `q` and the terms of `D`.

    The last three as `jliger.ops.logits.distillation_types` has them.
    """
    logits, by_product = load_logits(pair.student, columns, inside, SHAPE.student, EVICTION)
    teacher_logits, _ = load_logits(pair.teacher, columns, inside, SHAPE.teacher, EVICTION)
    log_p = (logits - pair.of_student.max) * SHAPE.inverse_temperature - pair.of_student.log_sum
    log_r = (teacher_logits - pair.of_teacher.max) * SHAPE.inverse_temperature - pair.of_teacher.log_sum
    p, r = tl.exp(log_p), tl.exp(log_r)
    # Zeros are told by comparing with 0, which is false for NaN: what is not a number stays one.
    if SHAPE.beta == 0:
        q = -r
        terms = tl.where(r == 0, 0.0, r * (log_r - log_p))
    elif SHAPE.beta == 1:
        q = tl.where(p == 0, 0.0, p * (log_p - log_r))
        terms = q
    else:
        m = SHAPE.beta * r + (1 - SHAPE.beta) * p
        # Where `m` is 0 so are both factors of its logarithm, which has to be a number all the same.
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
    inside = columns_inside(columns, SHAPE.student, WHOLE)
    _, _, _, q, terms = _compared(pair, columns, inside, SHAPE, "evict_last")
    lane_value += tl.sum(where_inside(inside, terms, 0.0), axis=1)
    lane_q_sum += tl.sum(where_inside(inside, q, 0.0), axis=1)
    return lane_value, lane_q_sum


@triton.jit
def _divergence_of_rows(pair, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """`D` and `Σ_v q_v`; one pass, from the last column to the first."""
    LANES: tl.constexpr = TILE.lanes
    lane_value = tl.zeros([LANES], tl.float32)
    lane_q_sum = tl.zeros([LANES], tl.float32)
    if TILE.whole < SHAPE.student.width:
        lane_value, lane_q_sum = _add_divergence_of_tile(
            lane_value, lane_q_sum, TILE.whole, pair, SHAPE, TILE, WHOLE=False
        )
    for back in tl.range(TILE.size, TILE.whole + 1, TILE.size, loop_unroll_factor=TILE.unroll):
        lane_value, lane_q_sum = _add_divergence_of_tile(
            lane_value, lane_q_sum, TILE.whole - back, pair, SHAPE, TILE, WHOLE=True
        )
    return tl.sum(lane_value, axis=0), tl.sum(lane_q_sum, axis=0)


@triton.jit
def _pair_grads(pair, columns, inside, q_sum, coefficients, label, SHAPE: tl.constexpr, EVICTION: tl.constexpr):
    """Gradients by the student's products in some columns, and the terms of `D`.

    All of the columns are the label's, with `label` its coefficient, or none, with 0.
    """
    logits, by_product, p, q, terms = _compared(pair, columns, inside, SHAPE, EVICTION)
    grads = tl.where(coefficients.soft == 0, 0.0, coefficients.soft * (q - p * q_sum))
    if coefficients.probability is not None:
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
    inside = columns_inside(columns, SHAPE.student, WHOLE)
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
    """Writes a row's gradients in one pass, in either direction; returns `D`."""
    LANES: tl.constexpr = TILE.lanes
    lane_value = tl.zeros([LANES], tl.float32)
    # What is left of the row, and its padding, which may go on for longer than a tile.
    for start in tl.static_range(TILE.whole, SHAPE.student.stride, TILE.size):
        lane_value = _store_pair_grads_of_tile(
            lane_value, start, grads_ptr, pair, q_sum, coefficients, SHAPE, TILE, WHOLE=False
        )
    for done in tl.range(0, TILE.whole, TILE.size, loop_unroll_factor=TILE.unroll):
        if BACKWARD:
            from_start = TILE.whole - TILE.size - done
        else:
            from_start = done
        lane_value = _store_pair_grads_of_tile(
            lane_value, from_start, grads_ptr, pair, q_sum, coefficients, SHAPE, TILE, WHOLE=True
        )
    if label is not None:
        has_label = is_column(label, SHAPE.student)
        label_grad, _ = _pair_grads(pair, label, has_label, q_sum, coefficients, coefficients.label, SHAPE, "")
        store_label_grad(grads_ptr, label, label_grad, SHAPE.student)
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
    """One pass over each row, from its first column to its last; returns the pair that is then known."""
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
    # 64 bits, for a row may start beyond what 32 count.
    index = tl.program_id(0).to(tl.int64)
    student = Row(student_ptr + index * SHAPE.student.stride, student_bias_ptr, None)
    teacher = Row(teacher_ptr + index * SHAPE.teacher.stride, teacher_bias_ptr, None)
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
        Row(student_ptr + index * SHAPE.student.stride, student_bias_ptr, None),
        Row(teacher_ptr + index * SHAPE.teacher.stride, teacher_bias_ptr, None),
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
        Row(student_ptr + index * SHAPE.student.stride, student_bias_ptr, None),
        Row(teacher_ptr + index * SHAPE.teacher.stride, teacher_bias_ptr, None),
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
    student = Row(student_ptr + index * SHAPE.student.stride, student_bias_ptr, None)
    teacher = Row(teacher_ptr + index * SHAPE.teacher.stride, teacher_bias_ptr, None)
    # Loaded first, so that the last pass need not wait for them.
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
        q_sum = -1.0
        value = _store_pair_grads_of_row(grads_ptr, pair, q_sum, coefficients, label, SHAPE, TILE, BACKWARD=True)
    else:
        value, q_sum = _divergence_of_rows(pair, SHAPE, TILE)
        _store_pair_grads_of_row(grads_ptr, pair, q_sum, coefficients, label, SHAPE, TILE, BACKWARD=False)
    tl.store(value_ptr + index, value)
    tl.store(q_sum_ptr + index, q_sum)
