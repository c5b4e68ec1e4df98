"""The description of a loss pass for sharding: static arguments, and the dimensions of operands and results."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float

from jliger.ops.linear_head.chunks import Stats, stats_of
from jliger.ops.linear_head.types import Differentiable, GradientDtypes, Gradients, HeadConfig, Operands, operand_dims
from jliger.ops.logits.objectives import CoefficientRule, KnownCoefficients

_NONE_WANTED = GradientDtypes()
_KNOWN = KnownCoefficients()


@dataclasses.dataclass(frozen=True)
class LossPass:
    """Which loop over chunks to run, and its static arguments.

    Attributes:
      kind: `"stats"` is `chunks.stats_pass`; `"fused"` is `chunks.fused_pass`, with the arguments of `rule` for each
        token; `"recompute"` is `chunks.recompute_pass`, with maximum, log-sum and `Coefficients`; `"save logits"` and
        `"saved logits"` are `chunks.stats_and_logits_pass` and `chunks.saved_logits_pass`. With a teacher, `"stats"`
        and `"fused"` are `chunks.distillation_pass`, without and with `DistillationCoefficients`.
      config: how logits are computed.
      wanted: the dtypes of the wanted gradients.
      low_memory: as in `chunks.stats_pass`.
      rule: as in `chunks.fused_pass`.
      examples: for each enclosing `jax.vmap`, from the outermost, which operands it batches. Batch dimensions are the
        first dimensions, and every result has all of them.
    """

    kind: Literal["stats", "fused", "recompute", "save logits", "saved logits"]
    config: HeadConfig
    wanted: GradientDtypes = _NONE_WANTED
    low_memory: bool = False
    rule: CoefficientRule = _KNOWN
    examples: tuple[tuple[bool, ...], ...] = ()

    @property
    def sums_tokens(self) -> bool:
        """Whether a result is a sum over tokens."""
        return any(dtype is not None for dtype in (self.wanted.kernel, self.wanted.bias, self.wanted.adapter))

    def examples_of(self, operand: int) -> list[bool]:
        """For each `jax.vmap`, whether it batches this operand."""
        return [flags[operand] for flags in self.examples]

    @property
    def has_stats(self) -> bool:
        return self.kind in ("stats", "fused", "save logits")


class Result(NamedTuple):
    """The results of a pass.

    Attributes:
      stats: `[*B]`, or None if the pass only computes gradients.
      grads: the wanted gradients, or None if the pass only computes statistics.
      logits: the products `[*B, V]`, if the pass saves them.
    """

    stats: Stats | None
    grads: Gradients | None
    logits: Float[Array, "*B V"] | None = None


def dims_of_operands(config: HeadConfig, operands: Operands, per_token: Any) -> Any:
    """The dimensions of each operand, as a tree of the operands' structure."""
    dims = operand_dims(config)
    return (
        Operands._make(None if array is None else dims[name] for name, array in operands._asdict().items()),
        jax.tree.map(lambda _: "t", per_token),
    )


def dims_of_results(loss_pass: LossPass) -> Any:
    """The dimensions of each result, as a tuple of `Result`'s structure."""
    dims = operand_dims(loss_pass.config)
    stats = stats_of(loss_pass.config, "t", "t") if loss_pass.has_stats else None
    if loss_pass.kind == "stats":
        return (stats, None, None)
    if loss_pass.kind == "save logits":
        return (stats, None, dims["logits"])
    wanted = loss_pass.wanted._asdict().items()
    return (stats, Differentiable(*(None if dtype is None else dims[name] for name, dtype in wanted)), None)
