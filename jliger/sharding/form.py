"""The operation as the sharding stage sees it: arrays with roles in, arrays with roles out."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

from jliger.chunks import Grads, GradTypes, Head, Tokens
from jliger.config import HeadConfig
from jliger.rows import RowStats

NOTHING_WANTED = GradTypes(None, None, None)


@dataclasses.dataclass(frozen=True)
class Form:
    """Which of the chunk loops to run.

    Attributes:
      kind: `"stats"` for `chunks.token_stats`, `"forward"` for `chunks.forward_form`, whose per-token operands are
        `Coefficients`, `"recompute"` for `chunks.recompute_form`, whose are max, log-sum and `Coefficients`.
      config: how logits come about.
      wanted: which gradients, in which dtypes.
      lean: as `chunks.token_stats` takes it.
    """

    kind: Literal["stats", "forward", "recompute"]
    config: HeadConfig
    wanted: GradTypes = NOTHING_WANTED
    lean: bool = False

    @property
    def sums_tokens(self) -> bool:
        """Whether a result is a sum over tokens."""
        return any(dtype is not None for dtype in (self.wanted.kernel, self.wanted.bias, self.wanted.adapter))


class Result(NamedTuple):
    """What a form computes.

    Attributes:
      stats: `[*B]`, None in the recompute form.
      grads: those wanted; None for stats alone.
    """

    stats: RowStats | None
    grads: Grads | None


Role = Literal["hidden", "token", "kernel", "vocab", "adapted", "adapter"]
"""Which dimensions an array has: `[*B, H]`, `[*B]`, the kernel's, `[V]`, `[*B, R]`, or `[R, V]`."""


def operand_roles(tokens: Tokens, head: Head, per_token: Any) -> Any:
    """The role of each operand, in the operands' own tree."""

    def role(name: Role, array: Any) -> Any:
        return None if array is None else name

    return (
        Tokens._make(("hidden", "token", "token", role("adapted", tokens.adapted))),
        Head._make(
            ("kernel", role("vocab", head.bias), role("vocab", head.class_weights), role("adapter", head.adapter))
        ),
        jax.tree.map(lambda _: "token", per_token),
    )


def result_roles(form: Form) -> Result:
    """The role of each result, in the result's own tree."""
    stats = None
    if form.kind != "recompute":
        optional = ("token" if wanted else None for wanted in form.config.stats_wanted)
        stats = RowStats._make(("token", "token", "token", "token", *optional))
    if form.kind == "stats":
        return Result(stats, None)
    roles = zip(("hidden", "kernel", "vocab", "adapted", "adapter"), form.wanted, strict=True)
    return Result(stats, Grads._make(None if dtype is None else role for role, dtype in roles))
