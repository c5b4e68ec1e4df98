"""The Triton kernels that select the largest logits of each row: one program per row.

`jliger.ops.logits.triton_tiles` explains tiles, and the use of NamedTuples and None.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from jliger.ops.logits.triton_tiles import columns_inside, load_logits, row_at, tile_columns, whole_tiles


class Selection(NamedTuple):
    """Compile-time sizes of a selection.

    Attributes:
      k: how many to select.
      size: how many there are to select from: a power of two, at least `k`.
      index_bits: the logarithm of `size`.
      group: columns per group.
      num_groups: the number of groups.
    """

    k: int
    size: int
    index_bits: int
    group: int
    num_groups: int

    @classmethod
    def make(cls, k: int, least: int, group: int, num_groups: int) -> "Selection":
        size = triton.next_power_of_2(max(k, least))
        return cls(k, size, size.bit_length() - 1, group, num_groups)

    @property
    def num_warps(self) -> int:
        """Warps per program: 16 keys of 64 bits per thread, if they fit."""
        return max(4, min(32, self.size // 512))


@triton.jit
def _places_of_largest(values, exists, SELECT: tl.constexpr):
    """The place of each of the `k` largest values among these, in the order of their indices; `k` for all others.

    Of equal values, the first are selected, and values that do not exist only after all others. NaN comes first.

    Each value and its index become a key of its own, and the k-th largest key is found bit by bit, by counting.
    """
    # The bits of a float as an integer, with those of negative numbers but the sign inverted, are in the floats' order.
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # 0 and −0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(values != values, 0x7FFFFFFF, ordered)
    ordered = tl.where(exists, ordered, -0x80000000).to(tl.int64)
    keys = (ordered << SELECT.index_bits) | (SELECT.size - 1 - tl.arange(0, SELECT.size)).to(tl.int64)
    step = tl.full([], 1, tl.int64) << (31 + SELECT.index_bits)
    threshold = -step
    for _ in tl.range(0, 32 + SELECT.index_bits):
        count = tl.sum((keys >= threshold + step).to(tl.int32), axis=0)
        threshold = tl.where(count >= SELECT.k, threshold + step, threshold)
        step = step >> 1
    selected = keys >= threshold
    places = tl.cumsum(selected.to(tl.int32), axis=0) - 1
    return tl.where(selected, places, SELECT.k)


@triton.jit
def _store_maxima_of_tile(
    maxima_ptr, start, row, num_groups, SHAPE: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr
):
    columns = tile_columns(start, TILE)  # [LANES, VECTOR]: each lane has one group
    inside = columns_inside(columns, row, WHOLE)
    logits, _ = load_logits(row, columns, inside, SHAPE, "evict_last")
    if inside is not None:
        logits = tl.where(inside, logits, float("-inf"))
    # A maximum skips NaN, which comes first.
    logits = tl.where(logits != logits, float("inf"), logits)
    groups = start // TILE.vector + tl.arange(0, TILE.lanes)
    tl.store(maxima_ptr + groups, tl.max(logits, axis=1), mask=groups < num_groups)


@triton.jit
def group_maxima_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V] or None
    inverse_temperature_ptr,  # [T] or None
    width_ptr,  # [] or None
    maxima_ptr,  # [T, G], written
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    # 64 bits: index · stride exceeds 32 bits for more than 2³¹ logits.
    index = tl.program_id(0).to(tl.int64)
    row = row_at(index, product_ptr, bias_ptr, None, inverse_temperature_ptr, width_ptr, SHAPE)
    num_groups = (SHAPE.width + TILE.vector - 1) // TILE.vector
    maxima_ptr += index * num_groups
    whole = whole_tiles(row, TILE)
    for start in tl.range(0, whole, TILE.size, loop_unroll_factor=TILE.unroll):
        _store_maxima_of_tile(maxima_ptr, start, row, num_groups, SHAPE, TILE, WHOLE=True)
    # Groups without a column, if there are fewer at run time, are written too.
    for start in tl.range(whole, SHAPE.width, TILE.size):
        _store_maxima_of_tile(maxima_ptr, start, row, num_groups, SHAPE, TILE, WHOLE=False)


@triton.jit
def select_groups_kernel(
    maxima_ptr,  # [T, G]
    groups_ptr,  # [T, k], written
    SELECT: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, SELECT.size)
    exists = groups < SELECT.num_groups
    maxima = tl.load(maxima_ptr + index * SELECT.num_groups + groups, mask=exists, other=0.0)
    places = _places_of_largest(maxima, exists, SELECT)
    tl.store(groups_ptr + index * SELECT.k + places, groups, mask=places < SELECT.k)


@triton.jit
def select_columns_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V] or None
    inverse_temperature_ptr,  # [T] or None
    width_ptr,  # [] or None
    groups_ptr,  # [T, k]
    ids_ptr,  # [T, k], written
    logits_ptr,  # [T, k], written
    SHAPE: tl.constexpr,
    SELECT: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = row_at(index, product_ptr, bias_ptr, None, inverse_temperature_ptr, width_ptr, SHAPE)
    candidates = tl.arange(0, SELECT.size)
    place = candidates // SELECT.group
    exists = place < SELECT.k
    group = tl.load(groups_ptr + index * SELECT.k + place, mask=exists, other=0)
    # If there are fewer than k groups, the others begin after the last column.
    columns = group * SELECT.group + candidates % SELECT.group
    exists = exists & (group < SELECT.num_groups) & columns_inside(columns, row, WHOLE=False)
    logits, _ = load_logits(row, columns, exists, SHAPE, "")
    # Groups are in the order of their ids, so that indices are in the order of columns.
    places = _places_of_largest(logits, exists, SELECT)
    ids_ptr += index * SELECT.k
    logits_ptr += index * SELECT.k
    tl.store(ids_ptr + places, tl.where(exists, columns, 0x7FFFFFFF), mask=places < SELECT.k)
    tl.store(logits_ptr + places, tl.where(exists, logits, float("-inf")), mask=places < SELECT.k)
