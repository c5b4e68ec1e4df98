"""Probability ratios that stay finite for any two policies, and can be clipped.

A log-probability may be −∞, for example that of a masked token. IEEE arithmetic gives 0 · ∞ = NaN and ∞ − ∞ = NaN, in
values and in derivatives. `jnp.where` removes such a NaN from the value but not from the gradient. The losses therefore
use the products, differences and exponentials of this module.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Above this, e^x is replaced by its tangent. In float32, e^x overflows at 88, and the square of a gradient at 44.
_LARGEST = 20.0

# Beyond ±1000, σ(x) is 0 or 1 and softplus(x) is 0 or x, exactly in float64.
_SATURATED = 1e3


class Ratios(NamedTuple):
    """Clipped ratios, and which of them were clipped.

    Attributes:
      values: `[*B]`; the gradient of a clipped ratio is 0.
      below: `[*B]`, True where a ratio was below its lower bound.
      above: `[*B]`, True where a ratio was above its upper bound.
    """

    values: Float[Array, "*B"]
    below: Bool[Array, "*B"]
    above: Bool[Array, "*B"]


def held(log_ratios: Float[Array, "*B"], lower: Any, upper: Any) -> Ratios:
    """Ratios clipped to `[lower, upper]`."""
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
    """Ratios for which `ratio · advantage` is the minimum of the clipped and the unclipped product.

    The minimum clips the ratio from above if the advantage is positive, and from below if it is negative. `delta` also
    clips the ratio from above if the advantage is negative.
    """
    lower = jnp.where(advantages < 0, 1 - epsilon_low, 0)
    upper = jnp.where(advantages > 0, 1 + epsilon_high, jnp.inf if delta is None else delta)
    return held(log_ratios, lower, upper)


def soft_gated(log_ratios: Float[Array, "*B"], advantages: Float[Array, "*B"], tau_pos: Any, tau_neg: Any) -> Ratios:
    """Sigmoid gates `4/τ · σ(τ (ratio − 1))`, whose slope is 1 at a ratio of 1; nothing is clipped."""
    tau = jnp.where(advantages > 0, tau_pos, tau_neg).astype(log_ratios.dtype)
    gates = 4 / tau * jax.nn.sigmoid(tau * (_exp(log_ratios) - 1))
    nothing = jnp.zeros_like(gates, dtype=bool)
    return Ratios(gates, nothing, nothing)


def k3(log_ratios: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`e^x − 1 − x`, a non-negative estimate of a KL divergence: http://joschu.net/blog/kl-approx.html."""
    inside, excess = _split(log_ratios)
    # The tangent of e^x, minus x, as one product: at x = ∞ their difference would be ∞ − ∞.
    return jnp.expm1(inside) - inside + (math.exp(_LARGEST) - 1) * excess


def expm1(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`e^x − 1`, or its tangent for large `x`."""
    inside, excess = _split(x)
    return jnp.expm1(inside) + math.exp(_LARGEST) * excess


@jax.custom_jvp
def difference(a: Float[Array, "*B"], b: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`a − b`; 0 for two equal infinities, so that a token masked under both policies has ratio 1."""
    return jnp.where(a == b, 0, a - b)


difference.defjvps(lambda tangent, *_: tangent, lambda tangent, *_: -tangent)


def times(factor: Any, values: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`factor · values`, with 0 · ∞ = 0. `factor` is a scalar or has the shape of `values`."""
    nothing = jnp.isinf(values) & (jnp.asarray(factor) == 0)
    return factor * jnp.where(nothing, 0, values)


def saturated(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`x` clipped to ±1000, where functions such as `σ(x) log σ(x)` have reached their limits; no infinity remains."""
    return jnp.clip(x, -_SATURATED, _SATURATED)


def _exp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    inside, excess = _split(x)
    return jnp.exp(inside) + math.exp(_LARGEST) * excess


def _split(x: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """`min(x, _LARGEST)` and `max(x − _LARGEST, 0)`."""
    exceeds = x > _LARGEST
    return jnp.where(exceeds, _LARGEST, x), jnp.where(exceeds, x - _LARGEST, 0)
