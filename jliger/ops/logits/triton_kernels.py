"""The Triton kernels of the row functions: one program per row, float32 arithmetic, separate outputs.

The aim is to read each row of logits from device memory only once. The second pass, which writes the gradients, runs
over the row backwards. It starts with the columns that the first pass read last: if the rows in flight are together
larger than the L2 cache, these are the columns that the cache still holds.

`jliger.ops.logits.triton_tiles` explains tiles, and the use of NamedTuples and None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from jliger.ops.logits.triton_tiles import (
    columns_inside,
    finite,
    is_column,
    load_columns,
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
    whole_tiles,
)


class _Stats(NamedTuple):
    """Pointers to the fields of `jliger.ops.logits.RowStats`, `[T]` each; None for those not wanted."""

    max: Any
    log_sum: Any
    label_logit: Any
    prediction: Any
    weighted_sum: Any
    mean_logit: Any


class Coefficients(NamedTuple):
    """The `jliger.ops.logits.Coefficients` of one row, or pointers to those of all rows, `[T]` each."""

    probability: Any
    label: Any
    probability_lse: Any
    smoothing: Any
    probability_logit: Any


class _Factors(NamedTuple):
    """Coefficients of one row's gradients in terms of `exp(z_v − max)`, once the row's statistics are known.

    Attributes:
      exp: factor of `exp(z_v − max)`.
      exp_logit: factor of `exp(z_v − max) · (z_v − max)`, or None.
      label: subtracted in the label's column.
      smoothing: multiplied by the class weight and subtracted in every column, or None.
    """

    exp: Any
    exp_logit: Any
    label: Any
    smoothing: Any


@triton.jit
def load_coefficients(pointers, index):
    return Coefficients(
        tl.load(pointers.probability + index),
        tl.load(pointers.label + index),
        load_or_none(pointers.probability_lse, index),
        load_or_none(pointers.smoothing, index),
        load_or_none(pointers.probability_logit, index),
    )


@triton.jit
def _store_stats_of_row(stats, index, row, label, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Writes the statistics of a row, in one pass from the first column to the last; returns `max` and `log_sum`."""
    label_logit = load_label_logit(row, label, SHAPE)
    WITH_WEIGHTED_SUM: tl.constexpr = stats.weighted_sum is not None
    WITH_MEAN_LOGIT: tl.constexpr = stats.mean_logit is not None
    softmax = softmax_of_row(row, 1, False, WITH_WEIGHTED_SUM, WITH_MEAN_LOGIT, SHAPE, TILE)
    tl.store(stats.max + index, softmax.max)
    tl.store(stats.log_sum + index, softmax.log_sum)
    tl.store(stats.label_logit + index, label_logit)
    tl.store(stats.prediction + index, softmax.prediction)
    store_if_wanted(stats.weighted_sum, index, softmax.weighted_sum)
    store_if_wanted(stats.mean_logit, index, softmax.mean_logit)
    return softmax.max, softmax.log_sum


@triton.jit
def factors_of(coefficients, row_max, log_sum):
    """The factors, which are the same for all columns of a row and are computed once per row."""
    probability = coefficients.probability
    if coefficients.probability_lse is not None:
        probability += coefficients.probability_lse * (row_max + log_sum)
    per_sum = tl.exp(-log_sum)
    exp_logit = None
    if coefficients.probability_logit is not None:
        exp_logit = coefficients.probability_logit * per_sum
    return _Factors(probability * per_sum, exp_logit, coefficients.label, coefficients.smoothing)


@triton.jit
def logit_grads(row, columns, inside, row_max, factors, label, SHAPE: tl.constexpr, EVICTION: tl.constexpr):
    """Gradients by the products in some columns.

    `label` is subtracted in all of them: pass `factors.label` for the label's column, 0 for a tile.
    """
    logits, dlogit_dproduct = load_logits(row, columns, inside, SHAPE, EVICTION)
    below = logits - row_max
    factor = factors.exp
    if factors.exp_logit is not None:
        factor += factors.exp_logit * finite(below)
    grads = tl.exp(below) * factor - label
    if factors.smoothing is not None:
        if row.class_weights is not None:
            grads -= factors.smoothing * load_columns(row.class_weights + columns, inside, "")
        else:
            grads -= factors.smoothing
    return grads * dlogit_dproduct


@triton.jit
def _store_grads_of_tile(
    grads_ptr, start, row, row_max, factors, SHAPE: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr
):
    columns = tile_columns(start, TILE)  # [LANES, VECTOR]
    inside = columns_inside(columns, row, WHOLE)
    grads = logit_grads(row, columns, inside, row_max, factors, 0.0, SHAPE, "evict_first")
    store_tile(grads_ptr, columns, inside, grads, SHAPE)


@triton.jit
def _store_grads_of_row(grads_ptr, row, label, row_max, factors, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Writes the gradients of a row, in one pass from the last column to the first."""
    # Computed before the loop: the latency of its load overlaps with the loop.
    label_grad = logit_grads(row, label, is_column(label, row), row_max, factors, factors.label, SHAPE, "")
    # First the padding, and the masked remainder in the tile before it.
    whole = whole_tiles(row, TILE)
    store_padding(grads_ptr, whole + TILE.size, SHAPE, TILE)
    if whole < SHAPE.stride:
        _store_grads_of_tile(grads_ptr, whole, row, row_max, factors, SHAPE, TILE, WHOLE=False)
    for back in tl.range(TILE.size, whole + 1, TILE.size, loop_unroll_factor=TILE.unroll):
        _store_grads_of_tile(grads_ptr, whole - back, row, row_max, factors, SHAPE, TILE, WHOLE=True)
    store_label_grad(grads_ptr, row, label, label_grad)


@triton.jit
def row_stats_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V] or None
    class_weights_ptr,  # [V] or None
    labels_ptr,  # [T]
    inverse_temperature_ptr,  # [T] or None
    width_ptr,  # [] or None
    max_ptr,  # [T], written
    log_sum_ptr,  # [T], written
    label_logit_ptr,  # [T], written
    prediction_ptr,  # [T], written
    weighted_sum_ptr,  # [T], written, or None
    mean_logit_ptr,  # [T], written, or None
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    # 64 bits: index · stride exceeds 32 bits for more than 2³¹ logits.
    index = tl.program_id(0).to(tl.int64)
    row = row_at(index, product_ptr, bias_ptr, class_weights_ptr, inverse_temperature_ptr, width_ptr, SHAPE)
    stats = _Stats(max_ptr, log_sum_ptr, label_logit_ptr, prediction_ptr, weighted_sum_ptr, mean_logit_ptr)
    _store_stats_of_row(stats, index, row, tl.load(labels_ptr + index), SHAPE, TILE)


@triton.jit
def row_grads_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V] or None
    class_weights_ptr,  # [V] or None
    labels_ptr,  # [T]
    inverse_temperature_ptr,  # [T] or None
    width_ptr,  # [] or None
    max_ptr,  # [T]
    log_sum_ptr,  # [T]
    probability_ptr,  # [T]
    label_coefficient_ptr,  # [T]
    probability_lse_ptr,  # [T] or None
    smoothing_ptr,  # [T] or None
    probability_logit_ptr,  # [T] or None
    grads_ptr,  # [T, V], written
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = row_at(index, product_ptr, bias_ptr, class_weights_ptr, inverse_temperature_ptr, width_ptr, SHAPE)
    coefficients = Coefficients(
        probability_ptr, label_coefficient_ptr, probability_lse_ptr, smoothing_ptr, probability_logit_ptr
    )
    label = tl.load(labels_ptr + index)
    row_max = tl.load(max_ptr + index)
    factors = factors_of(load_coefficients(coefficients, index), row_max, tl.load(log_sum_ptr + index))
    _store_grads_of_row(grads_ptr + index * SHAPE.stride, row, label, row_max, factors, SHAPE, TILE)


@triton.jit
def row_stats_and_grads_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V] or None
    class_weights_ptr,  # [V] or None
    labels_ptr,  # [T]
    inverse_temperature_ptr,  # [T] or None
    width_ptr,  # [] or None
    probability_ptr,  # [T]
    label_coefficient_ptr,  # [T]
    probability_lse_ptr,  # [T] or None
    smoothing_ptr,  # [T] or None
    probability_logit_ptr,  # [T] or None
    max_ptr,  # [T], written
    log_sum_ptr,  # [T], written
    label_logit_ptr,  # [T], written
    prediction_ptr,  # [T], written
    weighted_sum_ptr,  # [T], written, or None
    mean_logit_ptr,  # [T], written, or None
    grads_ptr,  # [T, V], written
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = row_at(index, product_ptr, bias_ptr, class_weights_ptr, inverse_temperature_ptr, width_ptr, SHAPE)
    label = tl.load(labels_ptr + index)
    # Loaded before the first pass, so that the second pass does not wait for them.
    coefficients = Coefficients(
        probability_ptr, label_coefficient_ptr, probability_lse_ptr, smoothing_ptr, probability_logit_ptr
    )
    coefficients = load_coefficients(coefficients, index)
    stats = _Stats(max_ptr, log_sum_ptr, label_logit_ptr, prediction_ptr, weighted_sum_ptr, mean_logit_ptr)
    row_max, log_sum = _store_stats_of_row(stats, index, row, label, SHAPE, TILE)
    factors = factors_of(coefficients, row_max, log_sum)
    _store_grads_of_row(grads_ptr + index * SHAPE.stride, row, label, row_max, factors, SHAPE, TILE)
