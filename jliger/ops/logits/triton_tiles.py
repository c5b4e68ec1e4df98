"""Functions shared by all row kernels: tiles of a row, the computation of logits, and the softmax of a row.

Each program processes one row, tile by tile. A tile is `[LANES, VECTOR]` columns. A lane is one thread; its vector is
contiguous, so that one instruction loads it and the thread reduces it without communication. Whole tiles have no mask:
a mask takes instructions, and if it can end within a vector, every column needs its own load. The remainder of the row
is a separate, masked tile outside the loop.

Compile-time arguments are NamedTuples with names in upper case. An array that a call does not read or write is None;
the code that uses it is then not compiled.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32

_VECTOR = 8  # logits that a thread takes at once by default: one 128-bit load of bfloat16


class Tile(NamedTuple):
    """Compile-time shape of a tile.

    Attributes:
      lanes: number of threads.
      vector: columns per thread.
      size: columns per tile.
      unroll: the unroll factor of loops over tiles.
    """

    lanes: int
    vector: int
    size: int
    unroll: int

    @classmethod
    def make(cls, width: int, most_warps: int, unroll: int, vector: int = _VECTOR) -> "Tile":
        """The tile for rows of `width` columns. A short row gets fewer warps."""
        lanes = max(32, min(32 * most_warps, triton.next_power_of_2(width) // vector))
        return cls(lanes, vector, lanes * vector, unroll)


class Shape(NamedTuple):
    """Compile-time shape of a row, and the map from products to logits.

    Attributes:
      stride: distance between rows, in columns.
      width: number of vocabulary columns, unless an operand says how many there are (`Block.width`). Columns from there
        to `stride` are padding; gradients there are 0.
      scale, softcap, masked: as in `jliger.ops.logits.LogitMap`.
    """

    stride: int
    width: int
    scale: float
    softcap: float | None
    masked: bool = False


class Row(NamedTuple):
    """Pointers to one row's arrays, `[V]` each, and its inverse temperature; None for what the call does not have.

    `width` is the number of columns. Where it is known at compile time, it is a constexpr, and so is all that follows
    from it.
    """

    width: Any
    product: Any
    bias: Any
    class_weights: Any
    inverse_temperature: Any = None


class Softmax(NamedTuple):
    """The statistics of one row at temperature `τ`; None for those not wanted.

    Attributes:
      max: `max_v z_v`.
      log_sum: `log Σ_v exp((z_v − max) / τ)`.
      hard_log_sum: `log Σ_v exp(z_v − max)`, at temperature 1, or None.
      weighted_sum: `Σ_v u_v · z_v`, or None.
      mean_logit: the mean of `z_v − max` weighted by `exp(z_v − max)`, or None. Requires `τ = 1`.
      prediction: the first column that has the maximum.
    """

    max: Any
    log_sum: Any
    hard_log_sum: Any
    weighted_sum: Any
    mean_logit: Any
    prediction: Any


class _Lanes(NamedTuple):
    """Running softmax statistics, separate for each lane, `[LANES]` each; None for those not wanted.

    Attributes:
      max: the largest logit.
      start: the first column of the tile that contains it.
      sum: `Σ exp((z − max) / τ)`.
      hard_sum: `Σ exp(z − max)`.
      weighted_sum: `Σ u · z`.
      logit_sum: `Σ exp(z − max) · (z − max)`.
    """

    max: Any
    start: Any
    sum: Any
    hard_sum: Any
    weighted_sum: Any
    logit_sum: Any


@triton.jit
def load_or_none(pointer, index):
    """The element at `index` of an array, or None if the array is None."""
    if pointer is not None:
        value = tl.load(pointer + index)
    else:
        value = None
    return value


@triton.jit
def store_if_wanted(pointer, index, value):
    """Writes `value` at `index` of an array, unless the array is None."""
    if pointer is not None:
        tl.store(pointer + index, value)


@triton.jit
def row_at(index, product_ptr, bias_ptr, class_weights_ptr, inverse_temperature_ptr, width_ptr, SHAPE: tl.constexpr):
    """The row with this index, from the pointers to the arrays of all rows."""
    if width_ptr is not None:
        width = tl.load(width_ptr)
    else:
        width = SHAPE.width
    inverse_temperature = load_or_none(inverse_temperature_ptr, index)
    return Row(width, product_ptr + index * SHAPE.stride, bias_ptr, class_weights_ptr, inverse_temperature)


@triton.jit
def whole_tiles(row, TILE: tl.constexpr):
    """The number of columns of a row that whole tiles cover; the rest is less than one tile."""
    return row.width // TILE.size * TILE.size


@triton.jit
def tile_columns(start, TILE: tl.constexpr):
    """The column indices of a tile, `[LANES, VECTOR]`."""
    LANES: tl.constexpr = TILE.lanes
    VECTOR: tl.constexpr = TILE.vector
    return start + (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])


@triton.jit
def columns_inside(columns, row, WHOLE: tl.constexpr):
    """A mask of the columns that exist; None for a whole tile, so that loads and stores have no mask."""
    if WHOLE:
        inside = None
    else:
        inside = columns < row.width
    return inside


@triton.jit
def where_inside(inside, values, otherwise):
    """`values` where the mask of `columns_inside` is true, `otherwise` elsewhere."""
    if inside is not None:
        values = tl.where(inside, values, otherwise)
    return values


@triton.jit
def load_columns(pointers, inside, EVICTION: tl.constexpr):
    """Loads values, with 0 where `inside` is false.

    `EVICTION` is `"evict_last"` for data that a later pass reads again, `"evict_first"` for data in its last pass, and
    `""` for data shared by all rows.
    """
    if inside is None:
        values = tl.load(pointers, eviction_policy=EVICTION)
    else:
        values = tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION)
    return values


@triton.jit
def _tanh(x):
    # Cephes' tanhf: a polynomial for small x, where 1 − exp(−2|x|) would lose digits by cancellation.
    size = tl.abs(x)
    decay = tl.exp(-2 * size)
    far = (1 - decay) / (1 + decay)
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def load_logits(row, columns, inside, SHAPE: tl.constexpr, EVICTION: tl.constexpr):
    """The logits of some columns in float32, and their derivative by the product."""
    product = load_columns(row.product + columns, inside, EVICTION).to(tl.float32)
    logits = product
    if row.bias is not None:
        logits += load_columns(row.bias + columns, inside, "")
    logits *= SHAPE.scale
    dlogit_dproduct = SHAPE.scale
    if SHAPE.softcap is not None:
        tanh = _tanh(logits / SHAPE.softcap)
        logits = SHAPE.softcap * tanh
        dlogit_dproduct = SHAPE.scale * (1 - tanh * tanh)
    if row.inverse_temperature is not None:
        logits *= row.inverse_temperature
        dlogit_dproduct *= row.inverse_temperature
    if SHAPE.masked:
        logits = tl.where(product == float("-inf"), product, logits)
    return logits, dlogit_dproduct


@triton.jit
def is_column(label, row):
    """Whether a label is a column of this row."""
    return columns_inside(label, row, WHOLE=False) & (label >= 0)


@triton.jit
def load_label_logit(row, label, SHAPE: tl.constexpr):
    """The label's logit, 0 if the label is not in this block; None without labels.

    Called before the loop over the row: the load's latency then overlaps with the loop.
    """
    if label is not None:
        has_label = is_column(label, row)
        logit, _ = load_logits(row, label, has_label, SHAPE, "")
        label_logit = tl.where(has_label, logit, 0.0)
    else:
        label_logit = None
    return label_logit


@triton.jit
def store_tile(row_ptr, columns, inside, values, SHAPE: tl.constexpr):
    """Writes a tile of gradients, with zeros in the padding."""
    values = where_inside(inside, values, 0.0).to(row_ptr.dtype.element_ty)
    # Streaming stores (.cs): this kernel does not read the gradients, so they should not evict logits from the cache.
    if inside is None:
        tl.store(row_ptr + columns, values, cache_modifier=".cs")
    else:
        tl.store(row_ptr + columns, values, mask=columns < SHAPE.stride, cache_modifier=".cs")


@triton.jit
def store_padding(row_ptr, start, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Writes zeros from the column `start` to the end of the row."""
    for padding in tl.range(start, SHAPE.stride, TILE.size):
        columns = tile_columns(padding, TILE)
        zeros = tl.zeros([TILE.lanes, TILE.vector], row_ptr.dtype.element_ty)
        tl.store(row_ptr + columns, zeros, mask=columns < SHAPE.stride, cache_modifier=".cs")


@triton.jit
def store_label_grad(row_ptr, row, label, grad):
    """Overwrites the gradient in the label's column, which is cheaper than to compare columns with it in every tile."""
    # Another thread of this program wrote the same address before. The barrier orders this store after that one.
    tl.debug_barrier()
    tl.store(row_ptr + label, grad.to(row_ptr.dtype.element_ty), mask=is_column(label, row))


@triton.jit
def finite(below):
    """`z − max`, clipped from below where its exponential is 0, for use in `exp(z − max) · (z − max)`.

    Without clipping, z = −inf gives 0 · inf = NaN. The bound is small, so that its product with a large coefficient
    does not overflow.
    """
    return tl.maximum(below, -1024.0)


@triton.jit
def _shift_to_new_max(logit_sum, sum_exp, step):
    """`Σ exp(z − m) · (z − m')` from `Σ exp(z − m) · (z − m)`, where `m' = m − step` is the new maximum."""
    return logit_sum + finite(step) * sum_exp


@triton.jit
def _add_tile(
    lanes, start, row, INVERSE_TEMPERATURE: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr
):
    """Adds one vector to each lane's statistics: the online softmax, which rescales the sums at a new maximum."""
    columns = tile_columns(start, TILE)  # [LANES, VECTOR], as is every array below that is not reduced
    inside = columns_inside(columns, row, WHOLE)
    logits, _ = load_logits(row, columns, inside, SHAPE, "evict_last")
    hard_sum, weighted_sum, logit_sum = lanes.hard_sum, lanes.weighted_sum, lanes.logit_sum
    if weighted_sum is not None:
        terms = logits
        if row.class_weights is not None:
            terms *= load_columns(row.class_weights + columns, inside, "")
        weighted_sum += tl.sum(where_inside(inside, terms, 0.0), axis=1)
    logits = where_inside(inside, logits, float("-inf"))
    tile_max = tl.max(logits, axis=1)  # [LANES]
    new_max = tl.maximum(lanes.max, tile_max)
    # Rescales the sums from the old maximum to the new one. `step` is at most 0, so nothing overflows.
    step = lanes.max - new_max
    below = logits - new_max[:, None]
    exp = tl.exp(below * INVERSE_TEMPERATURE)
    if logit_sum is not None:
        logit_sum = _shift_to_new_max(logit_sum, lanes.sum, step) * tl.exp(step) + tl.sum(exp * finite(below), axis=1)
    if hard_sum is not None:
        hard_sum = hard_sum * tl.exp(step) + tl.sum(tl.exp(below), axis=1)
    sum_exp = lanes.sum * tl.exp(step * INVERSE_TEMPERATURE) + tl.sum(exp, axis=1)
    # Strictly greater: of equal maxima, the first tile is kept.
    new_start = tl.where(tile_max > lanes.max, start, lanes.start)
    return _Lanes(new_max, new_start, sum_exp, hard_sum, weighted_sum, logit_sum)


@triton.jit
def _first_of_max(row, row_max, lanes, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """The first column whose logit is `row_max`.

    Each lane has kept the tile of its maximum, which determines the vector. Of the lanes with the row's maximum, the
    one with the first vector is chosen, and its 8 columns are read again. To track columns instead of tiles would take
    a comparison per column in every tile.
    """
    LANES: tl.constexpr = TILE.lanes
    VECTOR: tl.constexpr = TILE.vector
    vectors = tl.where(lanes.max == row_max, lanes.start + tl.arange(0, LANES) * VECTOR, row.width)
    columns = tl.min(vectors, axis=0) + tl.arange(0, VECTOR)
    inside = columns_inside(columns, row, WHOLE=False)
    logits, _ = load_logits(row, columns, inside, SHAPE, "evict_last")
    # In a row with NaN no logit equals the maximum; the prediction is then the last column, so that it stays in range.
    return tl.min(tl.where(inside & (logits == row_max), columns, row.width - 1), axis=0)


@triton.jit
def softmax_of_row(
    row,
    INVERSE_TEMPERATURE: tl.constexpr,
    WITH_HARD_SUM: tl.constexpr,
    WITH_WEIGHTED_SUM: tl.constexpr,
    WITH_MEAN_LOGIT: tl.constexpr,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The statistics of a row, in one pass from the first column to the last."""
    # Each lane has its own maximum and sums, so the loop needs no reduction across threads; there is one at the end.
    LANES: tl.constexpr = TILE.lanes
    zeros = tl.zeros([LANES], tl.float32)
    lanes = _Lanes(
        # Finite: a lane whose logits are all −inf then has a sum of 0, and not NaN.
        max=tl.full([LANES], _LOWEST, tl.float32),
        start=tl.zeros([LANES], tl.int32),
        sum=zeros,
        hard_sum=zeros if WITH_HARD_SUM else None,
        weighted_sum=zeros if WITH_WEIGHTED_SUM else None,
        logit_sum=zeros if WITH_MEAN_LOGIT else None,
    )
    whole = whole_tiles(row, TILE)
    for start in tl.range(0, whole, TILE.size, loop_unroll_factor=TILE.unroll):
        lanes = _add_tile(lanes, start, row, INVERSE_TEMPERATURE, SHAPE, TILE, WHOLE=True)
    if whole < row.width:
        lanes = _add_tile(lanes, whole, row, INVERSE_TEMPERATURE, SHAPE, TILE, WHOLE=False)

    # Merges the lanes as the loop merges tiles: rescale to the common maximum, then add.
    row_max = tl.max(lanes.max, axis=0)
    step = lanes.max - row_max
    sum_exp = tl.sum(lanes.sum * tl.exp(step * INVERSE_TEMPERATURE), axis=0)
    hard_log_sum, weighted_sum, mean_logit = None, None, None
    if WITH_HARD_SUM:
        hard_log_sum = tl.log(tl.sum(lanes.hard_sum * tl.exp(step), axis=0))
    if WITH_WEIGHTED_SUM:
        weighted_sum = tl.sum(lanes.weighted_sum, axis=0)
    if WITH_MEAN_LOGIT:
        mean_logit = tl.sum(_shift_to_new_max(lanes.logit_sum, lanes.sum, step) * tl.exp(step), axis=0) / sum_exp
    prediction = _first_of_max(row, row_max, lanes, SHAPE, TILE)
    return Softmax(row_max, tl.log(sum_exp), hard_log_sum, weighted_sum, mean_logit, prediction)
