"""Kahneman-Tversky optimisation (KTO): each completion is labelled good or bad; no pairs are needed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.core.checks import coefficient
from jliger.core.reduction import Normalizer, Reduction, check_reduction, divided, mean, reduced
from jliger.losses.arguments import constant, mask, sequence_arrays, sharded_like, zero_unless
from jliger.losses.preference_pairs import Loss
from jliger.losses.ratios import difference, times

_SEQUENCES = "one number per sequence"
_BOOL_PER_SEQUENCE = "one bool per sequence"


class KTOMetrics(NamedTuple):
    """Metrics of `kto`, without gradients.

    Means are over the counted sequences of one kind and do not depend on `normalizer`; they are 0 if there are none.

    Attributes:
      desirable_count: int32 `[]`, the number of counted desirable sequences.
      undesirable_count: int32 `[]`, the number of counted undesirable sequences.
      desirable_rewards: `[]`, mean implicit reward of the desirable sequences: `β` times the log-ratio to the
        reference.
      undesirable_rewards: `[]`, mean implicit reward of the undesirable sequences.
      margins: `[]`, `desirable_rewards` minus `undesirable_rewards`.
      accuracy: `[]`, the fraction of sequences on the right side of the reference point: log-ratio above `kl` for a
        desirable sequence, at most `kl` for an undesirable one.
    """

    desirable_count: Int[Array, ""]
    undesirable_count: Int[Array, ""]
    desirable_rewards: Float[Array, ""]
    undesirable_rewards: Float[Array, ""]
    margins: Float[Array, ""]
    accuracy: Float[Array, ""]


def kto(
    logprobs: Float[Array, " B"],
    ref_logprobs: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    *,
    kl: Float[Array, ""] | Float[Array, " B"] | float,
    beta: Float[Array, ""] | float = 0.1,
    desirable_weight: Float[Array, ""] | float = 1.0,
    undesirable_weight: Float[Array, ""] | float = 1.0,
    where: Bool[Array, " B"] | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
) -> tuple[Loss, KTOMetrics]:
    r"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024, arXiv:2402.01306).

    With the log-ratio $r = \log \pi(y) - \log \pi_\mathrm{ref}(y)$ and the reference point $z_0$ (`kl`), the loss of a
    sequence is

    $$\lambda_D\, (1 - \sigma(\beta (r - z_0))) \text{ if it is desirable}, \qquad
      \lambda_U\, (1 - \sigma(\beta (z_0 - r))) \text{ if not}.$$

    With `kl=0.0` this is TRL's `apo_zero_unpaired`.

    Args:
      logprobs: log-probabilities of sequences, `[B]`: sums over tokens, see `sequence_logprobs`. The only argument with
        a gradient.
      ref_logprobs: the same under the reference, `[B]`.
      desirable: bools `[B]`, True for a good completion.
      kl: `z₀`: a scalar, such as `kto_kl` returns, or one number per sequence, `[B]`.
      beta: `β`, at least 0.
      desirable_weight: `λ_D`, at least 0.
      undesirable_weight: `λ_U`, at least 0.
      where: bools `[B]`, True for counted sequences. Exclude empty sequences: `counts > 0`.
      reduction: `"mean"` over the counted sequences, `"sum"`, or `"none"` for the loss of each sequence, 0 for
        uncounted sequences.
      normalizer: with `"mean"`, the divisor to use instead, such as the number of sequences in the whole batch when
        accumulating microbatches. No gradient.

    Returns:
      The loss, float32 (float64 for float64 inputs), `[]`, or `[B]` with `"none"`; and `KTOMetrics`.

    Raises:
      ValueError: a shape does not match, or an option is out of range.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jliger import losses
      >>> logprobs, ref_logprobs = jnp.array([-8.0, -9.0]), jnp.array([-10.0, -9.5])
      >>> loss, metrics = losses.kto(logprobs, ref_logprobs, jnp.array([True, False]), kl=1.0, beta=1.0)
      >>> print(f"{loss:.4f} {metrics.margins:.1f} {metrics.accuracy:.1f}")  # (σ(-1) + σ(-0.5)) / 2
      0.3232 1.5 1.0
    """
    check_reduction(reduction, normalizer)
    logprobs, ref_logprobs = sequence_arrays(_SEQUENCES, logprobs=logprobs, ref_logprobs=ref_logprobs)
    dtype = logprobs.dtype
    beta = coefficient("beta", beta, dtype, least=0)
    desirable_weight = coefficient("desirable_weight", desirable_weight, dtype, least=0)
    undesirable_weight = coefficient("undesirable_weight", undesirable_weight, dtype, least=0)
    desirable = mask("desirable", checks.as_array("desirable", desirable), logprobs, _BOOL_PER_SEQUENCE)
    counted = mask("where", where, logprobs, _BOOL_PER_SEQUENCE)
    kl = checks.as_array("kl", kl).astype(dtype)
    if kl.ndim:
        checks.check_shape("kl", kl, logprobs.shape, "one number, or one per sequence")
    kl = sharded_like(logprobs, jnp.broadcast_to(kl, logprobs.shape))
    logprobs, ref_logprobs, kl = zero_unless(counted, logprobs, *constant(ref_logprobs, kl))

    log_ratios = difference(logprobs, ref_logprobs)
    advantages = difference(log_ratios, kl)
    gain = jnp.where(desirable, advantages, -advantages)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight).astype(dtype)
    # 1 − σ(x) as σ(−x): near 1, the difference would round to 0 and lose the gradient.
    loss = reduced(weight * jax.nn.sigmoid(-times(beta, gain)), counted, reduction, normalizer)

    rewards = times(beta, log_ratios)
    desirable_rewards, undesirable_rewards = mean(rewards, counted & desirable), mean(rewards, counted & ~desirable)
    metrics = KTOMetrics(
        desirable_count=(counted & desirable).sum(dtype=jnp.int32),
        undesirable_count=(counted & ~desirable).sum(dtype=jnp.int32),
        desirable_rewards=desirable_rewards,
        undesirable_rewards=undesirable_rewards,
        margins=difference(desirable_rewards, undesirable_rewards),
        accuracy=mean(((log_ratios > kl) == desirable).astype(logprobs.dtype), counted),
    )
    return loss, jax.lax.stop_gradient(metrics)


def kto_kl(
    logprobs: Float[Array, " B"],
    ref_logprobs: Float[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    r"""The reference point of `kto`: an estimate of the KL divergence of the policy from the reference.

    $$\max\Big(0, \frac{1}{m} \sum_i \big(\log \pi(y'_i \mid x_i) - \log \pi_\mathrm{ref}(y'_i \mid x_i)\big)\Big)$$

    where $y'_i$ is a completion of another prompt of the batch (Ethayarajh et al., 2024, arXiv:2402.01306). The result
    has no gradient.

    Args:
      logprobs: log-probabilities of mismatched completions, `[B]`: sums over tokens.
      ref_logprobs: the same under the reference, `[B]`.
      where: bools `[B]`, True for counted sequences.
      axis_name: inside a `jax.shard_map`, the manual axis or axes that shard the sequences. The mean must be over all
        devices before the maximum with 0 is taken.

    Returns:
      `[]`, float32 (float64 for float64 inputs); 0 if no sequence counts.

    Raises:
      ValueError: a shape does not match.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jliger import losses
      >>> print(losses.kto_kl(jnp.array([-8.0, -9.0]), jnp.array([-10.0, -9.5])))
      1.25
    """
    logprobs, ref_logprobs = sequence_arrays(_SEQUENCES, logprobs=logprobs, ref_logprobs=ref_logprobs)
    counted = mask("where", where, logprobs, _BOOL_PER_SEQUENCE)
    logprobs, ref_logprobs = zero_unless(counted, logprobs, ref_logprobs)
    total, count = constant(difference(logprobs, ref_logprobs).sum(), counted.sum())
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return jnp.maximum(divided(total, count), 0)
