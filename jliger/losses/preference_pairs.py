"""Code shared by the losses on pairs: a chosen and a rejected completion of one prompt."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core.reduction import Normalizer, Reduction, mean, reduced
from jliger.losses.ratios import difference

PAIRS = "one number per pair"
BOOL_PER_PAIR = "one bool per pair"

Loss = Float[Array, ""] | Float[Array, " B"]


class PreferenceMetrics(NamedTuple):
    """Metrics of a preference loss, without gradients.

    Means are over the counted pairs and do not depend on `normalizer`; they are 0 if no pair counts. To combine the
    means of several calls, weight them by `count`.

    Attributes:
      count: int32 `[]`, the number of counted pairs.
      preference_loss: the loss without its likelihood term, reduced like the loss.
      nll: the weighted likelihood term, reduced like the loss; 0 if the loss has none.
      chosen_rewards: `[]`, mean implicit reward of the chosen completions: `β` times the log-ratio to the reference, or
        `β` times the log-probability if the loss has no reference.
      rejected_rewards: `[]`, mean implicit reward of the rejected completions.
      margins: `[]`, mean of the chosen reward minus the rejected reward.
      accuracy: `[]`, the fraction of pairs whose chosen reward is larger.
    """

    count: Int[Array, ""]
    preference_loss: Loss
    nll: Loss
    chosen_rewards: Float[Array, ""]
    rejected_rewards: Float[Array, ""]
    margins: Float[Array, ""]
    accuracy: Float[Array, ""]


class Rewards(NamedTuple):
    """Implicit rewards of pairs."""

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]

    @property
    def margin(self) -> Float[Array, " B"]:
        """The chosen reward minus the rejected reward."""
        return difference(self.chosen, self.rejected)


def smoothed_logistic(margin: Float[Array, " B"], label_smoothing: float) -> Float[Array, " B"]:
    """`−(1 − ε) log σ(z) − ε log σ(−z)`: the label is wrong with probability `ε`."""
    loss = jax.nn.softplus(-margin)
    return (1 - label_smoothing) * loss + label_smoothing * jax.nn.softplus(margin) if label_smoothing else loss


def result(
    preference_losses: Float[Array, " B"],
    nlls: Float[Array, " B"],
    rewards: Rewards,
    counted: Bool[Array, " B"],
    reduction: Reduction,
    normalizer: Normalizer,
) -> tuple[Loss, PreferenceMetrics]:
    """The reduced loss and its metrics."""
    preference_loss = reduced(preference_losses, counted, reduction, normalizer)
    nll = reduced(nlls, counted, reduction, normalizer)
    metrics = PreferenceMetrics(
        count=counted.sum(dtype=jnp.int32),
        preference_loss=preference_loss,
        nll=nll,
        chosen_rewards=mean(rewards.chosen, counted),
        rejected_rewards=mean(rewards.rejected, counted),
        margins=mean(rewards.margin, counted),
        accuracy=mean((rewards.margin > 0).astype(rewards.margin.dtype), counted),
    )
    return preference_loss + nll, jax.lax.stop_gradient(metrics)
