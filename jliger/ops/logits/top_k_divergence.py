"""The divergence from a teacher of which K columns are known, and its gradients: plain JAX on `[T, K]` arrays."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jliger.ops.logits.distillation_types import DistillationCoefficients, SoftmaxStats
from jliger.ops.logits.top_k_types import StudentCoefficients, StudentMap, StudentStats
from jliger.ops.logits.types import Block, LogitMap
from jliger.ops.logits.xla import _logits


class TeacherColumns(NamedTuple):
    """What is known of the teacher, and the student's logits in the same columns.

    Attributes:
      ids: columns of the whole vocabulary, each at most once; negative for none.
      log_r: the teacher's log-probabilities; −inf where there is no column.
      rest: `ρ`, the teacher's probability of all other columns together; None if they are not compared.
      logits: the student's logits.
    """

    ids: Int[Array, "T K"]
    log_r: Float[Array, "T K"]
    rest: Float[Array, " T"] | None
    logits: Float[Array, "T K"]


class StudentSoftmax(NamedTuple):
    """The student's statistics.

    Attributes:
      all: of all columns.
      rest: of the columns that the teacher does not name; None if they are not compared.
    """

    all: StudentStats
    rest: StudentStats | None


class RowTerms(NamedTuple):
    """Gradients as `jliger.ops.logits.top_k_kl` takes them; those of the teacher's columns are by the logits."""

    stats: StudentStats
    coefficients: StudentCoefficients
    column_grads: Float[Array, "T K"]


@dataclasses.dataclass(frozen=True)
class TopKDivergence:
    """How a student is compared with a teacher's probabilities `r` of K columns; `p = softmax(z / τ)`.

    `D = Σ_k r_k (log r_k − log p_k)`, with one more term for all other columns together if there is a remainder.
    `dD/dz = (M p − r) / τ` with `M = Σ r`; in the other columns, the remainder subtracts `ρ p / P`, where `P` is the
    student's probability of all of them.

    Attributes:
      normalize: `"vocab"`, or `"top_k"`: p is divided by its sum over the K columns.
      remainder: whether all other columns are one more column.
      temperature: `τ`.
      with_labels: whether the loss has a cross entropy with labels, too.
    """

    normalize: Literal["vocab", "top_k"]
    remainder: bool
    temperature: float
    with_labels: bool

    @property
    def in_one_launch(self) -> bool:
        """Whether gradients depend on the student's statistics only through its softmaxes."""
        return self.normalize == "vocab" and not self.remainder

    def student_map(self, logit_map: LogitMap) -> StudentMap:
        return StudentMap(logit_map._replace(masked=self.remainder), self.temperature, self.with_labels)

    def value(self, student: StudentSoftmax, teacher: TeacherColumns) -> Float[Array, " T"]:
        """`D` of each token."""
        value = _times(jnp.exp(teacher.log_r), teacher.log_r, self._log_p(student.all, teacher)).sum(axis=1)
        if student.rest is not None and teacher.rest is not None:
            log_rest = jnp.log(jnp.where(teacher.rest == 0, 1, teacher.rest))
            value += _times(teacher.rest, log_rest, self._log_rest(student.all, student.rest))
        return value

    def known(
        self, teacher: TeacherColumns, coefficients: DistillationCoefficients
    ) -> tuple[StudentCoefficients, Float[Array, "T K"]]:
        """What `student_stats_and_grads` takes, if `in_one_launch`; of the teacher's columns, the logits are not read.

        `coefficients` are the soft part's, which includes 1 / τ, and the cross entropy's.
        """
        r = jnp.exp(teacher.log_r)
        return self._of_rows(coefficients, coefficients.soft * r.sum(axis=1)), coefficients.soft[:, None] * r

    def gradients(
        self,
        student: StudentSoftmax,
        teacher: TeacherColumns,
        coefficients: DistillationCoefficients,
        is_label: Bool[Array, "T K"],
    ) -> RowTerms:
        """What `student_grads` takes; `is_label` says which of the teacher's columns is the token's label."""
        r = jnp.exp(teacher.log_r)
        total, soft = r.sum(axis=1), coefficients.soft
        if teacher.rest is not None:
            total = total + teacher.rest
        p = jnp.where(teacher.ids < 0, 0, jnp.exp(self._log_p(student.all, teacher)))
        column_grads = soft[:, None] * (total[:, None] * p - r)
        if coefficients.probability is not None and coefficients.label is not None:
            hard = coefficients.probability[:, None] * self._hard_p(student.all, teacher)
            column_grads += hard - jnp.where(is_label, coefficients.label[:, None], 0)
        if student.rest is not None and teacher.rest is not None:
            return self._with_remainder(student, teacher.rest, total, coefficients, column_grads)
        # Times 0, which keeps the NaN of a token with an id out of range.
        of_others = soft * (0 if self.normalize == "top_k" else total)
        return RowTerms(student.all, self._of_rows(coefficients, of_others), column_grads)

    def _with_remainder(
        self,
        student: StudentSoftmax,
        rest: Float[Array, " T"],
        total: Float[Array, " T"],
        coefficients: DistillationCoefficients,
        column_grads: Float[Array, "T K"],
    ) -> RowTerms:
        """Gradients in terms of the softmax over the other columns alone, because `ρ / P` may overflow."""
        assert student.rest is not None
        share = jnp.exp(self._log_rest(student.all, student.rest))
        soft = coefficients.soft * (total * share - rest)
        if coefficients.probability is not None and self.temperature == 1:
            soft += coefficients.probability * share
        softmax = student.rest.softmax
        # If no other column has a probability, its exponentials are 0, and any finite sum will do.
        stats = StudentStats(softmax._replace(log_sum=_or_zero(softmax.log_sum)), None)
        if student.all.hard_log_sum is not None:
            stats = stats._replace(hard_log_sum=student.all.softmax.max - softmax.max + student.all.hard_log_sum)
        of_hard = coefficients.probability if self.temperature != 1 else None
        return RowTerms(stats, StudentCoefficients(soft, of_hard, coefficients.label), column_grads)

    def _of_rows(self, coefficients: DistillationCoefficients, soft: Float[Array, " T"]) -> StudentCoefficients:
        """Coefficients of all columns, where at temperature 1 both parts have the same softmax."""
        hard = coefficients.probability
        if hard is not None and self.temperature == 1:
            return StudentCoefficients(soft + hard, None, coefficients.label)
        return StudentCoefficients(soft, hard, coefficients.label)

    def _log_p(self, stats: StudentStats, teacher: TeacherColumns) -> Float[Array, "T K"]:
        """The student's log-probabilities of the teacher's columns."""
        if self.normalize == "vocab":
            below = teacher.logits - stats.softmax.max[:, None]
            return below * (1 / self.temperature) - stats.softmax.log_sum[:, None]
        scaled = jnp.where(teacher.ids < 0, -jnp.inf, teacher.logits * (1 / self.temperature))
        return scaled - _or_zero(jax.nn.logsumexp(scaled, axis=1))[:, None]

    def _log_rest(self, stats: StudentStats, rest: StudentStats) -> Float[Array, " T"]:
        """`log P`, the student's log-probability of all other columns together."""
        below = (rest.softmax.max - stats.softmax.max) * (1 / self.temperature)
        return below + rest.softmax.log_sum - stats.softmax.log_sum

    def _hard_p(self, stats: StudentStats, teacher: TeacherColumns) -> Float[Array, "T K"]:
        """The student's probabilities of the teacher's columns at temperature 1."""
        log_sum = stats.softmax.log_sum if stats.hard_log_sum is None else stats.hard_log_sum
        return jnp.exp(teacher.logits - stats.softmax.max[:, None] - log_sum[:, None])

    def of_all_columns(self, rest: StudentStats, teacher: TeacherColumns) -> StudentStats:
        """The statistics of all columns, from those of the others and the logits of the teacher's."""
        logits = jnp.where(teacher.ids < 0, -jnp.inf, teacher.logits)
        largest = logits.max(axis=1)
        first = jnp.where(logits == largest[:, None], teacher.ids, jnp.iinfo(jnp.int32).max)
        first = jnp.where(teacher.ids < 0, jnp.iinfo(jnp.int32).max, first).min(axis=1)
        row_max = jnp.maximum(rest.softmax.max, largest)
        prediction = jnp.where(largest > rest.softmax.max, first, rest.softmax.prediction)
        prediction = jnp.where(largest == rest.softmax.max, jnp.minimum(first, prediction), prediction)

        def log_sum(of_rest: Float[Array, " T"], temperature: float) -> Float[Array, " T"]:
            below = (rest.softmax.max - row_max) * (1 / temperature)
            exps = jnp.exp((logits - row_max[:, None]) * (1 / temperature))
            return jnp.log(jnp.exp(of_rest + below) + exps.sum(axis=1))

        softmax = SoftmaxStats(row_max, log_sum(rest.softmax.log_sum, self.temperature), prediction)
        return StudentStats(softmax, None if rest.hard_log_sum is None else log_sum(rest.hard_log_sum, 1.0))


def column_logits(
    product: Float[Array, "T V"], block: Block, logit_map: LogitMap, ids: Int[Array, "T K"]
) -> tuple[Float[Array, "T K"], Float[Array, "T K"]]:
    """The logits of some columns of each row, and their derivatives by the product; 0 for negative ids."""
    is_column = ids >= 0
    safe = jnp.maximum(ids, 0)
    values = product.at[jnp.arange(ids.shape[0])[:, None], safe].get(mode="promise_in_bounds")
    # NumPy's promotion: JAX's raises under jax_numpy_dtype_promotion="strict".
    values = values.astype(np.promote_types(values.dtype, np.float32))
    if block.bias is not None:
        values += block.bias.at[safe].get(mode="promise_in_bounds")
    here = Block(None, None, block.labels)
    logits, by_product, _ = _logits(values, here, LogitMap(logit_map.scale, logit_map.softcap, ids.shape[1]))
    return jnp.where(is_column, logits, 0), jnp.where(is_column, by_product, 0)


def _times(weight: Array, left: Array, right: Array) -> Array:
    """`weight · (left − right)`, and 0 for a weight of 0, where both may be −inf and their difference NaN."""
    is_zero = weight == 0  # False for NaN, so that NaN propagates.
    return weight * (jnp.where(is_zero, 0, left) - jnp.where(is_zero, 0, right))


def _or_zero(log_sum: Array) -> Array:
    """A logarithm, and 0 for that of 0."""
    return jnp.where(log_sum == -jnp.inf, 0, log_sum)
