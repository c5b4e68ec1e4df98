"""Arguments and results of the row functions for the largest logits of a row, and for columns that a teacher names."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from jliger.ops.logits.distillation_types import SoftmaxStats
from jliger.ops.logits.types import LogitMap

# The most columns that `top_k` selects: the Triton kernel keeps its candidates in registers.
MOST_COLUMNS = 256

# The id of a place without a column, in a block that has fewer than k columns. It sorts after every column.
NO_COLUMN = 2**31 - 1


class TopLogits(NamedTuple):
    """The largest logits of each row, from the largest to the smallest; of equal ones, the lower id first.

    Attributes:
      ids: their columns; `NO_COLUMN` where the block has fewer than k columns.
      logits: their values; −inf where the block has fewer than k columns.
    """

    ids: Int[Array, "*B k"]
    logits: Float[Array, "*B k"]


class TopKStats(NamedTuple):
    """The largest logits of each row, and the statistics of all logits that make them log-probabilities.

    Attributes:
      top: the largest logits.
      max, log_sum: as in `jliger.ops.logits.RowStats`.
    """

    top: TopLogits
    max: Float[Array, "*B"]
    log_sum: Float[Array, "*B"]


class StudentMap(NamedTuple):
    """How a student's logits are computed, and its softmaxes.

    Attributes:
      logits: the map from products to logits.
      temperature: `τ`, which divides the logits in the divergence.
      with_labels: whether the loss also has a cross entropy with labels, which is at temperature 1.
    """

    logits: LogitMap
    temperature: float
    with_labels: bool

    @property
    def with_hard_sum(self) -> bool:
        """Whether the cross entropy needs another softmax than the divergence: at temperature 1 instead of `τ`."""
        return self.with_labels and self.temperature != 1


class StudentStats(NamedTuple):
    """The softmaxes of each row of a student's logits.

    Attributes:
      softmax: at temperature `τ`.
      hard_log_sum: `log Σ_v exp(z_v − max)`, at temperature 1; None unless `StudentMap.with_hard_sum`.
    """

    softmax: SoftmaxStats
    hard_log_sum: Float[Array, "*B"] | None


class StudentCoefficients(NamedTuple):
    """Per-token coefficients of a student's logit gradients, as in `jliger.ops.logits.top_k_kl`.

    Attributes:
      soft: of the softmax at temperature `τ`. At temperature 1 it includes the cross entropy's.
      hard: of the softmax at temperature 1; None unless `StudentMap.with_hard_sum`.
      label: subtracted in the label's column; None without labels.
    """

    soft: Float[Array, " T"]
    hard: Float[Array, " T"] | None
    label: Float[Array, " T"] | None
