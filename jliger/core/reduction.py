"""Sums and means over counted elements."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jliger.core import checks

Reduction = Literal["mean", "sum", "none"]
Normalizer = Num[Array, ""] | float | None


def check_reduction(reduction: str, normalizer: Any) -> None:
    """Raises for an unknown reduction, and for a normalizer without a mean."""
    checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer divides a mean; with reduction={reduction!r} divide the result, or pass 'mean'.")


def reduced(
    losses: Float[Array, "*B"], counted: Bool[Array, "*B"], reduction: Reduction, normalizer: Normalizer
) -> Float[Array, "..."]:
    """Reduces the counted losses. A mean divides by their number, or by `normalizer`."""
    losses = jnp.where(counted, losses, 0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else divided(total, divisor(counted.sum(), normalizer))


def divisor(count: Any, normalizer: Normalizer) -> Any:
    """The divisor of a mean: `normalizer`, without a gradient, or `count` if it is None."""
    if normalizer is None:
        return count
    normalizer = jax.lax.stop_gradient(jnp.asarray(normalizer))
    checks.check_normalizer(normalizer)
    return normalizer


def mean(values: Float[Array, "*B"], counted: Bool[Array, "*B"]) -> Float[Array, ""]:
    """The mean of the counted values; 0 if none counts."""
    return reduced(values, counted, "mean", None)


def divided(total: Float[Array, "*B"], count: Any) -> Float[Array, "*B"]:
    """`total / count`, and 0 for a count of 0."""
    count = jnp.asarray(count).astype(total.dtype)
    return jnp.where(count == 0, 0, total / jnp.where(count == 0, 1, count))


def weight_divisor(weight: Float[Array, ""]) -> Float[Array, ""]:
    """The weight, or 1 if it is 0, so that the mean of nothing is 0."""
    return jnp.where(weight == 0, 1, weight)
