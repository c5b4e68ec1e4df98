"""A user's loss of log-probabilities, for one token or one row of tokens, as a function of row statistics."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Bool, Float, Int

from jliger.core import jaxprs
from jliger.ops.logits.objectives import LossArrays, coefficients_of
from jliger.ops.logits.types import Coefficients, RowStats


class LinearLogprobs(NamedTuple):
    """Results of tokens with logits `z` and `p = softmax(z)`; 0, and prediction −1, for a token that doesn't count.

    Attributes:
      logprobs: `log p_label`, `[*B]`; NaN for a label out of range.
      logsumexp: `log Σ_v exp(z_v)`, `[*B]`.
      entropy: `−Σ_v p_v · log p_v`, `[*B]`, in nats.
      predictions: int32 `[*B]`, the first column with the largest logit. It carries no gradient.
    """

    logprobs: Float[Array, "*B"]
    logsumexp: Float[Array, "*B"]
    entropy: Float[Array, "*B"]
    predictions: Int[Array, "*B"]


def label_logprobs(stats: RowStats) -> Float[Array, "*B"]:
    """The labels' log-probabilities, if all labels are valid."""
    # The label's logit and the maximum may be large and close: subtract them first, to keep log_sum's precision.
    return (stats.label_logit - stats.max) - stats.log_sum


def logprobs_of(
    stats: RowStats,
    logprobs: Float[Array, "*B"],
    validity: Float[Array, "*B"],
    counted: Bool[Array, "*B"] | None,
) -> LinearLogprobs:
    """The results of tokens with these statistics. Without `mean_logit` the entropy is 0.

    Args:
      stats: of all columns.
      logprobs: `label_logprobs(stats)`.
      validity: 1 for a valid label, NaN for an invalid one.
      counted: which tokens count; None for all.
    """
    result = LinearLogprobs(
        logprobs=logprobs * validity,
        logsumexp=stats.max + stats.log_sum,
        entropy=jnp.zeros_like(logprobs) if stats.mean_logit is None else stats.log_sum - stats.mean_logit,
        predictions=stats.prediction,
    )
    if counted is None:
        return result
    # The merged statistics of uncounted tokens are not 0.
    return LinearLogprobs(*(jnp.where(counted, field, none) for field, none in zip(result, (0, 0, 0, -1), strict=True)))


@dataclasses.dataclass(frozen=True)
class UnitLoss:
    """The loss of one unit, which is a token or a row of tokens, and its derivative, as programs.

    Their inputs are the arrays that the loss closes over, the fields of a `LinearLogprobs`, the arrays of the unit, and
    other arrays that all units share.

    Attributes:
      program: computes the loss, a scalar, and auxiliary arrays.
      gradient: computes the loss's derivative by the log-probabilities, the log-sum-exps and, with `entropy_gradient`,
        the entropies.
      row_shape: the shape of a row of tokens; `()` if a unit is a token.
      entropy_gradient: whether the loss depends on the entropy.
    """

    program: Jaxpr
    gradient: ClosedJaxpr
    row_shape: tuple[int, ...]
    entropy_gradient: bool

    @property
    def needs_stats(self) -> bool:
        return True

    @property
    def outputs(self) -> list[Any]:
        """The types of the loss and the auxiliary arrays of one unit."""
        return [output.aval for output in self.program.outvars]

    def __call__(self, stats: RowStats | None, arrays: LossArrays, in_units: Callable[[Any], Any]) -> Coefficients:
        assert stats is not None
        differentiated = (stats.log_sum, stats.label_logit, stats.mean_logit if self.entropy_gradient else None)

        def results(
            log_sum: Array, label_logit: Array, mean_logit: Array | None
        ) -> tuple[tuple[Array, ...], LinearLogprobs]:
            mean_logit = stats.mean_logit if mean_logit is None else mean_logit
            changed = stats._replace(log_sum=log_sum, label_logit=label_logit, mean_logit=mean_logit)
            result = self._in_rows(in_units(logprobs_of(changed, label_logprobs(changed), *arrays.per_token)))
            return result[: len(self.gradient.out_avals)], result

        _, pull_back, result = jax.vjp(results, *differentiated, has_aux=True)
        program, consts = self.gradient.jaxpr, self.gradient.consts
        cotangents = self._of_units(functools.partial(jaxprs.evaluate, program, consts), result, arrays)
        counted = _counted_units(result)
        log_sum, label_logit, mean_logit = pull_back(tuple(_where(counted, part) for part in cotangents))
        cotangent = stats._replace(log_sum=log_sum, label_logit=label_logit, weighted_sum=None, mean_logit=mean_logit)
        return coefficients_of(cotangent, stats.mean_logit)

    def losses(self, stats: RowStats, arrays: LossArrays) -> list[Array]:
        """The loss and the auxiliary arrays of each unit, from the statistics `[T]` of all tokens.

        A unit without a token that counts has zeros.
        """
        result = self._in_rows(logprobs_of(stats, label_logprobs(stats), *arrays.per_token))
        count = len(self.program.constvars)

        def program(*operands: Array) -> list[Array]:
            return jaxprs.evaluate(self.program, operands[:count], *operands[count:])

        outputs = self._of_units(program, result, arrays)
        return [_where(_counted_units(result), output) for output in outputs]

    def _in_rows(self, result: LinearLogprobs) -> LinearLogprobs:
        return jax.tree.map(lambda field: field.reshape(-1, *self.row_shape), result)

    def _of_units(self, program: Callable[..., list[Array]], result: LinearLogprobs, arrays: LossArrays) -> list[Array]:
        """Evaluates a program for each unit."""
        count = len(self.program.constvars)
        closed_over, shared = arrays.shared[:count], arrays.shared[count:]

        def of_unit(result: LinearLogprobs, per_unit: Any) -> list[Array]:
            return program(*closed_over, *result, *per_unit, *shared)

        return jax.vmap(of_unit)(result, arrays.per_unit)


def _counted_units(result: LinearLogprobs) -> Bool[Array, " N"]:
    """Which units have a token that counts."""
    counted = result.predictions >= 0
    return counted.any(axis=range(1, counted.ndim)) if counted.ndim > 1 else counted


def _where(counted: Bool[Array, " N"], array: Array) -> Array:
    return jnp.where(jnp.expand_dims(counted, range(1, array.ndim)), array, jnp.zeros((), array.dtype))
