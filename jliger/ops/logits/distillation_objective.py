"""The formula of the distillation losses, as a function of what is found of each token."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.ops.logits import RowStats
from jliger.ops.logits.distillation import PairCoefficients
from jliger.ops.logits.distillation_types import Comparison
from jliger.ops.logits.objectives import CrossEntropy, Labels, LossWeights


class DistillationWeights(NamedTuple):
    """What multiplies the two parts of each token's loss in the reduced one; 0 for a token that doesn't count.

    Attributes:
      soft: of the divergence from the teacher.
      hard: of the cross entropy with the labels; None without them.
    """

    soft: Float[Array, "*B"]
    hard: Float[Array, "*B"] | None


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A divergence from a teacher, and the cross entropy with labels.

    Attributes:
      temperature: of the divergence.
      vocab_size: `V`.
    """

    temperature: float
    vocab_size: int

    @property
    def _cross_entropy(self) -> CrossEntropy:
        return CrossEntropy(label_smoothing=0.0, z_loss=0.0, vocab_size=self.vocab_size)

    def weighted_sums(
        self, found: Comparison, labels: Labels | None, weights: DistillationWeights
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """`Σ_t weights.soft_t · divergence_t` and `Σ_t weights.hard_t · cross entropy_t`."""
        soft = jnp.sum(found.divergence * weights.soft)
        if labels is None or weights.hard is None:
            return soft, jnp.zeros_like(soft)
        student = found.pair.student
        assert found.pair.label_logit is not None
        stats = RowStats(
            max=student.max,
            log_sum=student.log_sum if found.pair.hard_log_sum is None else found.pair.hard_log_sum,
            label_logit=found.pair.label_logit,
            prediction=student.prediction,
        )
        hard, _ = self._cross_entropy.weighted_sums(stats, labels, LossWeights(weights.hard, 0 * weights.hard))
        return soft, hard

    def total(self, found: Comparison, labels: Labels | None, weights: DistillationWeights) -> Float[Array, ""]:
        """Both together: the reduced loss."""
        soft, hard = self.weighted_sums(found, labels, weights)
        return soft + hard

    def coefficients(self, labels: Labels | None, weights: DistillationWeights) -> PairCoefficients:
        """Those of `total`: a divergence of logits that were divided by the temperature, and a cross entropy."""
        soft = weights.soft / self.temperature
        if labels is None or weights.hard is None:
            return PairCoefficients(soft, None, None)
        hard = self._cross_entropy.coefficients(labels, LossWeights(weights.hard, 0 * weights.hard))
        return PairCoefficients(soft, hard.probability, hard.label)
