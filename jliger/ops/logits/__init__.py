"""rows: the whole of a backend, three functions over one block of logits `[T, V]`, all arithmetic in float32.

`row_stats` reads what a loss needs of each row, `row_grads` writes logit gradients from what is known of each row,
`row_stats_and_grads` does both in one launch. Gradients are a new array, always: nothing that is read is written.
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
    """A backend.

    Attributes:
      row_stats, row_grads, row_stats_and_grads: the three functions.
      alignment: the sides of a product are best a multiple of this, so that matrix units take them.
    """

    row_stats: _RowStatsFn
    row_grads: _RowGradsFn
    row_stats_and_grads: _RowStatsAndGradsFn
    alignment: int


def get_rows(implementation: Choice, compute_capability: int | None) -> Rows:
    """The row functions of a backend; Triton is imported here, when it is asked for, and nowhere before."""
    assert implementation != "by platform"  # `run_by_platform` is around
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
