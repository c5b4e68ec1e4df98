"""The row functions as calls of Triton kernels."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core.triton_call import call_kernel
from jliger.ops.logits import triton_kernels as kernels
from jliger.ops.logits.triton_tiles import Shape, Tile
from jliger.ops.logits.types import Block, Coefficients, LogitMap, RowStats, StatsWanted

# Columns from which on two rows for each multiprocessor do not fit in the L2 cache of 50 MB.
_WIDE = 2**16


def row_stats(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    wanted: StatsWanted,
    *,
    compute_capability: int | None = None,
) -> RowStats:
    outputs = call_kernel(
        kernels.row_stats_kernel,
        [product, *block],
        _stats_types(product, wanted),
        name="jliger_row_stats",
        flops=5 * product.size,
        bytes_accessed=product.nbytes,
        compute_capability=compute_capability,
        **launch(product, logit_map, passes=1),
    )
    return RowStats(*outputs)


def row_grads(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
    *,
    dtype: jax.typing.DTypeLike,
    compute_capability: int | None = None,
) -> Float[Array, "T V"]:
    (grads,) = call_kernel(
        kernels.row_grads_kernel,
        [product, *block, row_max, log_sum, *coefficients],
        [jax.ShapeDtypeStruct(product.shape, dtype)],
        name="jliger_row_grads",
        flops=5 * product.size,
        bytes_accessed=product.nbytes + product.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        **launch(product, logit_map, passes=1),
    )
    return grads


def row_stats_and_grads(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    wanted: StatsWanted,
    coefficients: Coefficients,
    *,
    dtype: jax.typing.DTypeLike,
    compute_capability: int | None = None,
) -> tuple[RowStats, Float[Array, "T V"]]:
    *stats, grads = call_kernel(
        kernels.row_stats_and_grads_kernel,
        [product, *block, *coefficients],
        [*_stats_types(product, wanted), jax.ShapeDtypeStruct(product.shape, dtype)],
        name="jliger_row_stats_and_grads",
        flops=10 * product.size,
        bytes_accessed=product.nbytes + product.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        **launch(product, logit_map, passes=2),
    )
    return RowStats(*stats), grads


def launch(product: Float[Array, "T V"], logit_map: LogitMap, *, passes: int) -> dict[str, Any]:
    """The launch: one program per row, with the tiles and registers that were fastest on an H100 (docs/tuning.md).

    With two passes, programs are large: fewer rows are then in flight, and more of each row is still in the L2 cache
    for the second pass. Of wide rows, two on each multiprocessor are more than the cache holds, so vectors are longer,
    and use the registers that a second program would need. A softcap takes so much arithmetic that two programs, one
    of which waits for memory while the other computes, are faster in spite of the cache.
    """
    rows, stride = product.shape
    if passes == 1:
        tile = Tile.make(logit_map.width, most_warps=4, unroll=4)
    elif logit_map.width <= _WIDE or logit_map.softcap is not None:
        tile = Tile.make(logit_map.width, most_warps=32, unroll=4)
    else:
        tile = Tile.make(logit_map.width, most_warps=32, unroll=2, vector=16)
    return {
        "grid": (rows,),
        "num_warps": tile.lanes // 32,
        "num_stages": 1,
        # With 64 registers, a multiprocessor holds 1024 threads; with 32, twice as many.
        "most_registers": 64 if tile.vector == 16 else 32,
        "SHAPE": Shape(stride, logit_map.width, logit_map.scale, logit_map.softcap, logit_map.masked),
        "TILE": tile,
    }


def _stats_types(product: Float[Array, "T V"], wanted: StatsWanted) -> list[jax.ShapeDtypeStruct | None]:
    """The types of the fields of `RowStats`."""
    number, column = (jax.ShapeDtypeStruct(product.shape[:1], dtype) for dtype in (jnp.float32, jnp.int32))
    return [number, number, number, column, *(number if is_wanted else None for is_wanted in wanted)]
