"""Merges the statistics of devices that shard the vocabulary into those of all columns."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core.meshes import Axes
from jliger.ops.linear_head import chunks
from jliger.ops.linear_head.chunks import DistillationMerge, StudentMerge
from jliger.ops.logits import RowStats
from jliger.ops.logits.distillation import DistillationStats, SoftmaxStats
from jliger.ops.logits.top_k import TopLogits, first_of
from jliger.ops.logits.top_k_types import NO_COLUMN, StudentStats, TopKStats


def merge_over(axes: Axes, stats: RowStats) -> RowStats:
    """Merges each device's statistics over `axes`. Only arrays of size `[T]` are communicated."""
    row_max = jax.lax.pmax(stats.max, axes)
    sums = jax.tree.map(lambda part: jax.lax.psum(part, axes), chunks.shifted_sums(stats, row_max))
    return RowStats(
        max=row_max,
        log_sum=jnp.log(sums.sum_exp),
        label_logit=jax.lax.psum(stats.label_logit, axes),
        prediction=_first_with_max(axes, stats.prediction, stats.max == row_max),
        weighted_sum=None if stats.weighted_sum is None else jax.lax.psum(stats.weighted_sum, axes),
        mean_logit=None if sums.sum_exp_logit is None else sums.sum_exp_logit / sums.sum_exp,
    )


def _first_with_max(axes: Axes, prediction: Int[Array, " T"], has_max: Bool[Array, " T"]) -> Int[Array, " T"]:
    """The first column that has the maximum. Devices without the maximum contribute a number above every column."""
    return jax.lax.pmin(jnp.where(has_max, prediction, jnp.iinfo(prediction.dtype).max), axes)


def top_k_merge(axes: Axes, start: Int[Array, ""] | int, stats: TopKStats) -> TopKStats:
    """Merges the largest logits of each device, which begins with column `start`, over `axes`."""
    row_max = jax.lax.pmax(stats.max, axes)
    log_sum = _log_sum(axes, stats.log_sum, stats.max - row_max)
    ids = jnp.where(stats.top.ids == NO_COLUMN, NO_COLUMN, stats.top.ids + start)
    # Of each device only its k largest: tiny beside the products.
    every = [jax.lax.all_gather(part, axes, axis=1, tiled=True) for part in (ids, stats.top.logits)]
    return TopKStats(first_of(TopLogits(*every), ids.shape[1]), row_max, log_sum)


def _log_sum(axes: Axes, log_sum: Float[Array, " T"], step: Float[Array, " T"]) -> Float[Array, " T"]:
    """Merges logarithms of sums of exponentials; `step` is the change of the maximum that they are relative to."""
    # Clamped for the same reason as in `chunks.shifted_sums`.
    return jnp.log(jax.lax.psum(jnp.exp(log_sum + jnp.maximum(step, jnp.finfo(step.dtype).min)), axes))


def student_merge(temperature: float, axes: Axes, start: Int[Array, ""] | int) -> StudentMerge:
    """Functions that merge a model's softmaxes over `axes`; `start` is this device's first column."""

    def merge_stats(stats: StudentStats) -> StudentStats:
        softmax, hard_log_sum = stats
        row_max = jax.lax.pmax(softmax.max, axes)
        merged = SoftmaxStats(
            max=row_max,
            log_sum=_log_sum(axes, softmax.log_sum, (softmax.max - row_max) / temperature),
            prediction=_first_with_max(axes, softmax.prediction + start, softmax.max == row_max),
        )
        if hard_log_sum is not None:
            hard_log_sum = _log_sum(axes, hard_log_sum, softmax.max - row_max)
        return StudentStats(merged, hard_log_sum)

    return StudentMerge(merge_stats, lambda logits: jax.lax.psum(logits, axes))


def distillation_merge(temperature: float, axes: Axes, start: Int[Array, ""] | int) -> DistillationMerge:
    """Functions that merge distillation statistics over `axes`; `start` is this device's first column."""
    merge_student = student_merge(temperature, axes, start).stats

    def merge_stats(stats: DistillationStats) -> DistillationStats:
        student, hard_log_sum = merge_student(StudentStats(stats.student, stats.hard_log_sum))
        label_logit = None if stats.label_logit is None else jax.lax.psum(stats.label_logit, axes)
        teacher = merge_student(StudentStats(stats.teacher, None)).softmax
        return DistillationStats(student, teacher, label_logit, hard_log_sum)

    return DistillationMerge(
        merge_stats, lambda divergence: jax.tree.map(lambda part: jax.lax.psum(part, axes), divergence)
    )
