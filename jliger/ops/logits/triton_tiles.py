"""What all row kernels share: tiles of a row, how they become logits, and a row's softmax.

Each program has a row to itself, and goes over it tile by tile. A tile is `[LANES, VECTOR]` columns: a lane is a
thread, and its vector is contiguous, to be loaded by one instruction and reduced within the thread. Whole tiles have
no mask, which takes instructions, and where it may end within a vector a load for each column; what is left of a row is
a tile of its own, outside the loop.

What a kernel is compiled for is in NamedTuples, upper case. An array that a call does not have, read or written, is
None, and what would touch it is compiled away.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)

_VECTOR = 8  # logits a thread takes at once: 16 bytes of bfloat16


class Tile(NamedTuple):
    """Compile-time shape of a tile.

    Attributes:
      lanes: threads.
      vector: columns a thread.
      size: columns in all.
      whole: columns of a row that are in whole tiles; what is left fits in one more.
      unroll: how often loops over tiles are unrolled.
    """

    lanes: int
    vector: int
    size: int
    whole: int
    unroll: int

    @classmethod
    def make(cls, width: int, most_warps: int, unroll: int) -> "Tile":
        """For rows of `width` columns; a short row gets fewer warps."""
        lanes = max(32, min(32 * most_warps, triton.next_power_of_2(width) // _VECTOR))
        size = lanes * _VECTOR
        return cls(lanes, _VECTOR, size, width // size * size, unroll)


class Shape(NamedTuple):
    """Compile-time shape of a row, and how a product becomes a logit.

    Attributes:
      stride: columns from a row to the next, which are written; those beyond `width` are padding.
      width: columns that exist.
      scale, softcap: as in `jliger.ops.logits.LogitMap`.
    """

    stride: int
    width: int
    scale: float
    softcap: float | None


class Row(NamedTuple):
    """One row: pointers to its columns, `[V]` each, and a number of its own; what is not there is None."""

    product: Any
    bias: Any
    class_weights: Any
    inverse_temperature: Any = None


class Softmax(NamedTuple):
    """What one pass finds of a row, or as much as is asked for; with a temperature `τ` that divides logits.

    Attributes:
      max: `max_v z_v`.
      log_sum: `log Σ_v exp((z_v − max) / τ)`.
      hard_log_sum: likewise without `τ`, or None.
      weighted_sum: `Σ_v u_v · z_v`, or None.
      mean_logit: the mean of `z_v − max` by `exp(z_v − max)`, or None. It takes `τ = 1`.
      prediction: the first column of the maximum.
    """

    max: Any
    log_sum: Any
    hard_log_sum: Any
    weighted_sum: Any
    mean_logit: Any
    prediction: Any


class _Lanes(NamedTuple):
    """A softmax so far, each lane's of its own columns, `[LANES]` each; None for what is not wanted.

    Attributes:
      max: the largest logit.
      start: the first column of the tile that it is in.
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
    """What is at `index` of an array, or None if there is no array."""
    if pointer is not None:
        value = tl.load(pointer + index)
    else:
        value = None
    return value


@triton.jit
def store_if_wanted(pointer, index, value):
    """Writes `value` at `index` of an array, if there is one."""
    if pointer is not None:
        tl.store(pointer + index, value)


@triton.jit
def tile_columns(start, TILE: tl.constexpr):
    """A tile's columns, `[LANES, VECTOR]`."""
    LANES: tl.constexpr = TILE.lanes
    VECTOR: tl.constexpr = TILE.vector
    return start + (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])


@triton.jit
def columns_inside(columns, SHAPE: tl.constexpr, WHOLE: tl.constexpr):
    """Which columns exist; None for all of them, and then nothing is masked."""
    if WHOLE:
        inside = None
    else:
        inside = columns < SHAPE.width
    return inside


@triton.jit
def where_inside(inside, values, otherwise):
    """`values` of columns that exist, as `columns_inside` tells them."""
    if inside is not None:
        values = tl.where(inside, values, otherwise)
    return values


@triton.jit
def load_columns(pointers, inside, EVICTION: tl.constexpr):
    """A load, of zeros where `inside` is false.

    `EVICTION` is `"evict_last"` for what a later pass reads again, `"evict_first"` for what none does, `""` for what
    other rows read too.
    """
    if inside is None:
        values = tl.load(pointers, eviction_policy=EVICTION)
    else:
        values = tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION)
    return values


@triton.jit
def _tanh(x):
    # Cephes' tanhf: a polynomial where 1 − exp(−2|x|) would cancel.
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
    """Logits in some columns, float32, and their derivative by the product."""
    logits = load_columns(row.product + columns, inside, EVICTION).to(tl.float32)
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
    return logits, dlogit_dproduct


@triton.jit
def is_column(label, SHAPE: tl.constexpr):
    """Whether a label is a column of the row."""
    return columns_inside(label, SHAPE, WHOLE=False) & (label >= 0)


@triton.jit
def load_label_logit(row, label, SHAPE: tl.constexpr):
    """The label's logit, 0 where it is no column; None without labels.

    Called before a row is gone over, for nothing that is done there waits for it.
    """
    if label is not None:
        has_label = is_column(label, SHAPE)
        logit, _ = load_logits(row, label, has_label, SHAPE, "")
        label_logit = tl.where(has_label, logit, 0.0)
    else:
        label_logit = None
    return label_logit


@triton.jit
def store_tile(row_ptr, columns, inside, values, SHAPE: tl.constexpr):
    """Writes a tile of gradients, and zeros into the padding."""
    values = where_inside(inside, values, 0.0).to(row_ptr.dtype.element_ty)
    # Streamed: nobody reads them before the next product does, and the cache has better things to hold.
    if inside is None:
        tl.store(row_ptr + columns, values, cache_modifier=".cs")
    else:
        tl.store(row_ptr + columns, values, mask=columns < SHAPE.stride, cache_modifier=".cs")


@triton.jit
def store_label_grad(row_ptr, label, grad, SHAPE: tl.constexpr):
    """Writes the label's column again, now as the label's, which is cheaper than to look for it in every tile."""
    # Another thread wrote it before; the barrier puts this store behind that one.
    tl.debug_barrier()
    tl.store(row_ptr + label, grad.to(row_ptr.dtype.element_ty), mask=is_column(label, SHAPE))


@triton.jit
def finite(below):
    """A difference that is multiplied by its own exponential: clipped where the exponential is 0.

    The bound is small, so that the product with a large coefficient does not overflow; 0 · inf would be NaN.
    """
    return tl.maximum(below, -1024.0)


@triton.jit
def _shift_to_new_max(logit_sum, sum_exp, step):
    """`Σ exp(z − m) · (z − m)` where the second `m` is larger by `−step`."""
    return logit_sum + finite(step) * sum_exp


@triton.jit
def _add_tile(
    lanes, start, row, INVERSE_TEMPERATURE: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr
):
    """Every lane's softmax with one more vector each."""
    columns = tile_columns(start, TILE)  # [LANES, VECTOR], as are logits, and what is made of them column by column
    inside = columns_inside(columns, SHAPE, WHOLE)
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
    # What was summed below the old maximum is brought below the new one; both factors are at most 1.
    step = lanes.max - new_max
    below = logits - new_max[:, None]
    exp = tl.exp(below * INVERSE_TEMPERATURE)
    if logit_sum is not None:
        logit_sum = _shift_to_new_max(logit_sum, lanes.sum, step) * tl.exp(step) + tl.sum(exp * finite(below), axis=1)
    if hard_sum is not None:
        hard_sum = hard_sum * tl.exp(step) + tl.sum(tl.exp(below), axis=1)
    sum_exp = lanes.sum * tl.exp(step * INVERSE_TEMPERATURE) + tl.sum(exp, axis=1)
    # Of equal maxima the first stays.
    new_start = tl.where(tile_max > lanes.max, start, lanes.start)
    return _Lanes(new_max, new_start, sum_exp, hard_sum, weighted_sum, logit_sum)


@triton.jit
def _first_of_max(row, row_max, lanes, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """The first column whose logit is `row_max`.

    Each lane remembers the tile of its maximum, and so the vector. Of those that have the row's maximum the first in
    columns' order is read again, 8 columns in all; to remember columns would cost every tile a comparison for each.
    """
    LANES: tl.constexpr = TILE.lanes
    VECTOR: tl.constexpr = TILE.vector
    vectors = tl.where(lanes.max == row_max, lanes.start + tl.arange(0, LANES) * VECTOR, SHAPE.width)
    columns = tl.min(vectors, axis=0) + tl.arange(0, VECTOR)
    inside = columns_inside(columns, SHAPE, WHOLE=False)
    logits, _ = load_logits(row, columns, inside, SHAPE, "evict_last")
    # Of a row that is not a number none is; its prediction is still a column.
    return tl.min(tl.where(inside & (logits == row_max), columns, SHAPE.width - 1), axis=0)


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
    """One pass over a row, from its first column to its last."""
    # Each lane keeps a maximum and sums of its own: no tile waits for a reduction across threads.
    LANES: tl.constexpr = TILE.lanes
    zeros = tl.zeros([LANES], tl.float32)
    lanes = _Lanes(
        # Finite, so that a lane with nothing but −inf has sum 0 and not NaN.
        max=tl.full([LANES], _LOWEST, tl.float32),
        start=tl.zeros([LANES], tl.int32),
        sum=zeros,
        hard_sum=zeros if WITH_HARD_SUM else None,
        weighted_sum=zeros if WITH_WEIGHTED_SUM else None,
        logit_sum=zeros if WITH_MEAN_LOGIT else None,
    )
    for start in tl.range(0, TILE.whole, TILE.size, loop_unroll_factor=TILE.unroll):
        lanes = _add_tile(lanes, start, row, INVERSE_TEMPERATURE, SHAPE, TILE, WHOLE=True)
    if TILE.whole < SHAPE.width:
        lanes = _add_tile(lanes, TILE.whole, row, INVERSE_TEMPERATURE, SHAPE, TILE, WHOLE=False)

    # Lanes are put together as tiles were.
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
