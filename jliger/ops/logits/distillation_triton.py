"""The distillation row functions as calls of Triton kernels."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core.triton_call import call_kernel
from jliger.ops.logits import distillation_triton_kernels as pair_kernels
from jliger.ops.logits.distillation_triton_kernels import PairShape
from jliger.ops.logits.distillation_types import (
    DistillationBlock,
    DistillationCoefficients,
    DistillationMap,
    DistillationStats,
    Divergence,
    Products,
    SoftmaxStats,
)
from jliger.ops.logits.triton_tiles import Shape, Tile
from jliger.ops.logits.types import LogitMap


def distillation_stats(
    products: Products,
    block: DistillationBlock,
    distillation_map: DistillationMap,
    *,
    compute_capability: int | None = None,
) -> DistillationStats:
    outputs = call_kernel(
        pair_kernels.distillation_stats_kernel,
        [*products, *_block_operands(block), _labels(block, distillation_map)],
        _stats_types(products, distillation_map),
        name="jliger_distillation_stats",
        flops=10 * products.student.size,
        bytes_accessed=_nbytes(products),
        compute_capability=compute_capability,
        **_launch(products, distillation_map),
    )
    return _distillation_stats(outputs)


def distillation_divergence(
    products: Products,
    block: DistillationBlock,
    distillation_map: DistillationMap,
    stats: DistillationStats,
    *,
    compute_capability: int | None = None,
) -> Divergence:
    student, teacher = stats.student, stats.teacher
    outputs = call_kernel(
        pair_kernels.distillation_divergence_kernel,
        [*products, *_block_operands(block), student.max, student.log_sum, teacher.max, teacher.log_sum],
        [_row_type(products, jnp.float32)] * 2,
        name="jliger_distillation_divergence",
        flops=20 * products.student.size,
        bytes_accessed=_nbytes(products),
        compute_capability=compute_capability,
        **_launch(products, distillation_map),
    )
    return Divergence(*outputs)


def distillation_grads(
    products: Products,
    block: DistillationBlock,
    distillation_map: DistillationMap,
    stats: DistillationStats,
    q_sum: Float[Array, " T"],
    coefficients: DistillationCoefficients,
    *,
    dtype: jax.typing.DTypeLike,
    compute_capability: int | None = None,
) -> Float[Array, "T V"]:
    student, teacher = stats.student, stats.teacher
    softmaxes = [student.max, student.log_sum, stats.hard_log_sum, teacher.max, teacher.log_sum]
    (grads,) = call_kernel(
        pair_kernels.distillation_grads_kernel,
        [*products, *_block_operands(block), _labels(block, distillation_map), *softmaxes, q_sum, *coefficients],
        [jax.ShapeDtypeStruct(products.student.shape, dtype)],
        name="jliger_distillation_grads",
        flops=20 * products.student.size,
        bytes_accessed=_nbytes(products) + products.student.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        **_launch(products, distillation_map),
    )
    return grads


def distillation_stats_and_grads(
    products: Products,
    block: DistillationBlock,
    distillation_map: DistillationMap,
    coefficients: DistillationCoefficients,
    *,
    dtype: jax.typing.DTypeLike,
    compute_capability: int | None = None,
) -> tuple[DistillationStats, Divergence, Float[Array, "T V"]]:
    *stats, value, q_sum, grads = call_kernel(
        pair_kernels.distillation_stats_and_grads_kernel,
        [*products, *_block_operands(block), _labels(block, distillation_map), *coefficients],
        [
            *_stats_types(products, distillation_map),
            *[_row_type(products, jnp.float32)] * 2,
            jax.ShapeDtypeStruct(products.student.shape, dtype),
        ],
        name="jliger_distillation_stats_and_grads",
        flops=50 * products.student.size,
        bytes_accessed=_nbytes(products) + products.student.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        **_launch(products, distillation_map),
    )
    return _distillation_stats(stats), Divergence(value, q_sum), grads


def _launch(products: Products, distillation_map: DistillationMap) -> dict[str, Any]:
    """The launch: one large program per pair of rows, so that few pairs are in flight and stay in the cache."""
    rows, stride = products.student.shape
    tile = Tile.make(distillation_map.student.width, most_warps=32, unroll=2)

    def shape(logit_map: LogitMap) -> Shape:
        return Shape(stride, logit_map.width, logit_map.scale, logit_map.softcap)

    return {
        "grid": (rows,),
        "num_warps": tile.lanes // 32,
        "num_stages": 1,
        "SHAPE": PairShape(
            shape(distillation_map.student),
            shape(distillation_map.teacher),
            distillation_map.beta,
            1 / distillation_map.temperature,
        ),
        "TILE": tile,
    }


def _nbytes(products: Products) -> int:
    return products.student.nbytes + products.teacher.nbytes


def _block_operands(block: DistillationBlock) -> list[Array | None]:
    return [block.student.bias, block.teacher.bias, block.student.width]


def _labels(block: DistillationBlock, distillation_map: DistillationMap) -> Array | None:
    return block.student.labels if distillation_map.with_labels else None


def _row_type(products: Products, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((products.student.shape[0],), dtype)


def _stats_types(products: Products, distillation_map: DistillationMap) -> list[jax.ShapeDtypeStruct | None]:
    """The types of the fields of `DistillationStats`, in order."""
    number, column = _row_type(products, jnp.float32), _row_type(products, jnp.int32)
    softmax = [number, number, column]
    label_logit = number if distillation_map.with_labels else None
    hard_log_sum = number if distillation_map.with_hard_sum else None
    return [*softmax, *softmax, label_logit, hard_log_sum]


def _distillation_stats(outputs: Sequence[Any]) -> DistillationStats:
    return DistillationStats(SoftmaxStats(*outputs[:3]), SoftmaxStats(*outputs[3:6]), *outputs[6:])
