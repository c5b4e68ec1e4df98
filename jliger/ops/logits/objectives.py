"""The losses as functions of row statistics. Their derivatives by the statistics are the kernels' coefficients."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.ops.logits import Coefficients, RowStats
from jliger.ops.logits.distillation import DistillationCoefficients
from jliger.ops.logits.distillation_types import Comparison


class LossArrays(NamedTuple):
    """The arrays that a loss reads, apart from the operands of the products.

    A unit is one term of the loss: a token, or a row of tokens.

    Attributes:
      per_token: trees of arrays with one number per token.
      per_unit: arrays whose first dimensions are those of the units.
      shared: arrays that every unit reads.
    """

    per_token: Any = ()
    per_unit: Any = ()
    shared: Any = ()


class CoefficientRule(Protocol):
    """How the coefficients of a token's logit gradients follow from its statistics. Hashable: part of the program."""

    @property
    def needs_stats(self) -> bool:
        """Whether it reads the statistics; if not, it may be called before there are any."""
        ...

    def __call__(self, stats: RowStats | None, arrays: LossArrays, in_units: Callable[[Any], Any]) -> Coefficients:
        """The coefficients, `[T]`, from statistics over all columns and from the arrays of the same tokens and units.

        `in_units` arranges a `LinearLogprobs` of the tokens in units.
        """
        ...


@dataclasses.dataclass(frozen=True)
class KnownCoefficients:
    """The rule of a loss whose coefficients do not depend on the statistics: they are its argument."""

    @property
    def needs_stats(self) -> bool:
        return False

    def __call__(self, stats: RowStats | None, arrays: LossArrays, in_units: Callable[[Any], Any]) -> Coefficients:
        del stats, in_units
        (coefficients,) = arrays.per_token
        return coefficients


@dataclasses.dataclass(frozen=True)
class LogprobGradients:
    """The rule for the gradient of each token's own log-probability, `dz_v = [v = label] − p_v`.

    It says that it needs statistics, though it doesn't, so that they have a launch of their own. XLA removes the launch
    and the product of gradients that are not used, but not half a launch.
    """

    @property
    def needs_stats(self) -> bool:
        return True

    def __call__(self, stats: RowStats | None, arrays: LossArrays, in_units: Callable[[Any], Any]) -> Coefficients:
        del arrays, in_units
        assert stats is not None
        minus_one = jnp.full_like(stats.log_sum, -1)
        return Coefficients(probability=minus_one, label=minus_one)


class LossWeights(NamedTuple):
    """Weights of the two parts of each token's loss in the reduced loss; 0 for uncounted tokens."""

    cross_entropy: Float[Array, "*B"]
    z_loss: Float[Array, "*B"]


class LabelTerms(NamedTuple):
    """Per-token values that depend on the label but not on the logits.

    Attributes:
      validity: 1 for a valid label, NaN for an invalid one, which makes the token's loss and gradient NaN.
      weights: `w_y`, or None for 1.
      total_weight: `Σ_v w_v`, `V` without class weights.
    """

    validity: Float[Array, "*B"]
    weights: Float[Array, "*B"] | None
    total_weight: Float[Array, ""] | float


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy with label smoothing `α`, class weights `w`, and a z-loss.

    Attributes:
      label_smoothing: `α`.
      z_loss: the factor of `lse²`.
      vocab_size: `V`.
    """

    label_smoothing: float
    z_loss: float
    vocab_size: int

    def token_losses(self, stats: RowStats, labels: LabelTerms) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """Cross entropy and z-loss of each token; both the loss and its gradient are NaN if the label is invalid.

        `(1 − α) · w_y · (lse − z_y) + (α / V) · Σ_v w_v · (lse − z_v)`, and `z_loss · lse²`.
        """
        # The label's logit and the maximum may be large and close: subtract them first, to keep log_sum's precision.
        cross_entropy = stats.log_sum + (stats.max - stats.label_logit)
        if labels.weights is not None:
            cross_entropy *= labels.weights
        if stats.weighted_sum is not None:
            spread = labels.total_weight * (stats.max + stats.log_sum) - stats.weighted_sum
            cross_entropy = (1 - self.label_smoothing) * cross_entropy + self.label_smoothing / self.vocab_size * spread
        lse = stats.max + stats.log_sum
        # Without a z-loss, the square is not computed: it overflows for logits that are finite.
        z_loss = self.z_loss * jnp.square(lse) if self.z_loss else jnp.zeros_like(lse)
        return cross_entropy * labels.validity, z_loss

    def weighted_sums(
        self, stats: RowStats, labels: LabelTerms, weights: LossWeights
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """`Σ_t weights.cross_entropy_t · cross entropy_t` and `Σ_t weights.z_loss_t · z-loss_t`."""
        cross_entropy, z_loss = self.token_losses(stats, labels)
        return jnp.sum(cross_entropy * weights.cross_entropy), jnp.sum(z_loss * weights.z_loss)

    def total(self, stats: RowStats, labels: LabelTerms, weights: LossWeights) -> Float[Array, ""]:
        """The reduced loss: the sum of both parts."""
        cross_entropy, z_loss = self.weighted_sums(stats, labels, weights)
        return cross_entropy + z_loss

    def coefficients(self, labels: LabelTerms, weights: LossWeights) -> Coefficients:
        """The coefficients of `total`'s logit gradients.

        `total` is linear in every statistic except the log-sum-exp, in which it is quadratic. Its derivatives are
        therefore known before any statistic is.
        """
        zeros = 0 * weights.cross_entropy  # zeros with the weights' sharding
        empty_row = RowStats(zeros, zeros, zeros, zeros.astype(jnp.int32), zeros if self.label_smoothing else None)

        def derivatives(log_sum: Float[Array, "*B"], weights: LossWeights) -> RowStats:
            return jax.grad(self.total, allow_int=True)(empty_row._replace(log_sum=log_sum), labels, weights)

        coefficients = coefficients_of(derivatives(zeros, weights), None)
        if not self.z_loss:
            return coefficients
        # Only the z-loss is quadratic; its derivative is 0 at lse = 0, and its coefficient of lse is that at lse = 1.
        lse_coefficient = derivatives(zeros + 1, weights._replace(cross_entropy=zeros)).log_sum
        return coefficients._replace(probability_lse=lse_coefficient)


def coefficients_of(cotangents: RowStats, mean_logit: Float[Array, "*B"] | None) -> Coefficients:
    """The coefficients of the logit gradients, from the cotangents of the statistics; a cotangent of None means 0.

    The log-sum-exp is `max + log_sum`, with derivative `p`. `Σ p·z` is `max + mean_logit`, with derivative
    `p · (1 + z − Σ p·z)`. Both are independent of the shift by `max`, so the cotangent of `max` is ignored.
    """
    probability = cotangents.log_sum
    if cotangents.mean_logit is not None and mean_logit is not None:
        probability = probability + cotangents.mean_logit * (1 - mean_logit)
    return Coefficients(
        probability=probability,
        label=-cotangents.label_logit,
        smoothing=None if cotangents.weighted_sum is None else -cotangents.weighted_sum,
        probability_logit=cotangents.mean_logit,
    )


class DistillationWeights(NamedTuple):
    """Weights of the two parts of each token's loss in the reduced loss; 0 for uncounted tokens.

    Attributes:
      soft: weight of the divergence from the teacher.
      hard: weight of the cross entropy with the labels; None without labels.
    """

    soft: Float[Array, "*B"]
    hard: Float[Array, "*B"] | None


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A weighted sum of the divergence from a teacher and the cross entropy with labels.

    Attributes:
      temperature: divides both models' logits in the divergence.
      vocab_size: `V`.
    """

    temperature: float
    vocab_size: int

    @property
    def _cross_entropy(self) -> CrossEntropy:
        return CrossEntropy(label_smoothing=0.0, z_loss=0.0, vocab_size=self.vocab_size)

    def weighted_sums(
        self, result: Comparison, labels: LabelTerms | None, weights: DistillationWeights
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """`Σ_t weights.soft_t · divergence_t` and `Σ_t weights.hard_t · cross entropy_t`."""
        soft = jnp.sum(result.divergence * weights.soft)
        if labels is None or weights.hard is None:
            return soft, jnp.zeros_like(soft)
        student = result.pair.student
        assert result.pair.label_logit is not None
        stats = RowStats(
            max=student.max,
            log_sum=student.log_sum if result.pair.hard_log_sum is None else result.pair.hard_log_sum,
            label_logit=result.pair.label_logit,
            prediction=student.prediction,
        )
        hard, _ = self._cross_entropy.weighted_sums(stats, labels, LossWeights(weights.hard, 0 * weights.hard))
        return soft, hard

    def total(self, result: Comparison, labels: LabelTerms | None, weights: DistillationWeights) -> Float[Array, ""]:
        """The reduced loss: the sum of both parts."""
        soft, hard = self.weighted_sums(result, labels, weights)
        return soft + hard

    def coefficients(self, labels: LabelTerms | None, weights: DistillationWeights) -> DistillationCoefficients:
        """The coefficients of `total`'s logit gradients."""
        # The divergence is a function of z / temperature, so its derivative by z has a factor of 1 / temperature.
        soft = weights.soft / self.temperature
        if labels is None or weights.hard is None:
            return DistillationCoefficients(soft, None, None)
        hard = self._cross_entropy.coefficients(labels, LossWeights(weights.hard, 0 * weights.hard))
        return DistillationCoefficients(soft, hard.probability, hard.label)
