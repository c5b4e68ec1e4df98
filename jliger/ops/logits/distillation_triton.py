"""The row functions of pairs through Triton."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
from jaxtyping import Array, Float

from jliger.core.triton_call import call_kernel
from jliger.ops.logits import distillation_triton_kernels as pair_kernels
from jliger.ops.logits.distillation_types import (
    Divergence,
    PairBlock,
    PairCoefficients,
    PairMap,
    PairStats,
    Products,
    SoftmaxStats,
)

_VECTOR = 8  # logits a thread takes at once: 16 bytes of bfloat16


def pair_stats(
    products: Products, block: PairBlock, pair_map: PairMap, *, compute_capability: int | None = None
) -> PairStats:
    outputs = call_kernel(
        pair_kernels.pair_stats_kernel,
        [*products, *_biases(products, block), block.student.labels],
        _stats_types(products),
        name="jliger_pair_stats",
        flops=10 * products.student.size,
        bytes_accessed=_nbytes(products),
        compute_capability=compute_capability,
        HAS_LABELS=pair_map.with_labels,
        INVERSE_TEMPERATURE=1 / pair_map.temperature,
        **_launch(products),
        **_logit_constexprs(products, block, pair_map),
    )
    return _pair_stats(outputs, pair_map)


def pair_divergence(
    products: Products,
    block: PairBlock,
    pair_map: PairMap,
    stats: PairStats,
    *,
    compute_capability: int | None = None,
) -> Divergence:
    student, teacher = stats.student, stats.teacher
    outputs = call_kernel(
        pair_kernels.pair_divergence_kernel,
        [*products, *_biases(products, block), student.max, student.log_sum, teacher.max, teacher.log_sum],
        [_row_type(products, jnp.float32)] * 2,
        name="jliger_pair_divergence",
        flops=20 * products.student.size,
        bytes_accessed=_nbytes(products),
        compute_capability=compute_capability,
        BETA=pair_map.beta,
        INVERSE_TEMPERATURE=1 / pair_map.temperature,
        **_launch(products),
        **_logit_constexprs(products, block, pair_map),
    )
    return Divergence(*outputs)


def pair_grads(
    products: Products,
    block: PairBlock,
    pair_map: PairMap,
    stats: PairStats,
    slope: Float[Array, " T"],
    coefficients: PairCoefficients,
    *,
    dtype: jax.typing.DTypeLike,
    compute_capability: int | None = None,
) -> Float[Array, "T V"]:
    student, teacher = stats.student, stats.teacher
    hard_log_sum = student.log_sum if stats.hard_log_sum is None else stats.hard_log_sum
    softmaxes = [student.max, student.log_sum, hard_log_sum, teacher.max, teacher.log_sum]
    (grads,) = call_kernel(
        pair_kernels.pair_grads_kernel,
        [
            *products,
            *_biases(products, block),
            block.student.labels,
            *softmaxes,
            slope,
            *_coefficient_operands(coefficients),
        ],
        [jax.ShapeDtypeStruct(products.student.shape, dtype)],
        name="jliger_pair_grads",
        flops=20 * products.student.size,
        bytes_accessed=_nbytes(products) + products.student.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        BETA=pair_map.beta,
        HAS_LABELS=pair_map.with_labels,
        INVERSE_TEMPERATURE=1 / pair_map.temperature,
        **_launch(products),
        **_logit_constexprs(products, block, pair_map),
    )
    return grads


def pair_stats_and_grads(
    products: Products,
    block: PairBlock,
    pair_map: PairMap,
    coefficients: PairCoefficients,
    *,
    dtype: jax.typing.DTypeLike,
    compute_capability: int | None = None,
) -> tuple[PairStats, Divergence, Float[Array, "T V"]]:
    *stats, value, slope, grads = call_kernel(
        pair_kernels.pair_stats_and_grads_kernel,
        [*products, *_biases(products, block), block.student.labels, *_coefficient_operands(coefficients)],
        [
            *_stats_types(products),
            *[_row_type(products, jnp.float32)] * 2,
            jax.ShapeDtypeStruct(products.student.shape, dtype),
        ],
        name="jliger_pair_stats_and_grads",
        flops=50 * products.student.size,
        bytes_accessed=_nbytes(products) + products.student.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        BETA=pair_map.beta,
        HAS_LABELS=pair_map.with_labels,
        INVERSE_TEMPERATURE=1 / pair_map.temperature,
        **_launch(products),
        **_logit_constexprs(products, block, pair_map),
    )
    return _pair_stats(tuple(stats), pair_map), Divergence(value, slope), grads


def _launch(products: Products) -> dict[str, Any]:
    """One program a pair of rows, large, so that those in flight are few and much of them stays in the cache."""
    rows, width = products.student.shape
    lanes = max(32, min(32 * 32, triton.next_power_of_2(width) // _VECTOR))
    return {
        "grid": (rows,),
        "LANES": lanes,
        "VECTOR": _VECTOR,
        "UNROLL": 2,
        "num_warps": lanes // 32,
        "num_stages": 1,
    }


def _nbytes(products: Products) -> int:
    return products.student.nbytes + products.teacher.nbytes


def _biases(products: Products, block: PairBlock) -> list[Array]:
    """Kernels have a pointer for either bias, and do not read one that there is not."""
    biases = block.student.bias, block.teacher.bias
    return [product if bias is None else bias for product, bias in zip(products, biases, strict=True)]


def _coefficient_operands(coefficients: PairCoefficients) -> list[Array]:
    return [coefficients.soft if field is None else field for field in coefficients]


def _logit_constexprs(products: Products, block: PairBlock, pair_map: PairMap) -> dict[str, Any]:
    return {
        "STRIDE": products.student.shape[1],
        "WIDTH": pair_map.student.width,
        "STUDENT_SCALE": pair_map.student.scale,
        "STUDENT_SOFTCAP": pair_map.student.softcap,
        "STUDENT_HAS_BIAS": block.student.bias is not None,
        "TEACHER_SCALE": pair_map.teacher.scale,
        "TEACHER_SOFTCAP": pair_map.teacher.softcap,
        "TEACHER_HAS_BIAS": block.teacher.bias is not None,
    }


def _row_type(products: Products, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((products.student.shape[0],), dtype)


def _stats_types(products: Products) -> list[jax.ShapeDtypeStruct]:
    number, column = _row_type(products, jnp.float32), _row_type(products, jnp.int32)
    return [number, number, column, number, number, column, number, number]


def _pair_stats(outputs: tuple[Array, ...], pair_map: PairMap) -> PairStats:
    *softmaxes, label_logit, hard_log_sum = outputs
    return PairStats(
        SoftmaxStats(*softmaxes[:3]),
        SoftmaxStats(*softmaxes[3:]),
        label_logit if pair_map.with_labels else None,
        hard_log_sum if pair_map.with_hard_sum else None,
    )
