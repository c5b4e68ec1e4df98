"""The Triton kernels that find the segments of logit gradients that matter, copy them, and multiply by them.

A tile is `[SEGMENT, SEGMENT]` logit gradients: of adjacent tokens in adjacent columns. Its rows and its columns are the
segments. Programs are numbered tile by tile, along a block of tokens first.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Grid(NamedTuple):
    """Compile-time shape of a chunk's logit gradients.

    Attributes:
      tokens: number of tokens.
      stride: number of columns, padding among them, which has gradients of 0.
      token_blocks: number of tiles along the tokens.
      column_blocks: number of tiles along the columns.
      segment: tokens, and columns, of a tile.
    """

    tokens: int
    stride: int
    token_blocks: int
    column_blocks: int
    segment: int


@triton.jit
def _load_tile(grads_ptr, labels_ptr, limits_ptr, token_block, column_block, GRID: tl.constexpr):
    """A tile of gradients, and which of them are too large to be skipped."""
    SEGMENT: tl.constexpr = GRID.segment
    tokens = token_block * SEGMENT + tl.arange(0, SEGMENT)
    columns = column_block * SEGMENT + tl.arange(0, SEGMENT)
    is_token = tokens < GRID.tokens
    inside = is_token[:, None] & (columns < GRID.stride)[None, :]
    # 64 bits: there may be more than 2³¹ gradients.
    offsets = tokens.to(tl.int64)[:, None] * GRID.stride + columns[None, :]
    grads = tl.load(grads_ptr + offsets, mask=inside, other=0.0)
    limits = tl.load(limits_ptr + tokens, mask=is_token, other=0.0)
    labels = tl.load(labels_ptr + tokens, mask=is_token, other=-1)
    sizes = tl.abs(grads.to(tl.float32))
    # Not `>`, which is false for NaN.
    matters = (sizes <= limits[:, None]) == 0
    return grads, (matters | (columns[None, :] == labels[:, None])) & inside


@triton.jit
def _store_sums(by_token_ptr, by_column_ptr, grads, token_block, column_block, GRID: tl.constexpr):
    """Writes each token's sum of gradients, and each column's sum of their sizes."""
    SEGMENT: tl.constexpr = GRID.segment
    tokens = token_block * SEGMENT + tl.arange(0, SEGMENT)
    columns = column_block * SEGMENT + tl.arange(0, SEGMENT)
    tl.store(by_token_ptr + tokens, tl.sum(grads, axis=1), mask=tokens < GRID.tokens)
    tl.store(by_column_ptr + columns, tl.sum(tl.abs(grads), axis=0), mask=columns < GRID.stride)


@triton.jit
def count_kernel(
    grads_ptr,  # [T, V]
    labels_ptr,  # [T]
    limits_ptr,  # [T]
    of_tokens_ptr,  # [column_blocks, token_blocks], written
    of_columns_ptr,  # [token_blocks, column_blocks], written
    by_token_ptr,  # [2, column_blocks, T], written
    by_column_ptr,  # [2, token_blocks, V], written
    GRID: tl.constexpr,
):
    index = tl.program_id(0)
    token_block, column_block = index // GRID.column_blocks, index % GRID.column_blocks
    grads, matters = _load_tile(grads_ptr, labels_ptr, limits_ptr, token_block, column_block, GRID)
    matters = matters.to(tl.int32)
    token_matters = tl.max(matters, axis=1)
    column_matters = tl.max(matters, axis=0)
    tl.store(of_tokens_ptr + column_block * GRID.token_blocks + token_block, tl.sum(token_matters, axis=0))
    tl.store(of_columns_ptr + index, tl.sum(column_matters, axis=0))
    # What is skipped: first segments of tokens, then segments of columns.
    grads = grads.to(tl.float32)
    by_token_ptr += column_block * GRID.tokens
    by_column_ptr += token_block * GRID.stride
    _store_sums(
        by_token_ptr, by_column_ptr, tl.where(token_matters[:, None] == 0, grads, 0.0), token_block, column_block, GRID
    )
    by_token_ptr += GRID.column_blocks * GRID.tokens
    by_column_ptr += GRID.token_blocks * GRID.stride
    _store_sums(
        by_token_ptr, by_column_ptr, tl.where(column_matters[None, :] == 0, grads, 0.0), token_block, column_block, GRID
    )


@triton.jit
def copy_kernel(
    grads_ptr,  # [T, V]
    labels_ptr,  # [T]
    limits_ptr,  # [T]
    slots_ptr,  # [T]
    of_columns_ptr,  # [token_blocks, column_blocks]
    first_of_tokens_ptr,  # [column_blocks, token_blocks] or None
    first_of_columns_ptr,  # [token_blocks, column_blocks] or None
    token_values_ptr,  # [room for tokens' segments, SEGMENT], written, or None
    token_slots_ptr,  # [room for tokens' segments], written, or None
    column_values_ptr,  # [room for columns' segments, SEGMENT], written, or None
    columns_ptr,  # [room for columns' segments], written, or None
    TOKEN_ROOM: tl.constexpr,
    COLUMN_ROOM: tl.constexpr,
    GRID: tl.constexpr,
):
    SEGMENT: tl.constexpr = GRID.segment
    index = tl.program_id(0)
    token_block, column_block = index // GRID.column_blocks, index % GRID.column_blocks
    # Most tiles of a trained model have some segment, but those that have none need not be read again.
    if tl.load(of_columns_ptr + index) > 0:
        grads, matters = _load_tile(grads_ptr, labels_ptr, limits_ptr, token_block, column_block, GRID)
        matters = matters.to(tl.int32)
        lane = tl.arange(0, SEGMENT)
        if token_values_ptr is not None:
            has_segment = tl.max(matters, axis=1)
            first = tl.load(first_of_tokens_ptr + column_block * GRID.token_blocks + token_block)
            places = first + tl.cumsum(has_segment, axis=0) - 1
            kept = (has_segment > 0) & (places < TOKEN_ROOM)
            tokens = token_block * SEGMENT + lane
            slots = tl.load(slots_ptr + tokens, mask=tokens < GRID.tokens, other=0)
            tl.store(token_slots_ptr + places, slots, mask=kept)
            offsets = places.to(tl.int64)[:, None] * SEGMENT + lane[None, :]
            tl.store(token_values_ptr + offsets, grads, mask=kept[:, None])
        if column_values_ptr is not None:
            has_segment = tl.max(matters, axis=0)
            first = tl.load(first_of_columns_ptr + index)
            places = first + tl.cumsum(has_segment, axis=0) - 1
            kept = (has_segment > 0) & (places < COLUMN_ROOM)
            tl.store(columns_ptr + places, column_block * SEGMENT + lane, mask=kept)
            offsets = places.to(tl.int64)[None, :] * SEGMENT + lane[:, None]
            tl.store(column_values_ptr + offsets, grads, mask=kept[None, :])


class Product(NamedTuple):
    """Compile-time shape of a product of segments and rows.

    Attributes:
      lists: lists of segments, all of which are summed.
      room: segments that a list has room for.
      blocks: blocks of results.
      segment: results in a block.
      size: number of results.
      width: columns of the rows.
      transposed: whether results are columns of the output, not rows.
      lists_tile, step, columns: how many lists, segments, and columns of rows a program takes at once.
      stages: depth of the pipeline of loads.
      precision: of products in float32.
    """

    lists: int
    room: int
    blocks: int
    segment: int
    size: int
    width: int
    transposed: bool
    lists_tile: int
    step: int
    columns: int
    stages: int
    precision: str


@triton.jit
def _add_means(sums, factors_ptr, means_ptr, block, results, columns, SHAPE: tl.constexpr):
    """Adds the products of results' factors and the block's means, of each list."""
    for at in range(SHAPE.lists):
        factors = tl.load(factors_ptr + at * SHAPE.size + results, mask=results < SHAPE.size, other=0.0)
        means_ptrs = means_ptr + (at * SHAPE.blocks + block) * SHAPE.width + columns
        means = tl.load(means_ptrs, mask=columns < SHAPE.width, other=0.0)
        if SHAPE.transposed:
            sums += means[:, None] * factors[None, :]
        else:
            sums += factors[:, None] * means[None, :]
    return sums


@triton.jit
def product_kernel(
    values_ptr,  # [lists, room, SEGMENT]
    indices_ptr,  # [lists, room]
    starts_ptr,  # [lists, blocks + 1]
    rows_ptr,  # [rows, width]
    factors_ptr,  # [lists, size] or None
    means_ptr,  # [lists, blocks, width] or None
    output_ptr,  # [size, width], or [width, size] if transposed; written
    SHAPE: tl.constexpr,
):
    SEGMENT: tl.constexpr = SHAPE.segment
    STEP: tl.constexpr = SHAPE.step
    COLUMNS: tl.constexpr = SHAPE.columns
    LISTS: tl.constexpr = SHAPE.lists_tile
    # Programs of one block follow each other: they read the same segments, and other columns of the same rows.
    parts: tl.constexpr = (SHAPE.width + SHAPE.columns - 1) // SHAPE.columns
    index = tl.program_id(0)
    block = index // parts
    columns = index % parts * COLUMNS + tl.arange(0, COLUMNS)
    has_column = columns < SHAPE.width
    lane = tl.arange(0, SEGMENT)

    # The block's segments of all lists, as if they were one list: places `begin` to `end` of it are in list `number`.
    number = tl.arange(0, LISTS)
    start_ptrs = starts_ptr + number * (SHAPE.blocks + 1) + block
    first = tl.load(start_ptrs, mask=number < SHAPE.lists, other=0)
    count = tl.load(start_ptrs + 1, mask=number < SHAPE.lists, other=0) - first
    end = tl.cumsum(count, axis=0)
    begin = end - count
    shift = number * SHAPE.room + first - begin
    total = tl.sum(count, axis=0)

    if SHAPE.transposed:
        sums = tl.zeros([COLUMNS, SEGMENT], tl.float32)
    else:
        sums = tl.zeros([SEGMENT, COLUMNS], tl.float32)
    for start in tl.range(0, total, STEP, num_stages=SHAPE.stages):
        place = start + tl.arange(0, STEP)
        exists = place < total
        in_list = (place[:, None] >= begin[None, :]) & (place[:, None] < end[None, :])
        place += tl.sum(tl.where(in_list, shift[None, :], 0), axis=1)
        indices = tl.load(indices_ptr + place, mask=exists, other=0)
        offsets = place.to(tl.int64)[:, None] * SEGMENT + lane[None, :]
        values = tl.load(values_ptr + offsets, mask=exists[:, None], other=0.0)
        offsets = indices.to(tl.int64)[:, None] * SHAPE.width + columns[None, :]
        rows = tl.load(rows_ptr + offsets, mask=exists[:, None] & has_column[None, :], other=0.0)
        if SHAPE.transposed:
            sums = tl.dot(tl.trans(rows), values, sums, input_precision=SHAPE.precision)
        else:
            sums = tl.dot(tl.trans(values), rows, sums, input_precision=SHAPE.precision)

    results = block * SEGMENT + lane
    has_result = results < SHAPE.size
    if factors_ptr is not None:
        sums = _add_means(sums, factors_ptr, means_ptr, block, results, columns, SHAPE)
    sums = sums.to(output_ptr.dtype.element_ty)
    if SHAPE.transposed:
        offsets = columns.to(tl.int64)[:, None] * SHAPE.size + results[None, :]
        tl.store(output_ptr + offsets, sums, mask=has_column[:, None] & has_result[None, :])
    else:
        offsets = results.to(tl.int64)[:, None] * SHAPE.width + columns[None, :]
        tl.store(output_ptr + offsets, sums, mask=has_result[:, None] & has_column[None, :])
