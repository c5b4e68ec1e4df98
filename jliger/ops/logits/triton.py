"""The row functions through Triton."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
from jaxtyping import Array, Float

from jliger.core.triton_call import call_kernel
from jliger.ops.logits import triton_kernels as kernels
from jliger.ops.logits.types import Block, Coefficients, LogitMap, RowStats, StatsWanted

_VECTOR = 8  # logits a thread takes at once: 16 bytes of bfloat16


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
        [product, *_block_operands(block)],
        _stats_types(product),
        name="jliger_row_stats",
        flops=5 * product.size,
        bytes_accessed=product.nbytes,
        compute_capability=compute_capability,
        **_stats_constexprs(wanted),
        **_launch(product, passes=1),
        **_block_constexprs(product, block, logit_map),
    )
    return _row_stats(outputs, wanted)


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
        [product, *_block_operands(block), row_max, log_sum, *_coefficient_operands(coefficients)],
        [jax.ShapeDtypeStruct(product.shape, dtype)],
        name="jliger_row_grads",
        flops=5 * product.size,
        bytes_accessed=product.nbytes + product.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        **_launch(product, passes=1),
        **_block_constexprs(product, block, logit_map),
        **_coefficient_constexprs(coefficients),
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
        [product, *_block_operands(block), *_coefficient_operands(coefficients)],
        [*_stats_types(product), jax.ShapeDtypeStruct(product.shape, dtype)],
        name="jliger_row_stats_and_grads",
        flops=10 * product.size,
        bytes_accessed=product.nbytes + product.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        **_stats_constexprs(wanted),
        **_launch(product, passes=2),
        **_block_constexprs(product, block, logit_map),
        **_coefficient_constexprs(coefficients),
    )
    return _row_stats(tuple(stats), wanted), grads


def _launch(product: Float[Array, "T V"], *, passes: int) -> dict[str, Any]:
    """One program a row, of as many warps as measured best on an H200 (docs/tuning.md).

    With two passes few large programs are best: of the fewer rows in flight the cache holds more for the second pass.
    """
    rows, width = product.shape
    warps = 4 if passes == 1 else 32
    lanes = max(32, min(32 * warps, triton.next_power_of_2(width) // _VECTOR))
    return {
        "grid": (rows,),
        "LANES": lanes,
        "VECTOR": _VECTOR,
        "UNROLL": 4,
        "num_warps": lanes // 32,
        "num_stages": 1,
    }


def _or_unused(operand: Array | None, unused: Array) -> Array:
    """Kernels have a pointer for every operand, and do not read those that their constexprs switch off."""
    return unused if operand is None else operand


def _block_operands(block: Block) -> list[Array]:
    return [
        _or_unused(block.bias, block.labels),
        _or_unused(block.class_weights, block.labels),
        block.labels,
        _or_unused(block.first, block.labels),
    ]


def _block_constexprs(product: Float[Array, "T V"], block: Block, logit_map: LogitMap) -> dict[str, Any]:
    return {
        "STRIDE": product.shape[1],
        "WIDTH": logit_map.width,
        "SCALE": logit_map.scale,
        "SOFTCAP": logit_map.softcap,
        "HAS_BIAS": block.bias is not None,
        "HAS_CLASS_WEIGHTS": block.class_weights is not None,
        "HAS_FIRST": block.first is not None,
    }


def _coefficient_operands(coefficients: Coefficients) -> list[Array]:
    return [
        coefficients.probability,
        _or_unused(coefficients.probability_lse, coefficients.probability),
        coefficients.label,
        _or_unused(coefficients.smoothing, coefficients.probability),
        _or_unused(coefficients.probability_logit, coefficients.probability),
    ]


def _coefficient_constexprs(coefficients: Coefficients) -> dict[str, Any]:
    return {
        "HAS_LSE": coefficients.probability_lse is not None,
        "HAS_SMOOTHING": coefficients.smoothing is not None,
        "HAS_LOGIT": coefficients.probability_logit is not None,
    }


def _stats_types(product: Float[Array, "T V"]) -> list[jax.ShapeDtypeStruct]:
    rows = product.shape[0]
    return [*[jax.ShapeDtypeStruct((rows,), jnp.float32)] * 5, jax.ShapeDtypeStruct((rows,), jnp.int32)]


def _stats_constexprs(wanted: StatsWanted) -> dict[str, Any]:
    return {"WITH_WEIGHTED_SUM": wanted.weighted_sum, "WITH_MEAN_LOGIT": wanted.mean_logit}


def _row_stats(outputs: tuple[Array, ...], wanted: StatsWanted) -> RowStats:
    row_max, log_sum, label_logit, weighted_sum, mean_logit, prediction = outputs
    return RowStats(
        row_max,
        log_sum,
        label_logit,
        prediction,
        weighted_sum if wanted.weighted_sum else None,
        mean_logit if wanted.mean_logit else None,
    )
