"""Row functions for distillation from a teacher's top k: the student's softmaxes, and its logit gradients.

`student_stats` computes the softmaxes, `student_grads` writes logit gradients, and `student_stats_and_grads` does both
in one launch, where the gradients do not depend on the statistics beyond the softmaxes themselves. The gradients are

`dz_v = soft · p_v + hard · softmax(z)_v − label · [v = y]`

with `p = softmax(z / τ)`, times the derivative of the logit by the product, except in the columns that the teacher
names: `student_grads` gets those of these columns, and `student_stats_and_grads` subtracts a share from each.

What concerns the teacher's columns only, `[T, K]`, is in `jliger.ops.logits.top_k_divergence`.
"""

import functools
from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int

from jliger.core.backend import Choice
from jliger.ops.logits.top_k_types import StudentCoefficients as StudentCoefficients
from jliger.ops.logits.top_k_types import StudentMap as StudentMap
from jliger.ops.logits.top_k_types import StudentStats as StudentStats
from jliger.ops.logits.types import Block


class _StudentStatsFn(Protocol):
    def __call__(self, product: Float[Array, "T V"], block: Block, student_map: StudentMap) -> StudentStats: ...


class _StudentGradsFn(Protocol):
    def __call__(
        self,
        product: Float[Array, "T V"],
        block: Block,
        student_map: StudentMap,
        stats: StudentStats,
        coefficients: StudentCoefficients,
        ids: Int[Array, "T K"],
        column_grads: Float[Array, "T K"],
        *,
        dtype: jax.typing.DTypeLike,
    ) -> Float[Array, "T V"]: ...


class _StudentStatsAndGradsFn(Protocol):
    def __call__(
        self,
        product: Float[Array, "T V"],
        block: Block,
        student_map: StudentMap,
        coefficients: StudentCoefficients,
        ids: Int[Array, "T K"],
        shares: Float[Array, "T K"],
        *,
        dtype: jax.typing.DTypeLike,
    ) -> tuple[StudentStats, Float[Array, "T V"]]: ...


class StudentRows(NamedTuple):
    """The row functions of a backend.

    Attributes:
      student_stats, student_grads, student_stats_and_grads: the functions. `ids` are columns of the block, each at most
        once in a row; negative for none.
      alignment: as in `jliger.ops.logits.Rows`.
    """

    student_stats: _StudentStatsFn
    student_grads: _StudentGradsFn
    student_stats_and_grads: _StudentStatsAndGradsFn
    alignment: int


def get_student_rows(implementation: Choice, compute_capability: int | None) -> StudentRows:
    """The row functions of a backend. Triton is imported only here, when it is chosen."""
    assert implementation != "by platform"  # `run_by_platform` has already chosen an implementation.
    if implementation == "xla":
        from jliger.ops.logits import top_k_xla as xla

        return StudentRows(xla.student_stats, xla.student_grads, xla.student_stats_and_grads, alignment=1)
    from jliger.ops.logits import top_k_triton as triton

    for_gpu = functools.partial(functools.partial, compute_capability=compute_capability)
    return StudentRows(
        for_gpu(triton.student_stats),
        for_gpu(triton.student_grads),
        for_gpu(triton.student_stats_and_grads),
        alignment=8,
    )
