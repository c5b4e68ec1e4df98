"""The row functions: three functions over one block of logits `[T, V]`, which are all that a backend implements.

`row_stats` computes the statistics of each row that a loss needs. `row_grads` computes logit gradients from the merged
statistics and per-row coefficients. `row_stats_and_grads` does both in one launch. Arithmetic is in float32. Gradients
are always a new array: no input is overwritten.
"""

import functools
from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Float

from jliger.core.backend import Choice
from jliger.ops.logits.types import Block as Block
from jliger.ops.logits.types import Coefficients as Coefficients
from jliger.ops.logits.types import LogitMap as LogitMap
from jliger.ops.logits.types import RowStats as RowStats
from jliger.ops.logits.types import StatsWanted as StatsWanted


class _RowStatsFn(Protocol):
    def __call__(
        self, product: Float[Array, "T V"], block: Block, logit_map: LogitMap, wanted: StatsWanted
    ) -> RowStats: ...


class _RowGradsFn(Protocol):
    def __call__(
        self,
        product: Float[Array, "T V"],
        block: Block,
        logit_map: LogitMap,
        row_max: Float[Array, " T"],
        log_sum: Float[Array, " T"],
        coefficients: Coefficients,
        *,
        dtype: jax.typing.DTypeLike,
    ) -> Float[Array, "T V"]: ...


class _RowStatsAndGradsFn(Protocol):
    def __call__(
        self,
        product: Float[Array, "T V"],
        block: Block,
        logit_map: LogitMap,
        wanted: StatsWanted,
        coefficients: Coefficients,
        *,
        dtype: jax.typing.DTypeLike,
    ) -> tuple[RowStats, Float[Array, "T V"]]: ...


class Rows(NamedTuple):
    """The row functions of a backend.

    Attributes:
      row_stats, row_grads, row_stats_and_grads: the three functions.
      alignment: the dimensions of matrix products are padded to a multiple of this, as matrix units require.
    """

    row_stats: _RowStatsFn
    row_grads: _RowGradsFn
    row_stats_and_grads: _RowStatsAndGradsFn
    alignment: int


def get_rows(implementation: Choice, compute_capability: int | None) -> Rows:
    """The row functions of a backend. Triton is imported only here, when it is chosen, so that it stays optional."""
    assert implementation != "by platform"  # `run_by_platform` has already chosen an implementation.
    if implementation == "xla":
        from jliger.ops.logits import xla

        return Rows(xla.row_stats, xla.row_grads, xla.row_stats_and_grads, alignment=1)
    from jliger.ops.logits import triton

    for_gpu = functools.partial(functools.partial, compute_capability=compute_capability)
    return Rows(
        for_gpu(triton.row_stats),
        for_gpu(triton.row_grads),
        for_gpu(triton.row_stats_and_grads),
        alignment=8,
    )
