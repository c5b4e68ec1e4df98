"""What the row functions of every backend take and give."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class RowStats(NamedTuple):
    """What a loss needs to know of each row of logits `z`; mergeable across blocks of the vocabulary.

    Attributes:
      max: `max_v z_v`.
      log_sum: `log Σ_v exp(z_v − max)`, the log-sum-exp less the maximum.
      label_logit: `z_label`, or 0 where the label lies outside the block.
      prediction: the first `v` at which `z_v` is largest.
      weighted_sum: `Σ_v u_v · z_v` with class weights `u` (1 without), or None if not asked for.
      mean_logit: `Σ_v p_v · (z_v − max)` with `p = softmax(z)`, or None if not asked for. The entropy is `log_sum` less
        it.
    """

    max: Float[Array, "*B"]
    log_sum: Float[Array, "*B"]
    label_logit: Float[Array, "*B"]
    prediction: Int[Array, "*B"]
    weighted_sum: Float[Array, "*B"] | None = None
    mean_logit: Float[Array, "*B"] | None = None


class StatsWanted(NamedTuple):
    """Which of the stats that not every loss needs are asked for."""

    weighted_sum: bool = False
    mean_logit: bool = False


class Coefficients(NamedTuple):
    """What multiplies what in each row of logit gradients: the one form that the gradients of all losses have.

    `dz_v = p_v · (probability + probability_lse · lse + probability_logit · (z_v − max)) − label · [v = label]
    − smoothing · u_v`

    with `p = softmax(z)` and class weights `u`. None stands for 0 in every row, and costs nothing.
    """

    probability: Float[Array, " T"]
    label: Float[Array, " T"]
    probability_lse: Float[Array, " T"] | None = None
    smoothing: Float[Array, " T"] | None = None
    probability_logit: Float[Array, " T"] | None = None


class Block(NamedTuple):
    """Everything about one block of logits but the logits themselves.

    Attributes:
      bias: added to the logits, or None.
      class_weights: `u`, or None for 1.
      labels: the label's column in this block; any value outside `[0, V)` is no column.
      inverse_temperature: multiplies a row's logits after all else, or None for 1.
    """

    bias: Float[Array, " V"] | None
    class_weights: Float[Array, " V"] | None
    labels: Int[Array, " T"]
    inverse_temperature: Float[Array, " T"] | None = None


class LogitMap(NamedTuple):
    """How the product of hidden states and kernel becomes logits: `softcap(scale · (product + bias))`.

    Attributes:
      scale: multiplies the logits.
      softcap: `c` in `c · tanh(z / c)`, or None.
      width: the columns that exist; a padded product has more.
    """

    scale: float
    softcap: float | None
    width: int
