"""The reduction of distillation losses over tokens, and their metrics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from jliger.core.dtypes import accumulator_dtype
from jliger.core.reduction import Normalizer, divided, divisor
from jliger.ops.linear_head import gradients, sharding
from jliger.ops.linear_head.arguments import column_validity, counted_tokens, if_counted, label_columns
from jliger.ops.linear_head.distillation_arguments import Call
from jliger.ops.linear_head.types import Operands
from jliger.ops.logits.objectives import Distillation, DistillationWeights, LabelTerms

Loss = Float[Array, ""]


class DistillationMetrics(NamedTuple):
    """Figures to log beside the loss. None of them carries a gradient.

    Attributes:
      weight: `[]`, the sum of the weights of the tokens that count; without `weights`, their number.
      divergence: `[]`, reduced like the loss, without the factor `soft_weight`.
      cross_entropy: `[]`, reduced like the loss, without the factor `hard_weight`; None without a hard part.
      accuracy: `[]`, the share of `weight` on tokens whose label the student predicts; None without labels.
      agreement: `[]`, the share of `weight` on tokens for which student and teacher predict the same. If nothing
        counts, it and the accuracy are 0.
      predictions: int32 `[*B]`, the first column with the student's largest logit; −1 for a token that doesn't count.
      teacher_predictions: int32 `[*B]`, likewise the teacher's.
    """

    weight: Float[Array, ""]
    divergence: Float[Array, ""]
    cross_entropy: Float[Array, ""] | None
    accuracy: Float[Array, ""] | None
    agreement: Float[Array, ""]
    predictions: Int[Array, "*B"]
    teacher_predictions: Int[Array, "*B"]


class KnownTeacher(NamedTuple):
    """What is known of a teacher without a head.

    Attributes:
      predictions: the most likely column of each token.
      validity: 1, or NaN for a token of which something is out of range.
    """

    predictions: Int[Array, "*B"]
    validity: Float[Array, "*B"]


def reduced_distillation(
    call: Call,
    operands: Operands,
    labels: Integer[Array, "*B"] | None,
    where: Bool[Array, "*B"] | None,
    weights: Float[Array, "*B"] | None,
    normalizer: Normalizer,
    hard_weight: Float[Array, ""],
    soft_weight: Float[Array, ""],
    known: KnownTeacher | None = None,
) -> tuple[Loss, DistillationMetrics]:
    """The loss of all tokens; `known` is given for a teacher without a head."""
    dtype = accumulator_dtype(operands.hidden.dtype)
    assert call.config.teacher is not None
    weights, hard_weight, soft_weight = jax.lax.stop_gradient((weights, hard_weight, soft_weight))
    loss_function = Distillation(call.config.teacher.temperature, sharding.vocab_size(call.config, operands.kernel))
    counted = where
    if labels is None:
        # Spread over devices as the tokens are. Any value is as good as another.
        columns = jnp.zeros_like(operands.hidden.sum(axis=-1), dtype=jnp.int32)
    else:
        if call.ignore_index is not None:
            counted = counted_tokens(labels, where, call.ignore_index)
        columns = label_columns(labels, counted, loss_function.vocab_size)
    weights = jnp.ones_like(columns, dtype) if weights is None else weights.astype(dtype)
    token_weights = if_counted(counted, weights, 0)
    weight = token_weights.sum()
    shares = token_weights if call.reduction == "sum" else divided(token_weights, divisor(weight, normalizer))
    label_terms, hard_shares = None, None
    if call.config.teacher.with_labels:
        label_terms = LabelTerms(column_validity(columns, dtype), None, float(loss_function.vocab_size))
        hard_shares = shares
    soft_shares = shares if known is None else shares * if_counted(counted, known.validity, 1)
    loss_weights = DistillationWeights(
        soft_shares * soft_weight, None if hard_shares is None else hard_shares * hard_weight
    )
    loss, result, _ = gradients.weighted_loss(
        call.config, loss_function, operands._replace(labels=columns, counted=counted), label_terms, loss_weights
    )
    result = jax.lax.stop_gradient(result)
    divergence, cross_entropy = loss_function.weighted_sums(
        result, label_terms, DistillationWeights(soft_shares, hard_shares)
    )
    predictions = result.pair.student.prediction
    if known is not None:
        teacher_predictions = if_counted(counted, known.predictions, -1)
    else:
        teacher_predictions = result.pair.teacher.prediction

    def share_of_weight(true: Bool[Array, "*B"]) -> Float[Array, ""]:
        return divided(jnp.sum(jnp.where(true, token_weights, 0)), weight)

    return loss, jax.lax.stop_gradient(
        DistillationMetrics(
            weight=weight,
            divergence=divergence,
            cross_entropy=None if hard_shares is None else cross_entropy,
            accuracy=None if labels is None else share_of_weight(predictions == columns),
            agreement=share_of_weight(predictions == teacher_predictions),
            predictions=predictions,
            teacher_predictions=teacher_predictions,
        )
    )
