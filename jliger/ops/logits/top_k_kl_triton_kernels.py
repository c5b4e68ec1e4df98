"""The Triton kernels of distillation from a teacher's top k: one program per row of the student's logits.

They are the row kernels with another softmax for the labels, and with K columns that are written last instead of one.

`jliger.ops.logits.triton_tiles` explains tiles, and the use of NamedTuples and None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from jliger.ops.logits.triton_tiles import (
    columns_inside,
    is_column,
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


class Columns(NamedTuple):
    """Compile-time number of the teacher's columns.

    Attributes:
      count: columns per row.
      places: that, rounded up to a power of two.
    """

    count: int
    places: int


class _Factors(NamedTuple):
    """Coefficients of one row's gradients in terms of exponentials relative to the maximum.

    Attributes:
      soft: factor of `exp((z_v − max) / τ)`.
      hard: factor of `exp(z_v − max)`, or None.
      label: subtracted in the label's column, or None.
    """

    soft: Any
    hard: Any
    label: Any


@triton.jit
def _factors(log_sum, hard_log_sum, soft, hard, label):
    if hard is not None:
        hard *= tl.exp(-hard_log_sum)
    return _Factors(soft * tl.exp(-log_sum), hard, label)


@triton.jit
def _grads(
    row,
    columns,
    inside,
    row_max,
    factors,
    subtracted,
    SHAPE: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Gradients by the products in some columns; `subtracted` are the shares of these columns."""
    logits, dlogit_dproduct = load_logits(row, columns, inside, SHAPE, EVICTION)
    below = logits - row_max
    grads = tl.exp(below * INVERSE_TEMPERATURE) * factors.soft - subtracted
    if factors.hard is not None:
        grads += tl.exp(below) * factors.hard
    return grads * dlogit_dproduct


@triton.jit
def _store_grads_of_tile(
    grads_ptr,
    start,
    row,
    row_max,
    factors,
    SHAPE: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = tile_columns(start, TILE)  # [LANES, VECTOR]
    inside = columns_inside(columns, row, WHOLE)
    grads = _grads(row, columns, inside, row_max, factors, 0.0, SHAPE, INVERSE_TEMPERATURE, "evict_first")
    store_tile(grads_ptr, columns, inside, grads, SHAPE)


@triton.jit
def _store_grads_of_row(
    grads_ptr,  # [V]
    row,
    label,
    row_max,
    factors,
    ids,  # [PLACES]
    column_grads,  # [PLACES]
    SHAPE: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the gradients of a row, in one pass from the last column to the first; the teacher's columns last."""
    if label is not None:
        # Computed before the loop: the latency of its load overlaps with the loop.
        has_label = is_column(label, row)
        label_grad = _grads(row, label, has_label, row_max, factors, factors.label, SHAPE, INVERSE_TEMPERATURE, "")
    # First the padding, and the masked remainder in the tile before it.
    whole = whole_tiles(row, TILE)
    store_padding(grads_ptr, whole + TILE.size, SHAPE, TILE)
    if whole < SHAPE.stride:
        _store_grads_of_tile(grads_ptr, whole, row, row_max, factors, SHAPE, INVERSE_TEMPERATURE, TILE, WHOLE=False)
    for back in tl.range(TILE.size, whole + 1, TILE.size, loop_unroll_factor=TILE.unroll):
        _store_grads_of_tile(
            grads_ptr, whole - back, row, row_max, factors, SHAPE, INVERSE_TEMPERATURE, TILE, WHOLE=True
        )
    if label is not None:
        store_label_grad(grads_ptr, row, label, label_grad)
    # Overwrites, as `store_label_grad` does; the label's column, too, if the teacher names it.
    store_label_grad(grads_ptr, row, ids, column_grads)


@triton.jit
def _load_ids(ids_ptr, index, COLUMNS: tl.constexpr):
    """The teacher's columns of a row, and the offsets of what belongs to them."""
    places = tl.arange(0, COLUMNS.places)
    offsets = index * COLUMNS.count + places
    return tl.load(ids_ptr + offsets, mask=places < COLUMNS.count, other=-1), offsets


@triton.jit
def _store_stats_of_row(
    index,
    row,
    max_ptr,
    log_sum_ptr,
    prediction_ptr,
    hard_log_sum_ptr,
    SHAPE: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    TILE: tl.constexpr,
):
    WITH_HARD_SUM: tl.constexpr = hard_log_sum_ptr is not None
    softmax = softmax_of_row(row, INVERSE_TEMPERATURE, WITH_HARD_SUM, False, False, SHAPE, TILE)
    tl.store(max_ptr + index, softmax.max)
    tl.store(log_sum_ptr + index, softmax.log_sum)
    tl.store(prediction_ptr + index, softmax.prediction)
    store_if_wanted(hard_log_sum_ptr, index, softmax.hard_log_sum)
    return softmax.max, softmax.log_sum, softmax.hard_log_sum


@triton.jit
def student_stats_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V] or None
    width_ptr,  # [] or None
    max_ptr,  # [T], written
    log_sum_ptr,  # [T], written
    prediction_ptr,  # [T], written
    hard_log_sum_ptr,  # [T], written, or None
    SHAPE: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    TILE: tl.constexpr,
):
    # 64 bits: index · stride exceeds 32 bits for more than 2³¹ logits.
    index = tl.program_id(0).to(tl.int64)
    row = row_at(index, product_ptr, bias_ptr, None, None, width_ptr, SHAPE)
    _store_stats_of_row(
        index, row, max_ptr, log_sum_ptr, prediction_ptr, hard_log_sum_ptr, SHAPE, INVERSE_TEMPERATURE, TILE
    )


@triton.jit
def student_grads_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V] or None
    width_ptr,  # [] or None
    labels_ptr,  # [T] or None
    max_ptr,  # [T]
    log_sum_ptr,  # [T]
    hard_log_sum_ptr,  # [T] or None
    soft_ptr,  # [T]
    hard_ptr,  # [T] or None
    label_coefficient_ptr,  # [T] or None
    ids_ptr,  # [T, K]
    column_grads_ptr,  # [T, K]
    grads_ptr,  # [T, V], written
    SHAPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = row_at(index, product_ptr, bias_ptr, None, None, width_ptr, SHAPE)
    ids, offsets = _load_ids(ids_ptr, index, COLUMNS)
    column_grads = tl.load(column_grads_ptr + offsets, mask=is_column(ids, row), other=0.0)
    factors = _factors(
        tl.load(log_sum_ptr + index),
        load_or_none(hard_log_sum_ptr, index),
        tl.load(soft_ptr + index),
        load_or_none(hard_ptr, index),
        load_or_none(label_coefficient_ptr, index),
    )
    row_max, label = tl.load(max_ptr + index), load_or_none(labels_ptr, index)
    grads_ptr += index * SHAPE.stride
    _store_grads_of_row(grads_ptr, row, label, row_max, factors, ids, column_grads, SHAPE, INVERSE_TEMPERATURE, TILE)


@triton.jit
def student_stats_and_grads_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V] or None
    width_ptr,  # [] or None
    labels_ptr,  # [T] or None
    soft_ptr,  # [T]
    hard_ptr,  # [T] or None
    label_coefficient_ptr,  # [T] or None
    ids_ptr,  # [T, K]
    shares_ptr,  # [T, K]
    max_ptr,  # [T], written
    log_sum_ptr,  # [T], written
    prediction_ptr,  # [T], written
    hard_log_sum_ptr,  # [T], written, or None
    grads_ptr,  # [T, V], written
    SHAPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = row_at(index, product_ptr, bias_ptr, None, None, width_ptr, SHAPE)
    # Loaded before the first pass, so that the second pass does not wait for them.
    ids, offsets = _load_ids(ids_ptr, index, COLUMNS)
    has_column = is_column(ids, row)
    shares = tl.load(shares_ptr + offsets, mask=has_column, other=0.0)
    soft, hard = tl.load(soft_ptr + index), load_or_none(hard_ptr, index)
    label, label_coefficient = load_or_none(labels_ptr, index), load_or_none(label_coefficient_ptr, index)
    row_max, log_sum, hard_log_sum = _store_stats_of_row(
        index, row, max_ptr, log_sum_ptr, prediction_ptr, hard_log_sum_ptr, SHAPE, INVERSE_TEMPERATURE, TILE
    )
    factors = _factors(log_sum, hard_log_sum, soft, hard, label_coefficient)
    if label is not None:
        shares += tl.where(ids == label, label_coefficient, 0.0)
    column_grads = _grads(row, ids, has_column, row_max, factors, shares, SHAPE, INVERSE_TEMPERATURE, "")
    grads_ptr += index * SHAPE.stride
    _store_grads_of_row(grads_ptr, row, label, row_max, factors, ids, column_grads, SHAPE, INVERSE_TEMPERATURE, TILE)
