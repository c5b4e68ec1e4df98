"""Norms in plain JAX, for every device, dtype and sharding. The Triton kernels are tested against them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core.dtypes import accumulator_dtype
from jliger.ops.norms.types import NormConfig, NormGrads, NormInputs, NormResult, NormSaved


def norm(config: NormConfig, inputs: NormInputs) -> NormResult:
    x, residual, scale, offset = inputs
    total = None if residual is None else x + residual
    wide = (x if total is None else total).astype(accumulator_dtype(x.dtype))
    if total is not None:
        wide = _rounded(wide, x.dtype)
    mean = wide.mean(axis=-1) if config.centered else None
    centered = wide if mean is None else wide - mean[..., None]
    # The variance of the centered values: E[x²] − E[x]² would lose digits by cancellation.
    inverse = jax.lax.rsqrt((centered * centered).mean(axis=-1) + config.epsilon)
    normalized = centered * inverse[..., None]
    if config.round_first:
        normalized = _rounded(normalized, x.dtype)
    output = normalized * _factor(config, scale, wide)
    if offset is not None:
        output = output + _like_rows(offset, wide)
    return NormResult(output.astype(config.dtype), total, mean, inverse)


def norm_grads(config: NormConfig, saved: NormSaved) -> NormGrads:
    """Gradients from those of the two results. Rounding counts as the identity."""
    total, scale, mean, inverse, grad, total_grad = saved
    dtype = accumulator_dtype(total.dtype)
    wide, wide_grad = total.astype(dtype), grad.astype(dtype)
    centered = wide if mean is None else wide - mean[..., None]
    normalized = centered * inverse[..., None]
    scaled = wide_grad * _factor(config, scale, wide)
    x_grad = scaled - normalized * (scaled * normalized).mean(axis=-1, keepdims=True)
    if config.centered:
        x_grad = x_grad - scaled.mean(axis=-1, keepdims=True)
    x_grad = x_grad * inverse[..., None]
    if total_grad is not None:
        x_grad = x_grad + total_grad.astype(dtype)
    rows = tuple(range(total.ndim - 1))
    offset_grad = wide_grad.sum(axis=rows) if config.with_offset else None
    return NormGrads(x_grad.astype(total.dtype), (wide_grad * normalized).sum(axis=rows), offset_grad)


def _rounded(values: Float[Array, "*B H"], dtype: jax.typing.DTypeLike) -> Float[Array, "*B H"]:
    """Values rounded to `dtype`, in their own. Not by two casts, which XLA may remove."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(values, info.nexp, info.nmant)


def _factor(config: NormConfig, scale: Float[Array, " H"], rows: Float[Array, "*B H"]) -> Float[Array, "..."]:
    factor = _like_rows(scale, rows)
    return factor + config.scale_offset if config.scale_offset else factor


def _like_rows(parameter: Float[Array, " H"], rows: Float[Array, "*B H"]) -> Float[Array, "..."]:
    """A parameter of the rows' dtype and rank: `jax_numpy_rank_promotion="raise"` allows no other."""
    return jnp.expand_dims(parameter.astype(rows.dtype), tuple(range(rows.ndim - 1)))
