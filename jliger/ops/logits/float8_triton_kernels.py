"""The Triton kernels that write 8-bit matrices as they are and transposed: one program per patch of the matrix.

A patch is converted once, in registers, and transposed in shared memory. Both copies are then written in whole sectors.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from jliger.ops.logits.triton_kernels import Coefficients, factors_of, load_coefficients, logit_grads
from jliger.ops.logits.triton_tiles import is_column, row_at, where_inside


class Patch(NamedTuple):
    """Compile-time shape of a patch: powers of two."""

    rows: int
    columns: int

    def count(self, rows: int, columns: int) -> int:
        """The number of patches of a matrix."""
        return -(-rows // self.rows) * -(-columns // self.columns)


@triton.jit
def _patch_at(program, NUM_ROWS: tl.constexpr, PATCH: tl.constexpr):
    """The indices `[ROWS, 1]` and `[1, COLUMNS]` of a patch, in 64 bits. Neighbours in a column follow each other."""
    ROWS: tl.constexpr = PATCH.rows
    COLUMNS: tl.constexpr = PATCH.columns
    patches_below: tl.constexpr = (NUM_ROWS + ROWS - 1) // ROWS
    rows = program % patches_below * ROWS + tl.arange(0, ROWS)[:, None]
    columns = program // patches_below * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows, columns


@triton.jit
def _store_both(ptr, transposed_ptr, rows, columns, values, NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr):
    """Writes a patch of a matrix `[NUM_ROWS, NUM_COLUMNS]`, and of its transpose."""
    inside = (rows < NUM_ROWS) & (columns < NUM_COLUMNS)
    tl.store(ptr + rows * NUM_COLUMNS + columns, values, mask=inside)
    tl.store(transposed_ptr + tl.trans(columns * NUM_ROWS + rows), tl.trans(values), mask=tl.trans(inside))


@triton.jit
def _hashed(index):
    """32 bits from an index, as `float8_xla.hashed` computes them."""
    bits = index.to(tl.uint32) * 0x9E3779B1
    bits = (bits ^ (bits >> 15)) * 0x85EBCA77
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE3D
    return bits ^ (bits >> 16)


@triton.jit
def _dithered(values, rows, columns, is_number):
    """float32 numbers with the mantissa of e5m2: rounded up or down at random, as `float8_xla.dithered` does."""
    # NaN may have all bits set: nothing is added to it.
    below = tl.where(is_number, 0x1FFFFF, 0).to(tl.uint32)
    bits = values.to(tl.uint32, bitcast=True) + ((_hashed(rows) ^ _hashed(columns)) & below)
    return (bits & 0xFFE00000).to(tl.float32, bitcast=True)


@triton.jit
def both_layouts_kernel(
    matrix_ptr,  # [M, N]
    factor_ptr,  # []
    values_ptr,  # [M, N], written
    transposed_ptr,  # [N, M], written
    NUM_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    PATCH: tl.constexpr,
):
    rows, columns = _patch_at(tl.program_id(0).to(tl.int64), NUM_ROWS, PATCH)
    inside = (rows < NUM_ROWS) & (columns < NUM_COLUMNS)
    matrix = tl.load(matrix_ptr + rows * NUM_COLUMNS + columns, mask=inside, other=0.0, eviction_policy="evict_first")
    matrix = matrix.to(tl.float32)
    # ±∞ becomes NaN: converted, it would be the largest finite number.
    matrix = tl.where(tl.abs(matrix) == float("inf"), float("nan"), matrix)
    values = (matrix * tl.load(factor_ptr)).to(tl.float8e4nv)
    _store_both(values_ptr, transposed_ptr, rows, columns, values, NUM_ROWS, NUM_COLUMNS)


@triton.jit
def row_grads_float8_kernel(
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
    transposed_ptr,  # [V, T], written
    NUM_ROWS: tl.constexpr,
    SHAPE: tl.constexpr,
    PATCH: tl.constexpr,
):
    rows, columns = _patch_at(tl.program_id(0).to(tl.int64), NUM_ROWS, PATCH)
    # What is per row is [ROWS, 1] here. Rows after the last read the last, and are not written.
    index = tl.minimum(rows, NUM_ROWS - 1)
    row = row_at(index, product_ptr, bias_ptr, class_weights_ptr, inverse_temperature_ptr, width_ptr, SHAPE)
    coefficients = load_coefficients(
        Coefficients(probability_ptr, label_coefficient_ptr, probability_lse_ptr, smoothing_ptr, probability_logit_ptr),
        index,
    )
    row_max = tl.load(max_ptr + index)
    factors = factors_of(coefficients, row_max, tl.load(log_sum_ptr + index))
    label = tl.load(labels_ptr + index)
    inside = columns < row.width
    at_label = tl.where((columns == label) & is_column(label, row), factors.label, 0.0)
    grads = logit_grads(row, columns, inside, row_max, factors, at_label, SHAPE, "evict_first")
    grads = _dithered(grads, rows, columns, factors.exp == factors.exp)
    values = where_inside(inside, grads, 0.0).to(tl.float8e5)
    _store_both(grads_ptr, transposed_ptr, rows, columns, values, NUM_ROWS, SHAPE.stride)
