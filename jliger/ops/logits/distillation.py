"""The row functions of pairs: a student's logits, a teacher's, and the gradients of the student's.

`pair_stats` finds both softmaxes, `pair_divergence` compares them, `pair_grads` writes the student's logit gradients,
and `pair_stats_and_grads` does all three in one launch. Where devices share the columns, what the first two find is
merged over them in between.
"""

import functools
from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Float

from jliger.core.backend import Choice
from jliger.ops.logits.distillation_types import Divergence as Divergence
from jliger.ops.logits.distillation_types import PairBlock as PairBlock
from jliger.ops.logits.distillation_types import PairCoefficients as PairCoefficients
from jliger.ops.logits.distillation_types import PairMap as PairMap
from jliger.ops.logits.distillation_types import PairStats as PairStats
from jliger.ops.logits.distillation_types import Products as Products
from jliger.ops.logits.distillation_types import SoftmaxStats as SoftmaxStats


class _PairStatsFn(Protocol):
    def __call__(self, products: Products, block: PairBlock, pair_map: PairMap) -> PairStats: ...


class _PairDivergenceFn(Protocol):
    def __call__(self, products: Products, block: PairBlock, pair_map: PairMap, stats: PairStats) -> Divergence: ...


class _PairGradsFn(Protocol):
    def __call__(
        self,
        products: Products,
        block: PairBlock,
        pair_map: PairMap,
        stats: PairStats,
        slope: Float[Array, " T"],
        coefficients: PairCoefficients,
        *,
        dtype: jax.typing.DTypeLike,
    ) -> Float[Array, "T V"]: ...


class _PairStatsAndGradsFn(Protocol):
    def __call__(
        self,
        products: Products,
        block: PairBlock,
        pair_map: PairMap,
        coefficients: PairCoefficients,
        *,
        dtype: jax.typing.DTypeLike,
    ) -> tuple[PairStats, Divergence, Float[Array, "T V"]]: ...


class PairRows(NamedTuple):
    """A backend.

    Attributes:
      pair_stats, pair_divergence, pair_grads, pair_stats_and_grads: the four functions.
      alignment: as in `jliger.ops.logits.Rows`.
    """

    pair_stats: _PairStatsFn
    pair_divergence: _PairDivergenceFn
    pair_grads: _PairGradsFn
    pair_stats_and_grads: _PairStatsAndGradsFn
    alignment: int


def get_pair_rows(implementation: Choice, compute_capability: int | None) -> PairRows:
    """The row functions of pairs of a backend; Triton is imported here, when it is asked for, and nowhere before."""
    assert implementation != "by platform"  # `run_by_platform` is around
    if implementation == "xla":
        from jliger.ops.logits import distillation_xla as pair_xla

        return PairRows(
            pair_xla.pair_stats,
            pair_xla.pair_divergence,
            pair_xla.pair_grads,
            pair_xla.pair_stats_and_grads,
            alignment=1,
        )
    from jliger.ops.logits import distillation_triton as pair_triton

    for_gpu = functools.partial(functools.partial, compute_capability=compute_capability)
    return PairRows(
        for_gpu(pair_triton.pair_stats),
        for_gpu(pair_triton.pair_divergence),
        for_gpu(pair_triton.pair_grads),
        for_gpu(pair_triton.pair_stats_and_grads),
        alignment=8,
    )
