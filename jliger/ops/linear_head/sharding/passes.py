"""The description of a loss pass for sharding: static arguments, and the dimensions of operands and results."""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jliger.ops.linear_head.chunks import Stats, stats_of
from jliger.ops.linear_head.types import Differentiable, GradientDtypes, Gradients, HeadConfig, Operands, operand_dims
from jliger.ops.logits.objectives import CoefficientRule, KnownCoefficients, LossArrays
from jliger.ops.logits.unit_loss import UnitLoss

_NONE_WANTED = GradientDtypes()
_KNOWN = KnownCoefficients()


@dataclasses.dataclass(frozen=True)
class LossPass:
    """Which loop over chunks to run, and its static arguments.

    Attributes:
      kind: `"stats"` is `chunks.stats_pass`; `"fused"` is `chunks.fused_pass`, with the arguments of `rule` for each
        token, or `chunks.skipping_pass`, with `Coefficients` and `HeadConfig.skip_below`; `"recompute"` is
        `chunks.recompute_pass`, with maximum, log-sum and `Coefficients`; `"save logits"` and `"saved logits"` are
        `chunks.stats_and_logits_pass` and `chunks.saved_logits_pass`; with a budget of logits,
        `chunks.stats_and_some_logits_pass` and `chunks.partly_saved_pass`. With a teacher, `"stats"` and `"fused"` are
        `chunks.distillation_pass`, without and with `DistillationCoefficients`. If only columns of the teacher
        are known, they are `chunks.top_k_kl_pass`. With `HeadConfig.top_k`, `"stats"` is `chunks.top_k_pass`. With
        `HeadConfig.products`, `"stats"`, `"fused"` and `"recompute"` are `chunks.float8_pass`; the last two are
        `chunks.fused_pass` if only logits have 8-bit products.
      config: how logits are computed.
      wanted: the dtypes of the wanted gradients.
      low_memory: as in `chunks.stats_pass`.
      rule: as in `chunks.fused_pass`.
      unit_loss: a loss whose value for each unit is computed from the statistics, which are then not returned.
      saved_shape: with `HeadConfig.logits_budget`, the dimensions `k` of the logits to save, for each example: one for
        each dimension of tokens, sharded like it, and one more. None before it is known.
      examples: for each enclosing `jax.vmap`, from the outermost, which operands it batches. Batch dimensions are the
        first dimensions, and every result has all of them.
    """

    kind: Literal["stats", "fused", "recompute", "save logits", "saved logits"]
    config: HeadConfig
    wanted: GradientDtypes = _NONE_WANTED
    low_memory: bool = False
    rule: CoefficientRule = _KNOWN
    unit_loss: UnitLoss | None = None
    saved_shape: tuple[int, ...] | None = None
    examples: tuple[tuple[bool, ...], ...] = ()

    @property
    def saves_some(self) -> bool:
        """Whether a result is the logits of some tokens."""
        return self.kind == "save logits" and self.config.logits_budget is not None

    @property
    def sums_tokens(self) -> bool:
        """Whether a result is a sum over tokens."""
        return any(dtype is not None for dtype in (self.wanted.kernel, self.wanted.bias, self.wanted.adapter))

    def examples_of(self, operand: int) -> list[bool]:
        """For each `jax.vmap`, whether it batches this operand."""
        return [flags[operand] for flags in self.examples]

    @property
    def has_stats(self) -> bool:
        return self.kind in ("stats", "fused", "save logits") and self.unit_loss is None

    @property
    def row_ndim(self) -> int:
        """How many of the last dimensions of tokens make a unit, which stays on one device."""
        return 0 if self.unit_loss is None else len(self.unit_loss.row_shape)

    @property
    def row_length(self) -> int | None:
        """How many tokens make a unit, if it is a row; None if it is a token."""
        return math.prod(self.unit_loss.row_shape) if self.row_ndim and self.unit_loss is not None else None

    @property
    def skips(self) -> bool:
        """Whether the pass may skip logit gradients, and says how much."""
        return self.kind == "fused" and self.config.skip_below is not None

    @property
    def has_scales(self) -> bool:
        """Whether gradients of tokens are in units of each token's own scale."""
        return self.unit_loss is not None and np.float16 in (self.wanted.hidden, self.wanted.adapted)


class Result(NamedTuple):
    """The results of a pass.

    Attributes:
      stats: `[*B]`, or None if the pass only computes gradients.
      grads: the wanted gradients, or None if the pass only computes statistics.
      logits: the products `[*B, V]`, if the pass saves them; `[*K, V]` with a budget.
      logit_rows, row_of: with a budget, which token each row belongs to, as in `Operands`.
      losses: the loss and the auxiliary arrays of each unit, if the pass has a `unit_loss`.
      scales: `[*B]`, the units that gradients of tokens are in; None for 1.
      skipped: `[*B]`, the sizes of the logit gradients that were skipped, summed, as shares of the tokens' weights.
    """

    stats: Stats | None
    grads: Gradients | None
    logits: Float[Array, "*B V"] | Float[Array, "*K V"] | None = None
    logit_rows: Int[Array, "*K"] | None = None
    row_of: Int[Array, "*B"] | None = None
    losses: list[Array] | None = None
    scales: Float[Array, "*B"] | None = None
    skipped: Float[Array, "*B"] | None = None


def dims_of_operands(loss_pass: LossPass, operands: Operands, arrays: LossArrays) -> Any:
    """The dimensions of each operand, as a tree of the operands' structure.

    `u` stands for the dimensions of the units. Dimensions beyond those that `types.DIMS` knows have letters of their
    own, and are never sharded.
    """
    dims = operand_dims(loss_pass.config)
    of_operands = Operands._make(None if array is None else dims[name] for name, array in operands._asdict().items())
    names = jax.tree.leaves(of_operands)
    index, letters = itertools.count(len(names)), map(chr, itertools.count(ord("Ā")))
    unit_ndim = operands.labels.ndim - sum(loss_pass.examples_of(names.index(dims["labels"]))) - loss_pass.row_ndim

    def of_array(first: str, ndim: int, array: Array) -> str:
        ndim += sum(loss_pass.examples_of(next(index)))
        return first + "".join(next(letters) for _ in range(array.ndim - ndim))

    return of_operands, LossArrays(
        jax.tree.map(lambda array: of_array("t", array.ndim, array), arrays.per_token),
        jax.tree.map(functools.partial(of_array, "u", unit_ndim), arrays.per_unit),
        jax.tree.map(functools.partial(of_array, "", 0), arrays.shared),
    )


def dims_of_results(loss_pass: LossPass) -> Any:
    """The dimensions of each result, in a `Result`."""
    dims = operand_dims(loss_pass.config)
    result: Any = Result(
        stats_of(loss_pass.config, lambda its_dims, _: its_dims) if loss_pass.has_stats else None, None
    )
    if loss_pass.unit_loss is not None:
        letters = map(chr, itertools.count(ord("Ā")))
        outputs = loss_pass.unit_loss.outputs
        result = result._replace(losses=["u" + "".join(next(letters) for _ in output.shape) for output in outputs])
    if loss_pass.kind == "stats":
        return result
    if loss_pass.kind == "save logits":
        result = result._replace(logits=dims["logits"])
        return result._replace(logit_rows="k", row_of="t") if loss_pass.saves_some else result
    wanted = loss_pass.wanted._asdict().items()
    return result._replace(
        grads=Differentiable(*(None if dtype is None else dims[name] for name, dtype in wanted)),
        scales="t" if loss_pass.has_scales else None,
        skipped="t" if loss_pass.skips else None,
    )
