"""What the row functions of pairs take and give: a student's and a teacher's logits of the same tokens.

With `p` the student's and `r` the teacher's probabilities at temperature `τ`, the divergence `D` of a row is, by `β`,

* 0: `KL(r ‖ p) = Σ_v r_v (log r_v − log p_v)`
* 1: `KL(p ‖ r) = Σ_v p_v (log p_v − log r_v)`
* between: `β KL(r ‖ m) + (1 − β) KL(p ‖ m)` with `m = β r + (1 − β) p`

and `0 · log 0 = 0` in all of them. `∂D/∂p_v` is `−r_v / p_v`, `log(p_v / r_v)`, or `(1 − β) log(p_v / m_v)`, up to a
constant, which a softmax does not feel. What gradients need is `q_v = p_v · ∂D/∂p_v`, finite where `p_v` is 0:

`dz_v = (q_v − p_v Σ_u q_u) / τ`

where `Σ_u q_u` is `−1`, `D`, or `(1 − β) KL(p ‖ m)`.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from jliger.ops.logits.types import Block, LogitMap


class Products(NamedTuple):
    """Products of hidden states and kernels, of any two dtypes."""

    student: Float[Array, "T V"]
    teacher: Float[Array, "T V"]


class DistillationBlock(NamedTuple):
    """Everything about the pair's logits but the logits themselves: all columns, or one device's share of them.

    The teacher's labels are not read, nor are class weights.
    """

    student: Block
    teacher: Block


class DistillationMap(NamedTuple):
    """What a pair of logits is compared by.

    Attributes:
      student, teacher: how their products become logits.
      beta: `β`, which chooses the divergence.
      temperature: `τ`, which divides logits before the divergence sees them.
      with_labels: whether the student's labels, in a cross entropy at temperature 1, are part of it.
    """

    student: LogitMap
    teacher: LogitMap
    beta: float
    temperature: float
    with_labels: bool

    @property
    def with_hard_sum(self) -> bool:
        """Whether the labels' softmax is another than the divergence's."""
        return self.with_labels and self.temperature != 1


class SoftmaxStats(NamedTuple):
    """A row's softmax at the temperature `τ`; mergeable across devices.

    Attributes:
      max: `max_v z_v`, of the logits before they are divided.
      log_sum: `log Σ_v exp((z_v − max) / τ)`.
      prediction: the first `v` at which `z_v` is largest.
    """

    max: Float[Array, "*B"]
    log_sum: Float[Array, "*B"]
    prediction: Int[Array, "*B"]


class DistillationStats(NamedTuple):
    """What is known of a pair of rows before they are compared.

    Attributes:
      student, teacher: their softmaxes.
      label_logit: the student's, 0 where the label is no column here; None without labels.
      hard_log_sum: the student's `log_sum` at temperature 1; None without labels, or where that is its `log_sum`.
    """

    student: SoftmaxStats
    teacher: SoftmaxStats
    label_logit: Float[Array, "*B"] | None
    hard_log_sum: Float[Array, "*B"] | None


class Divergence(NamedTuple):
    """How far apart a pair of rows is: sums over columns, so that devices' sums add up.

    Attributes:
      value: `D`.
      q_sum: `Σ_v q_v`, of which gradients take a share `p_v` each.
    """

    value: Float[Array, "*B"]
    q_sum: Float[Array, "*B"]


class DistillationCoefficients(NamedTuple):
    """What multiplies what in each row of the student's logit gradients.

    `dz_v = soft · (q_v − p_v Σ_u q_u) + probability · softmax(z)_v − label · [v = y]`

    Attributes:
      soft: of the divergence, divided by the temperature. Where it is 0, so is its term, whatever the logits are.
      probability, label: of the cross entropy; None without labels.
    """

    soft: Float[Array, " T"]
    probability: Float[Array, " T"] | None
    label: Float[Array, " T"] | None


class Comparison(NamedTuple):
    """What is found of each token where there is a teacher.

    Attributes:
      pair: both softmaxes.
      divergence: how far apart they are.
    """

    pair: DistillationStats
    divergence: Float[Array, "*B"]
