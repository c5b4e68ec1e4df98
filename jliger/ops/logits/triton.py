"""The row functions as calls of Triton kernels."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core.triton_call import call_kernel
from jliger.ops.logits import triton_kernels as kernels
from jliger.ops.logits.triton_tiles import Shape, Tile
from jliger.ops.logits.types import Block, Coefficients, LogitMap, RowStats, StatsWanted


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
        **_launch(product, logit_map, passes=1),
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
        **_launch(product, logit_map, passes=1),
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
        **_launch(product, logit_map, passes=2),
    )
    return RowStats(*stats), grads


def _launch(product: Float[Array, "T V"], logit_map: LogitMap, *, passes: int) -> dict[str, Any]:
    """The launch: one program per row, with the number of warps that was fastest on an H200 (docs/tuning.md).

    Two passes are fastest with few large programs: fewer rows are then in flight, and more of each row is still in the
    L2 cache for the second pass.
    """
    rows, stride = product.shape
    tile = Tile.make(logit_map.width, most_warps=4 if passes == 1 else 32, unroll=4)
    return {
        "grid": (rows,),
        "num_warps": tile.lanes // 32,
        "num_stages": 1,
        "SHAPE": Shape(stride, logit_map.width, logit_map.scale, logit_map.softcap),
        "TILE": tile,
    }


def _stats_types(product: Float[Array, "T V"], wanted: StatsWanted) -> list[jax.ShapeDtypeStruct | None]:
    """The types of the fields of `RowStats`."""
    number, column = (jax.ShapeDtypeStruct(product.shape[:1], dtype) for dtype in (jnp.float32, jnp.int32))
    return [number, number, number, column, *(number if is_wanted else None for is_wanted in wanted)]
