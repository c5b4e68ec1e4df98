"""Arguments and results of the row functions, the same for every backend."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class RowStats(NamedTuple):
    """Statistics of each row of logits `z`. Statistics of several blocks of the vocabulary can be merged.

    Attributes:
      max: `max_v z_v`.
      log_sum: `log Σ_v exp(z_v − max)`, the log-sum-exp minus the maximum.
      label_logit: `z_label`, or 0 if the label is outside the block.
      prediction: the first `v` at which `z_v` is largest.
      weighted_sum: `Σ_v u_v · z_v` with class weights `u` (1 without), or None if not wanted.
      mean_logit: `Σ_v p_v · (z_v − max)` with `p = softmax(z)`, or None if not wanted. The entropy is
        `log_sum − mean_logit`.
    """

    max: Float[Array, "*B"]
    log_sum: Float[Array, "*B"]
    label_logit: Float[Array, "*B"]
    prediction: Int[Array, "*B"]
    weighted_sum: Float[Array, "*B"] | None = None
    mean_logit: Float[Array, "*B"] | None = None


class StatsWanted(NamedTuple):
    """Which of the optional statistics to compute."""

    weighted_sum: bool = False
    mean_logit: bool = False


class Coefficients(NamedTuple):
    """Per-token coefficients of the logit gradients. The gradients of every loss have this form.

    `dz_v = p_v · (probability + probability_lse · lse + probability_logit · (z_v − max)) − label · [v = label]
    − smoothing · u_v`

    with `p = softmax(z)` and class weights `u`. None means 0 for every token; the term is then not computed.
    """

    probability: Float[Array, " T"]
    label: Float[Array, " T"]
    probability_lse: Float[Array, " T"] | None = None
    smoothing: Float[Array, " T"] | None = None
    probability_logit: Float[Array, " T"] | None = None


class Block(NamedTuple):
    """The arrays that belong to one block of logits, apart from the logits.

    Attributes:
      bias: added to the logits, or None.
      class_weights: `u`, or None for 1.
      labels: each label's column in this block. A value outside `[0, V)` means that the label is not in this block.
      inverse_temperature: multiplies each row's logits after scale and softcap, `[T]`; None for 1.
      width: the number of vocabulary columns, from 0 to `LogitMap.width`, if it is only known at run time; None for
        `LogitMap.width`.
    """

    bias: Float[Array, " V"] | None
    class_weights: Float[Array, " V"] | None
    labels: Int[Array, " T"]
    inverse_temperature: Float[Array, " T"] | None = None
    width: Int[Array, ""] | None = None


class LogitMap(NamedTuple):
    """How logits are computed from the product of hidden states and kernel: `softcap(scale · (product + bias))`.

    Attributes:
      scale: multiplies the logits.
      softcap: `c` in `c · tanh(z / c)`, or None.
      width: the number of vocabulary columns. The product may have more columns, as padding.
      masked: whether a product of −∞ marks a column to leave out, as if its logit were −∞ whatever the softcap.
    """

    scale: float
    softcap: float | None
    width: int
    masked: bool = False
