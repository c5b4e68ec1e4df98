"""Importance weights for tokens that were sampled by a program with slightly different probabilities."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.core.checks import coefficient
from jliger.core.reduction import divided, mean
from jliger.losses.arguments import constant, mask, real_arrays, sharded_like, zero_unless
from jliger.losses.ratios import Ratios, difference, held, k3


class SamplerMetrics(NamedTuple):
    """How much sampler and trainer differ, without gradients.

    Ratios and weights are those of the counted tokens for `level="token"`, and of the sequences with a counted token
    for `level="sequence"`. All are 0 if nothing counts.

    Attributes:
      count: int32 `[]`, the number of these tokens or sequences.
      mean_ratio: `[]`, mean of the ratios before they are bounded. Its expectation is 1.
      min_ratio: `[]`, the smallest ratio.
      max_ratio: `[]`, the largest ratio.
      mean_weight: `[]`, mean of the weights.
      fraction_low: `[]`, the fraction of ratios below `low`, which were truncated or masked.
      fraction_high: `[]`, the fraction of ratios above `high`.
      effective_fraction: `[]`, the effective sample size of the weights as a fraction of `count`: the square of their
        mean over the mean of their squares.
      kl: `[]`, mean over tokens of `r − 1 − log r` with the token's ratio `r`, an estimate of the KL divergence of the
        sampler from the trainer that is never negative ("k3").
      kl_k1: `[]`, mean over tokens of `−log r`, an estimate of the same that can be negative.
    """

    count: Int[Array, ""]
    mean_ratio: Float[Array, ""]
    min_ratio: Float[Array, ""]
    max_ratio: Float[Array, ""]
    mean_weight: Float[Array, ""]
    fraction_low: Float[Array, ""]
    fraction_high: Float[Array, ""]
    effective_fraction: Float[Array, ""]
    kl: Float[Array, ""]
    kl_k1: Float[Array, ""]


def sampler_correction(
    logprobs: Float[Array, "*B T"],
    sampler_logprobs: Float[Array, "*B T"],
    *,
    level: Literal["token", "sequence"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    low: Float[Array, ""] | float = 0.0,
    high: Float[Array, ""] | float = 2.0,
    where: Bool[Array, "*B T"] | None = None,
) -> tuple[Float[Array, "*B T"], SamplerMetrics]:
    r"""Importance weights that correct a policy loss for the mismatch between sampler and trainer.

    An inference engine computes slightly different probabilities $\mu(y_t)$ than the trainer's $\pi(y_t)$, even with
    the same parameters. Tokens that it sampled are therefore weighted by a ratio: that of the token,

    $$r_t = \frac{\pi(y_t)}{\mu(y_t)}$$

    or, with `level="sequence"`, that of its whole sequence, $r = \prod_t r_t$ over the counted tokens. Ratios have no
    upper limit, so they are bounded:

    | `mode` | weight | source |
    | --- | --- | --- |
    | `"truncate"` | $\min(\max(r, \mathrm{low}), \mathrm{high})$ | truncated importance sampling, arXiv:1802.01561 |
    | `"mask"` | $r$ if $\mathrm{low} \le r \le \mathrm{high}$, else 0 | IcePop, arXiv:2510.18855: tokens, 0.5 and 5 |

    Ratios of tokens are biased, since a token's ratio ignores the tokens before it, but vary little. Those of sequences
    are unbiased before they are bounded, and vary more with the length.

    Pass the weights to `grpo` or `ppo_clip`, or to their fused versions. A masked token is still one of those that the
    loss is divided by. To leave it out of them, pass `where & (weights > 0)` as the loss's `where`.

    A log-probability may be −∞: the ratio is then 0 or ∞, and 1 for a token with −∞ under both. A sequence with a token
    of ratio 0 has ratio 0. For log-ratios above 20, the metrics replace $e^x$ by its tangent.

    Args:
      logprobs: the trainer's log-probabilities of the sampled tokens, `[*B, T]`, under the policy that sampled them:
        those that the policy loss gets as `old_logprobs`, or, without these, the current ones.
      sampler_logprobs: the log-probabilities that the sampler returned, `[*B, T]`, of the distribution that it sampled
        from, with its temperature.
      level: `"token"` or `"sequence"`.
      mode: `"truncate"` or `"mask"`.
      low: the lower bound, at least 0.
      high: the upper bound, above 0 and at least `low`.
      where: bools `[*B, T]`, True for counted tokens: those of the completion. Values of other tokens are ignored.

    Returns:
      The weights, `[*B, T]`, float32 (float64 for float64 inputs), without a gradient, 0 for uncounted tokens; with
      `level="sequence"` the tokens of a sequence have the same weight. And `SamplerMetrics`.

    Raises:
      ValueError: a shape does not match, or an option is out of range.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jliger import losses
      >>> sampler_logprobs = jnp.log(jnp.array([[0.4, 0.2, 0.5], [0.5, 0.5, 0.5]]))
      >>> logprobs = jnp.log(jnp.array([[0.3, 0.6, 0.5], [0.5, 0.25, 0.5]]))  # ratios 0.75, 3, 1 and 1, 0.5, 1
      >>> weights, metrics = losses.sampler_correction(logprobs, sampler_logprobs, high=2.0)
      >>> print(weights.round(2), f"{metrics.max_ratio:.1f} {metrics.fraction_high:.2f}")
      [[0.75 2.   1.  ]
       [1.   0.5  1.  ]] 3.0 0.17
      >>> weights, _ = losses.sampler_correction(logprobs, sampler_logprobs, level="sequence", mode="mask", high=2.0)
      >>> print(weights.round(2))  # the ratios of the sequences are 2.25 and 0.5
      [[0.  0.  0. ]
       [0.5 0.5 0.5]]
      >>> loss, _ = losses.grpo(logprobs, jnp.array([1.0, -1.0]), weights=weights)
      >>> print(f"{loss:.2f}")  # 3 · 0.5 / 6
      0.25
    """
    checks.check_choice("level", level, ("token", "sequence"))
    checks.check_choice("mode", mode, ("truncate", "mask"))
    logprobs, sampler_logprobs = constant(
        *real_arrays("one number per token", logprobs=logprobs, sampler_logprobs=sampler_logprobs)
    )
    if logprobs.ndim < 1:
        raise ValueError("logprobs got a scalar; pass an array [*B, T].")
    low = coefficient("low", low, logprobs.dtype, least=0)
    high = coefficient("high", high, logprobs.dtype, above=0)
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise ValueError(f"low got {low}, which is above high = {high}; pass low <= high.")
    counted = mask("where", where, logprobs, "one bool per token")
    log_ratios = difference(*zero_unless(counted, logprobs, sampler_logprobs))
    units, of_units = counted, log_ratios
    if level == "sequence":
        # One token of probability 0 makes the sequence impossible, also next to a token of ratio ∞.
        impossible = jnp.isneginf(log_ratios).any(axis=-1, keepdims=True)
        units = counted.any(axis=-1, keepdims=True)
        of_units = jnp.where(impossible, -jnp.inf, log_ratios.sum(axis=-1, keepdims=True))
    bounded = held(of_units, low, high)
    weights = jnp.where(bounded.below | bounded.above, 0, bounded.values) if mode == "mask" else bounded.values
    metrics = _metrics(of_units, bounded, weights, units, log_ratios, counted)
    (weights,) = zero_unless(counted, sharded_like(counted, jnp.broadcast_to(weights, counted.shape)))
    return weights, metrics


def _metrics(
    of_units: Float[Array, "*U"],
    bounded: Ratios,
    weights: Float[Array, "*U"],
    units: Bool[Array, "*U"],
    log_ratios: Float[Array, "*B T"],
    counted: Bool[Array, "*B T"],
) -> SamplerMetrics:
    ratios = held(of_units, -jnp.inf, jnp.inf).values

    def share(flags: Bool[Array, "*U"]) -> Float[Array, ""]:
        return mean(flags.astype(weights.dtype), units)

    mean_weight = mean(weights, units)
    metrics = SamplerMetrics(
        count=units.sum(dtype=jnp.int32),
        mean_ratio=mean(ratios, units),
        min_ratio=jnp.where(units.any(), jnp.min(ratios, initial=jnp.inf, where=units), 0),
        max_ratio=jnp.max(ratios, initial=0, where=units),
        mean_weight=mean_weight,
        fraction_low=share(bounded.below),
        fraction_high=share(bounded.above),
        effective_fraction=divided(jnp.square(mean_weight), mean(jnp.square(weights), units)),
        kl=mean(k3(log_ratios), counted),
        kl_k1=mean(-log_ratios, counted),
    )
    return jax.lax.stop_gradient(metrics)
