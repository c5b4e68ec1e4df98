"""Ratios of probabilities: finite, however far apart two policies are, and held within bounds."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# From here on e^x is taken along its tangent. In float32 it would overflow at 88, and the square of a gradient at 44.
_LARGEST = 20.0


class Ratios(NamedTuple):
    """Ratios within bounds, and which of them were not.

    Attributes:
      values: `[*B]`; without a gradient where a bound holds them.
      below: `[*B]`, those held from below.
      above: `[*B]`, those held from above.
    """

    values: Float[Array, "*B"]
    below: Bool[Array, "*B"]
    above: Bool[Array, "*B"]


def held(log_ratios: Float[Array, "*B"], lower: Any, upper: Any) -> Ratios:
    """Ratios held within `[lower, upper]`."""
    ratios = _exp(log_ratios)
    below, above = ratios < lower, ratios > upper
    return Ratios(jnp.where(below, lower, jnp.where(above, upper, ratios)), below, above)


def clipped(
    log_ratios: Float[Array, "*B"],
    advantages: Float[Array, "*B"],
    epsilon_low: Any,
    epsilon_high: Any,
    delta: float | None,
) -> Ratios:
    """Ratios such that `ratio · advantage` is the minimum of the clipped and the unclipped one.

    The minimum is a bound from above for a positive advantage, and from below for a negative one; `delta` is the
    latter's bound from above.
    """
    lower = jnp.where(advantages < 0, 1 - epsilon_low, 0)
    upper = jnp.where(advantages > 0, 1 + epsilon_high, jnp.inf if delta is None else delta)
    return held(log_ratios, lower, upper)


def k3(log_ratios: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`e^x − 1 − x`, an estimate of a divergence that is never negative: http://joschu.net/blog/kl-approx.html."""
    inside = jnp.minimum(log_ratios, _LARGEST)
    return jnp.expm1(inside) + jnp.exp(inside) * (log_ratios - inside) - log_ratios


def _exp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    inside = jnp.minimum(x, _LARGEST)
    return jnp.exp(inside) * (1 + (x - inside))
