"""Arguments and results of the distillation row functions, which compare a student's logits with a teacher's.

`p` are the student's and `r` the teacher's probabilities at temperature `τ`. `β` chooses the divergence `D` of a row:

* 0: `KL(r ‖ p) = Σ_v r_v (log r_v − log p_v)`
* 1: `KL(p ‖ r) = Σ_v p_v (log p_v − log r_v)`
* between: `β KL(r ‖ m) + (1 − β) KL(p ‖ m)` with `m = β r + (1 − β) p`

with `0 · log 0 = 0`. `∂D/∂p_v` is `−r_v / p_v`, `log(p_v / r_v)`, or `(1 − β) log(p_v / m_v)`, up to a constant, which
does not change the gradient of a softmax. The gradients need `q_v = p_v · ∂D/∂p_v`, which is finite where `p_v` is 0:

`dz_v = (q_v − p_v Σ_u q_u) / τ`

where `Σ_u q_u` is `−1`, `D`, or `(1 − β) KL(p ‖ m)`.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from jliger.ops.logits.types import Block, LogitMap


class Products(NamedTuple):
    """The products of hidden states and kernel of both models. Their dtypes may differ."""

    student: Float[Array, "T V"]
    teacher: Float[Array, "T V"]


class DistillationBlock(NamedTuple):
    """The arrays that belong to the logits of both models: for all columns, or for one device's columns.

    The teacher's labels and both class weights are not used. Both models have the same columns, so both blocks have the
    same `width`.
    """

    student: Block
    teacher: Block


class DistillationMap(NamedTuple):
    """How logits are computed from products, and the options of the divergence.

    Attributes:
      student, teacher: the maps from products to logits.
      beta: `β`, which chooses the divergence.
      temperature: `τ`, which divides the logits in the divergence.
      with_labels: whether the loss also has the student's cross entropy with labels, which is at temperature 1.
    """

    student: LogitMap
    teacher: LogitMap
    beta: float
    temperature: float
    with_labels: bool

    @property
    def with_hard_sum(self) -> bool:
        """Whether the cross entropy needs another softmax than the divergence: at temperature 1 instead of `τ`."""
        return self.with_labels and self.temperature != 1


class SoftmaxStats(NamedTuple):
    """Softmax statistics of a row at temperature `τ`. Statistics of several devices' columns can be merged.

    Attributes:
      max: `max_v z_v`, of the logits before division by `τ`.
      log_sum: `log Σ_v exp((z_v − max) / τ)`.
      prediction: the first `v` at which `z_v` is largest.
    """

    max: Float[Array, "*B"]
    log_sum: Float[Array, "*B"]
    prediction: Int[Array, "*B"]


class DistillationStats(NamedTuple):
    """Statistics of a pair of rows, which the divergence needs.

    Attributes:
      student, teacher: the softmax statistics of each.
      label_logit: the student's logit of the label, 0 if the label is not in this block; None without labels.
      hard_log_sum: the student's `log_sum` at temperature 1; None without labels, or if `τ` is 1.
    """

    student: SoftmaxStats
    teacher: SoftmaxStats
    label_logit: Float[Array, "*B"] | None
    hard_log_sum: Float[Array, "*B"] | None


class Divergence(NamedTuple):
    """The divergence of a pair of rows. Both fields are sums over columns, so devices' values are added.

    Attributes:
      value: `D`.
      q_sum: `Σ_v q_v`, which the gradients need.
    """

    value: Float[Array, "*B"]
    q_sum: Float[Array, "*B"]


class DistillationCoefficients(NamedTuple):
    """Per-token coefficients of the student's logit gradients.

    `dz_v = soft · (q_v − p_v Σ_u q_u) + probability · softmax(z)_v − label · [v = y]`

    Attributes:
      soft: the divergence's, divided by the temperature. If it is 0, its term is 0 even for infinite logits or NaN.
      probability, label: the cross entropy's; None without labels.
    """

    soft: Float[Array, " T"]
    probability: Float[Array, " T"] | None
    label: Float[Array, " T"] | None


class LabelledStudent(NamedTuple):
    """The student's part of `DistillationStats`, if only some columns of the teacher are known."""

    student: SoftmaxStats
    label_logit: Float[Array, "*B"] | None
    hard_log_sum: Float[Array, "*B"] | None


class Comparison(NamedTuple):
    """The statistics of each token in distillation.

    Attributes:
      pair: the statistics of the softmaxes.
      divergence: `D`.
    """

    pair: DistillationStats | LabelledStudent
    divergence: Float[Array, "*B"]
