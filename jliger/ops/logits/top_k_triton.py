"""The row functions of `top_k` and `top_k_kl` as calls of Triton kernels."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
from jaxtyping import Array, Float, Int

from jliger.core.triton_call import call_kernel
from jliger.ops.logits import top_k_kl_triton_kernels as student_kernels
from jliger.ops.logits import top_k_triton_kernels as kernels
from jliger.ops.logits.distillation_types import SoftmaxStats
from jliger.ops.logits.top_k_types import StudentCoefficients, StudentMap, StudentStats, TopLogits
from jliger.ops.logits.triton import launch
from jliger.ops.logits.triton_tiles import Shape, Tile
from jliger.ops.logits.types import Block, LogitMap

_GROUP = 32  # columns per group
_MOST_GROUPS = 2**13  # as many maxima as a program can hold in registers


def top_logits(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    k: int,
    *,
    compute_capability: int | None = None,
) -> TopLogits:
    """The k largest logits, in no order: the best groups of columns by their maxima, then the best of these columns.

    The k groups with the largest maxima contain the k largest logits: see `jliger.ops.logits.top_k_xla`.
    """
    rows, stride = product.shape
    group = _GROUP
    while -(-logit_map.width // group) > _MOST_GROUPS:
        group *= 2
    num_groups = -(-logit_map.width // group)
    shape = Shape(stride, logit_map.width, logit_map.scale, logit_map.softcap)
    tile = Tile.make(logit_map.width, most_warps=4, unroll=1, vector=group)
    of_groups, of_columns = (kernels.Selection.make(k, least, group, num_groups) for least in (num_groups, k * group))
    operands = [product, block.bias, block.inverse_temperature, block.width]

    def selected(dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, k), dtype)

    common: dict[str, Any] = {"grid": (rows,), "num_stages": 1, "compute_capability": compute_capability}
    (maxima,) = call_kernel(
        kernels.group_maxima_kernel,
        operands,
        [jax.ShapeDtypeStruct((rows, num_groups), jnp.float32)],
        name="jliger_group_maxima",
        flops=2 * product.size,
        bytes_accessed=product.nbytes,
        num_warps=tile.lanes // 32,
        SHAPE=shape,
        TILE=tile,
        **common,
    )
    (groups,) = call_kernel(
        kernels.select_groups_kernel,
        [maxima],
        [selected(jnp.int32)],
        name="jliger_select_groups",
        flops=2 * (32 + of_groups.index_bits) * rows * of_groups.size,
        bytes_accessed=maxima.nbytes,
        num_warps=of_groups.num_warps,
        SELECT=of_groups,
        **common,
    )
    result = call_kernel(
        kernels.select_columns_kernel,
        [*operands, groups],
        [selected(jnp.int32), selected(jnp.float32)],
        name="jliger_select_columns",
        flops=2 * (32 + of_columns.index_bits) * rows * of_columns.size,
        bytes_accessed=rows * k * group * product.dtype.itemsize,
        num_warps=of_columns.num_warps,
        SHAPE=shape,
        SELECT=of_columns,
        **common,
    )
    return TopLogits(*result)


def student_stats(
    product: Float[Array, "T V"], block: Block, student_map: StudentMap, *, compute_capability: int | None = None
) -> StudentStats:
    outputs = call_kernel(
        student_kernels.student_stats_kernel,
        [product, block.bias, block.width],
        _stats_types(product, student_map),
        name="jliger_student_stats",
        flops=5 * product.size,
        bytes_accessed=product.nbytes,
        compute_capability=compute_capability,
        INVERSE_TEMPERATURE=1 / student_map.temperature,
        **launch(product, student_map.logits, passes=1),
    )
    return _stats(outputs)


def student_grads(
    product: Float[Array, "T V"],
    block: Block,
    student_map: StudentMap,
    stats: StudentStats,
    coefficients: StudentCoefficients,
    ids: Int[Array, "T K"],
    column_grads: Float[Array, "T K"],
    *,
    dtype: jax.typing.DTypeLike,
    compute_capability: int | None = None,
) -> Float[Array, "T V"]:
    of_stats = [stats.softmax.max, stats.softmax.log_sum, stats.hard_log_sum]
    labels = None if coefficients.label is None else block.labels
    (grads,) = call_kernel(
        student_kernels.student_grads_kernel,
        [product, block.bias, block.width, labels, *of_stats, *coefficients, ids, column_grads],
        [jax.ShapeDtypeStruct(product.shape, dtype)],
        name="jliger_student_grads",
        flops=5 * product.size,
        bytes_accessed=product.nbytes + product.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        COLUMNS=_columns(ids),
        INVERSE_TEMPERATURE=1 / student_map.temperature,
        **launch(product, student_map.logits, passes=1),
    )
    return grads


def student_stats_and_grads(
    product: Float[Array, "T V"],
    block: Block,
    student_map: StudentMap,
    coefficients: StudentCoefficients,
    ids: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    *,
    dtype: jax.typing.DTypeLike,
    compute_capability: int | None = None,
) -> tuple[StudentStats, Float[Array, "T V"]]:
    labels = None if coefficients.label is None else block.labels
    *outputs, grads = call_kernel(
        student_kernels.student_stats_and_grads_kernel,
        [product, block.bias, block.width, labels, *coefficients, ids, shares],
        [*_stats_types(product, student_map), jax.ShapeDtypeStruct(product.shape, dtype)],
        name="jliger_student_stats_and_grads",
        flops=10 * product.size,
        bytes_accessed=product.nbytes + product.size * jnp.dtype(dtype).itemsize,
        compute_capability=compute_capability,
        COLUMNS=_columns(ids),
        INVERSE_TEMPERATURE=1 / student_map.temperature,
        **launch(product, student_map.logits, passes=2),
    )
    return _stats(outputs), grads


def _columns(ids: Int[Array, "T K"]) -> student_kernels.Columns:
    return student_kernels.Columns(ids.shape[1], triton.next_power_of_2(ids.shape[1]))


def _stats_types(product: Float[Array, "T V"], student_map: StudentMap) -> list[jax.ShapeDtypeStruct | None]:
    """The types of max, log_sum, prediction and hard_log_sum."""
    number, column = (jax.ShapeDtypeStruct(product.shape[:1], dtype) for dtype in (jnp.float32, jnp.int32))
    return [number, number, column, number if student_map.with_hard_sum else None]


def _stats(outputs: Sequence[Any]) -> StudentStats:
    return StudentStats(SoftmaxStats(*outputs[:3]), outputs[3])
