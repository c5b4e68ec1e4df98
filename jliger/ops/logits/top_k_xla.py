"""The row functions of `top_k` and `top_k_kl` in plain JAX, for every device and dtype."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.ops.logits.distillation_xla import _softmax_stats
from jliger.ops.logits.top_k_types import NO_COLUMN, StudentCoefficients, StudentMap, StudentStats, TopLogits
from jliger.ops.logits.types import Block, LogitMap
from jliger.ops.logits.xla import _is_label, _logits

_GROUP = 32  # columns per group


def top_logits(product: Float[Array, "T V"], block: Block, logit_map: LogitMap, k: int) -> TopLogits:
    """The k largest logits, selected in two stages, because on most devices `jax.lax.top_k` sorts.

    The k groups with the largest maxima contain the k largest logits: a logit in another group is preceded by the k
    maxima. Groups are contiguous, so that of equal maxima the first group has the lower ids.
    """
    logits, _, inside = _logits(product, block, logit_map)
    logits = jnp.where(logits == 0, 0, logits)  # `jax.lax.top_k` puts 0 before −0
    rows, width = product.shape
    # Columns that are not inside come last, after those with −inf.
    ids = jnp.where(inside, jax.lax.broadcasted_iota(jnp.int32, product.shape, 1), NO_COLUMN)
    num_groups = -(-width // _GROUP)
    if num_groups > k:
        padding = ((0, 0), (0, num_groups * _GROUP - width))
        logits = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(rows, num_groups, _GROUP)
        ids = jnp.pad(ids, padding, constant_values=NO_COLUMN).reshape(rows, num_groups, _GROUP)
        groups = jnp.sort(jax.lax.top_k(logits.max(axis=2), k)[1], axis=1)[:, :, None]
        logits, ids = (jnp.take_along_axis(array, groups, axis=1).reshape(rows, -1) for array in (logits, ids))
    elif width < k:
        padding = ((0, 0), (0, k - width))
        logits = jnp.pad(logits, padding, constant_values=-jnp.inf)
        ids = jnp.pad(ids, padding, constant_values=NO_COLUMN)
    # Candidates are in the order of their ids, and `jax.lax.top_k` prefers the earlier of equals.
    values, places = jax.lax.top_k(logits, k)
    return TopLogits(jnp.take_along_axis(ids, places, axis=1), values)


def student_stats(product: Float[Array, "T V"], block: Block, student_map: StudentMap) -> StudentStats:
    logits, _, _ = _logits(product, block, student_map.logits)
    softmax = _softmax_stats(logits, student_map.temperature)
    if not student_map.with_hard_sum:
        return StudentStats(softmax, None)
    return StudentStats(softmax, jnp.log(jnp.exp(logits - softmax.max[:, None]).sum(axis=1)))


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
) -> Float[Array, "T V"]:
    grads, by_product, inside = _logit_grads(product, block, student_map, stats, coefficients)
    grads = jnp.where(inside, grads * by_product, 0).astype(dtype)
    return at_columns(grads, ids).set(column_grads.astype(dtype), mode="drop", unique_indices=True)


def student_stats_and_grads(
    product: Float[Array, "T V"],
    block: Block,
    student_map: StudentMap,
    coefficients: StudentCoefficients,
    ids: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    *,
    dtype: jax.typing.DTypeLike,
) -> tuple[StudentStats, Float[Array, "T V"]]:
    stats = student_stats(product, block, student_map)
    grads, by_product, inside = _logit_grads(product, block, student_map, stats, coefficients)
    grads = at_columns(grads, ids).add(-shares, mode="drop", unique_indices=True)
    return stats, jnp.where(inside, grads * by_product, 0).astype(dtype)


def at_columns(array: Float[Array, "T V"], ids: Int[Array, "T K"]) -> Any:
    """`array.at` some columns of each row, each at most once; out of range for negative ids."""
    rows, width = array.shape
    # XLA is promised unique indices, so those out of range differ, too.
    ids = jnp.where(ids < 0, width + jnp.arange(ids.shape[1]), ids)
    return array.at[jnp.arange(rows)[:, None], ids]


def _logit_grads(
    product: Float[Array, "T V"],
    block: Block,
    student_map: StudentMap,
    stats: StudentStats,
    coefficients: StudentCoefficients,
) -> tuple[Float[Array, "T V"], Float[Array, "T V"] | float, Bool[Array, "T V"]]:
    """The gradients by the logits, without what the teacher's columns add; `_logits` describes the other results."""
    logits, by_product, inside = _logits(product, block, student_map.logits)
    below = logits - stats.softmax.max[:, None]
    grads = jnp.exp(below * (1 / student_map.temperature) - stats.softmax.log_sum[:, None])
    grads = coefficients.soft[:, None] * grads
    if coefficients.hard is not None and stats.hard_log_sum is not None:
        grads = grads + coefficients.hard[:, None] * jnp.exp(below - stats.hard_log_sum[:, None])
    if coefficients.label is not None:
        grads = grads - jnp.where(_is_label(product, block), coefficients.label[:, None], 0)
    return grads, by_product, inside
