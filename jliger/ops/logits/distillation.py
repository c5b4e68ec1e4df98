"""Row functions that compare the logits of a student and a teacher, and give gradients of the student's logits.

`distillation_stats` computes both softmaxes, `distillation_divergence` compares them, `distillation_grads` writes the
student's logit gradients, and `distillation_stats_and_grads` does all three in one launch. If devices shard the
vocabulary, the caller merges the results of the first two over them before it calls the next.
"""

import functools
from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Float

from jliger.core.backend import Choice
from jliger.ops.logits.distillation_types import DistillationBlock as DistillationBlock
from jliger.ops.logits.distillation_types import DistillationCoefficients as DistillationCoefficients
from jliger.ops.logits.distillation_types import DistillationMap as DistillationMap
from jliger.ops.logits.distillation_types import DistillationStats as DistillationStats
from jliger.ops.logits.distillation_types import Divergence as Divergence
from jliger.ops.logits.distillation_types import Products as Products
from jliger.ops.logits.distillation_types import SoftmaxStats as SoftmaxStats


class _PairStatsFn(Protocol):
    def __call__(
        self, products: Products, block: DistillationBlock, distillation_map: DistillationMap
    ) -> DistillationStats: ...


class _PairDivergenceFn(Protocol):
    def __call__(
        self, products: Products, block: DistillationBlock, distillation_map: DistillationMap, stats: DistillationStats
    ) -> Divergence: ...


class _PairGradsFn(Protocol):
    def __call__(
        self,
        products: Products,
        block: DistillationBlock,
        distillation_map: DistillationMap,
        stats: DistillationStats,
        q_sum: Float[Array, " T"],
        coefficients: DistillationCoefficients,
        *,
        dtype: jax.typing.DTypeLike,
    ) -> Float[Array, "T V"]: ...


class _PairStatsAndGradsFn(Protocol):
    def __call__(
        self,
        products: Products,
        block: DistillationBlock,
        distillation_map: DistillationMap,
        coefficients: DistillationCoefficients,
        *,
        dtype: jax.typing.DTypeLike,
    ) -> tuple[DistillationStats, Divergence, Float[Array, "T V"]]: ...


class DistillationRows(NamedTuple):
    """The distillation row functions of a backend.

    Attributes:
      distillation_stats, distillation_divergence, distillation_grads, distillation_stats_and_grads: the functions.
      alignment: as in `jliger.ops.logits.Rows`.
    """

    distillation_stats: _PairStatsFn
    distillation_divergence: _PairDivergenceFn
    distillation_grads: _PairGradsFn
    distillation_stats_and_grads: _PairStatsAndGradsFn
    alignment: int


def get_distillation_rows(implementation: Choice, compute_capability: int | None) -> DistillationRows:
    """The distillation row functions of a backend. Triton is imported only here, when it is chosen."""
    assert implementation != "by platform"  # `run_by_platform` has already chosen an implementation.
    if implementation == "xla":
        from jliger.ops.logits import distillation_xla as xla

        return DistillationRows(
            xla.distillation_stats,
            xla.distillation_divergence,
            xla.distillation_grads,
            xla.distillation_stats_and_grads,
            alignment=1,
        )
    from jliger.ops.logits import distillation_triton as triton

    for_gpu = functools.partial(functools.partial, compute_capability=compute_capability)
    return DistillationRows(
        for_gpu(triton.distillation_stats),
        for_gpu(triton.distillation_divergence),
        for_gpu(triton.distillation_grads),
        for_gpu(triton.distillation_stats_and_grads),
        alignment=8,
    )
