"""The row functions in plain JAX, for every device and dtype. The Triton kernels are tested against them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jliger.ops.logits.types import Block, Coefficients, LogitMap, RowStats, StatsWanted


def row_stats(product: Float[Array, "T V"], block: Block, logit_map: LogitMap, wanted: StatsWanted) -> RowStats:
    logits, _, inside = _logits(product, block, logit_map)
    # Finite even if the block contains only −inf: exp(−inf − max) is then 0, and not NaN.
    row_max = jnp.maximum(logits.max(axis=1), jnp.finfo(logits.dtype).min)
    is_label = _is_label(product, block) & inside
    weighted_sum = None
    if wanted.weighted_sum:
        terms = logits if block.class_weights is None else logits * block.class_weights[None]
        weighted_sum = jnp.where(inside, terms, 0).sum(axis=1)
    below = logits - row_max[:, None]
    exp = jnp.exp(below)
    sum_exp = exp.sum(axis=1)
    mean_logit = None
    if wanted.mean_logit:
        # If the block contains only −inf, any mean is correct, but 0 / 0 would raise under `jax_debug_nans`.
        mean_logit = (exp * _finite(below)).sum(axis=1) / jnp.where(sum_exp == 0, 1, sum_exp)
    return RowStats(
        max=row_max,
        log_sum=jnp.log(sum_exp),
        label_logit=jnp.where(is_label, logits, 0).sum(axis=1),
        prediction=jnp.argmax(logits, axis=1).astype(jnp.int32),
        weighted_sum=weighted_sum,
        mean_logit=mean_logit,
    )


def row_grads(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
    *,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "T V"]:
    logits, dlogit_dproduct, inside = _logits(product, block, logit_map)
    probability, label, probability_lse, smoothing, probability_logit = coefficients
    if probability_lse is not None:
        probability = probability + probability_lse * (row_max + log_sum)
    below, factor = logits - row_max[:, None], probability[:, None]
    if probability_logit is not None:
        factor = factor + probability_logit[:, None] * _finite(below)
    grads = jnp.exp(below) * (factor * jnp.exp(-log_sum)[:, None])
    grads = grads - jnp.where(_is_label(product, block), label[:, None], 0)
    if smoothing is not None:
        u = 1 if block.class_weights is None else block.class_weights[None]
        grads = grads - smoothing[:, None] * u
    return jnp.where(inside, grads * dlogit_dproduct, 0).astype(dtype)


def row_stats_and_grads(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    wanted: StatsWanted,
    coefficients: Coefficients,
    *,
    dtype: jax.typing.DTypeLike,
) -> tuple[RowStats, Float[Array, "T V"]]:
    stats = row_stats(product, block, logit_map, wanted)
    return stats, row_grads(product, block, logit_map, stats.max, stats.log_sum, coefficients, dtype=dtype)


def _logits(
    product: Float[Array, "T V"], block: Block, logit_map: LogitMap
) -> tuple[Float[Array, "T V"], Float[Array, "T V"] | float, Bool[Array, "T V"]]:
    """The logits (−inf outside the block), their derivative by the product, and which columns are inside."""
    # NumPy's promotion: JAX's raises under jax_numpy_dtype_promotion="strict".
    logits = product.astype(np.promote_types(product.dtype, np.float32))
    if block.bias is not None:
        logits = logits + block.bias[None]
    logits = logits * logit_map.scale
    dlogit_dproduct = logit_map.scale
    if logit_map.softcap is not None:
        tanh = jnp.tanh(logits / logit_map.softcap)
        logits, dlogit_dproduct = logit_map.softcap * tanh, dlogit_dproduct * (1 - tanh * tanh)
    if block.inverse_temperature is not None:
        by_row = block.inverse_temperature[:, None]
        logits, dlogit_dproduct = logits * by_row, dlogit_dproduct * by_row
    columns = jax.lax.broadcasted_iota(jnp.int32, product.shape, 1)
    inside = columns < (logit_map.width if block.width is None else block.width)
    if logit_map.masked:
        inside &= product != -jnp.inf
    return jnp.where(inside, logits, -jnp.inf), dlogit_dproduct, inside


def _finite(below: Float[Array, "T V"]) -> Float[Array, "T V"]:
    """`z − max`, clipped from below where its exponential is 0, for use in `exp(z − max) · (z − max)`.

    Without clipping, z = −inf gives 0 · inf = NaN. The bound is small, so that its product with a large coefficient
    does not overflow.
    """
    return jnp.maximum(below, -1024)  # exp(−1024) is 0, in float64 too.


def _is_label(product: Float[Array, "T V"], block: Block) -> Bool[Array, "T V"]:
    return jax.lax.broadcasted_iota(jnp.int32, product.shape, 1) == block.labels[:, None]
