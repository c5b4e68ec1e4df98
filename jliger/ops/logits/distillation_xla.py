"""The distillation row functions in plain JAX, for every device and dtype.

The Triton kernels are tested against them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.ops.logits.distillation_types import (
    DistillationBlock,
    DistillationCoefficients,
    DistillationMap,
    DistillationStats,
    Divergence,
    Products,
    SoftmaxStats,
)
from jliger.ops.logits.types import Block, LogitMap
from jliger.ops.logits.xla import _is_label, _logits


def distillation_stats(
    products: Products, block: DistillationBlock, distillation_map: DistillationMap
) -> DistillationStats:
    logits, _, inside = _logits(products.student, block.student, distillation_map.student)
    teacher_logits, _, _ = _logits(products.teacher, block.teacher, distillation_map.teacher)
    student, teacher = (_softmax_stats(z, distillation_map.temperature) for z in (logits, teacher_logits))
    label_logit = hard_log_sum = None
    if distillation_map.with_labels:
        is_label = _is_label(products.student, block.student) & inside
        label_logit = jnp.where(is_label, logits, 0).sum(axis=1)
    if distillation_map.with_hard_sum:
        hard_log_sum = jnp.log(jnp.exp(logits - student.max[:, None]).sum(axis=1))
    return DistillationStats(student, teacher, label_logit, hard_log_sum)


def distillation_divergence(
    products: Products, block: DistillationBlock, distillation_map: DistillationMap, stats: DistillationStats
) -> Divergence:
    _, q, terms = _compared(products, block, distillation_map, stats)
    return Divergence(terms.sum(axis=1), q.sum(axis=1))


def distillation_grads(
    products: Products,
    block: DistillationBlock,
    distillation_map: DistillationMap,
    stats: DistillationStats,
    q_sum: Float[Array, " T"],
    coefficients: DistillationCoefficients,
    *,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "T V"]:
    logits, by_product, inside = _logits(products.student, block.student, distillation_map.student)
    p, q, _ = _compared(products, block, distillation_map, stats)
    soft = coefficients.soft[:, None]
    grads = jnp.where(soft == 0, 0, soft * (q - p * q_sum[:, None]))
    if coefficients.probability is not None and coefficients.label is not None:
        if stats.hard_log_sum is not None:
            p = jnp.exp(logits - stats.student.max[:, None] - stats.hard_log_sum[:, None])
        grads = grads + coefficients.probability[:, None] * p
        grads = grads - jnp.where(_is_label(products.student, block.student), coefficients.label[:, None], 0)
    return jnp.where(inside, grads * by_product, 0).astype(dtype)


def distillation_stats_and_grads(
    products: Products,
    block: DistillationBlock,
    distillation_map: DistillationMap,
    coefficients: DistillationCoefficients,
    *,
    dtype: jax.typing.DTypeLike,
) -> tuple[DistillationStats, Divergence, Float[Array, "T V"]]:
    stats = distillation_stats(products, block, distillation_map)
    divergence = distillation_divergence(products, block, distillation_map, stats)
    grads = distillation_grads(products, block, distillation_map, stats, divergence.q_sum, coefficients, dtype=dtype)
    return stats, divergence, grads


def _softmax_stats(logits: Float[Array, "T V"], temperature: float) -> SoftmaxStats:
    # Finite even if all logits are −inf: exp(−inf − max) is then 0, and not NaN.
    row_max = jnp.maximum(logits.max(axis=1), jnp.finfo(logits.dtype).min)
    exps = jnp.exp((logits - row_max[:, None]) * (1 / temperature))
    return SoftmaxStats(row_max, jnp.log(exps.sum(axis=1)), jnp.argmax(logits, axis=1).astype(jnp.int32))


def _compared(
    products: Products, block: DistillationBlock, distillation_map: DistillationMap, stats: DistillationStats
) -> tuple[Float[Array, "T V"], Float[Array, "T V"], Float[Array, "T V"]]:
    """`p`, `q` and the terms of `D`, as defined in `jliger.ops.logits.distillation_types`."""

    def log_probs(product: Float[Array, "T V"], block: Block, logit_map: LogitMap, stats: SoftmaxStats) -> Array:
        logits, _, _ = _logits(product, block, logit_map)
        return (logits - stats.max[:, None]) * (1 / distillation_map.temperature) - stats.log_sum[:, None]

    beta = distillation_map.beta
    log_p = log_probs(products.student, block.student, distillation_map.student, stats.student)
    log_r = log_probs(products.teacher, block.teacher, distillation_map.teacher, stats.teacher)
    p, r = jnp.exp(log_p), jnp.exp(log_r)

    def times(weight: Array, left: Array, right: Array) -> Array:
        """`weight · (left − right)`, and 0 for a weight of 0, where both may be −inf and their difference NaN."""
        is_zero = weight == 0  # False for NaN, so that NaN propagates.
        return weight * (jnp.where(is_zero, 0, left) - jnp.where(is_zero, 0, right))

    if beta == 0:
        return p, -r, times(r, log_r, log_p)
    if beta == 1:
        q = times(p, log_p, log_r)
        return p, q, q
    m = beta * r + (1 - beta) * p
    tiniest = jnp.finfo(m.dtype).tiny
    log_m = jnp.log(jnp.where(m < tiniest, tiniest, m))
    q = times((1 - beta) * p, log_p, log_m)
    return p, q, q + times(beta * r, log_r, log_m)
