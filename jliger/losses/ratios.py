"""Ratios of probabilities: finite, however far apart two policies are, and held within bounds.

A log-probability may be −∞: that of a masked token. IEEE arithmetic has 0 · ∞ = NaN and ∞ − ∞ = NaN, in a derivative as
in a value, and a NaN that `jnp.where` leaves out of the value still reaches the gradient. So the losses take products,
differences and exponentials from here.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# From here on e^x is taken along its tangent. In float32 it would overflow at 88, and the square of a gradient at 44.
_LARGEST = 20.0

# Beyond it σ(x) is 0 or 1, and softplus(x) is 0 or x, to the last digit of float64.
_SATURATED = 1e3


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
    inside, excess = _split(log_ratios)
    # At x = ∞ the tangent of e^x less x would be ∞ − ∞.
    return jnp.expm1(inside) - inside + (math.exp(_LARGEST) - 1) * excess


@jax.custom_jvp
def difference(a: Float[Array, "*B"], b: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`a − b`, and 0 for two equal infinities: what two policies mask alike has a ratio of 1."""
    return jnp.where(a == b, 0, a - b)


difference.defjvps(lambda tangent, *_: tangent, lambda tangent, *_: -tangent)


def times(factor: Any, values: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`factor · values`, and 0 for 0 · ∞; `factor` is a number, or of the shape of `values`."""
    nothing = jnp.isinf(values) & (jnp.asarray(factor) == 0)
    return factor * jnp.where(nothing, 0, values)


def saturated(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`x` for a function that has reached its limits beyond ±1000, such as `σ(x) log σ(x)`: no infinity goes in."""
    return jnp.clip(x, -_SATURATED, _SATURATED)


def _exp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    inside, excess = _split(x)
    return jnp.exp(inside) + math.exp(_LARGEST) * excess


def _split(x: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """`x` up to the largest exponent, and by how much it exceeds it."""
    exceeds = x > _LARGEST
    return jnp.where(exceeds, _LARGEST, x), jnp.where(exceeds, x - _LARGEST, 0)
