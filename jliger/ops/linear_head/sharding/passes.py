"""The operation as the sharding stage sees it: arrays with roles in, arrays with roles out."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float

from jliger.ops.linear_head.chunks import Grads, GradTypes, Head, Stats, TeacherHead, Tokens, stats_of
from jliger.ops.linear_head.types import HeadConfig

NOTHING_WANTED = GradTypes(None, None, None)


@dataclasses.dataclass(frozen=True)
class Form:
    """Which of the chunk loops to run.

    Attributes:
      kind: `"stats"` for `chunks.token_stats`, `"forward"` for `chunks.forward_form`, whose per-token operands are
        `Coefficients`, `"recompute"` for `chunks.recompute_form`, whose are max, log-sum and `Coefficients`. With a
        teacher, the first two are `chunks.distillation_form`, without and with `PairCoefficients`. `"kept stats"` and
        `"kept"` are `chunks.kept_stats` and `chunks.kept_form`.
      config: how logits come about.
      wanted: which gradients, in which dtypes.
      lean: as `chunks.token_stats` takes it.
      examples: for each `jax.vmap` around, the outermost first, which operands have a dimension of examples for it.
        These dimensions lead, and all results have all of them.
    """

    kind: Literal["stats", "forward", "recompute", "kept stats", "kept"]
    config: HeadConfig
    wanted: GradTypes = NOTHING_WANTED
    lean: bool = False
    examples: tuple[tuple[bool, ...], ...] = ()

    @property
    def sums_tokens(self) -> bool:
        """Whether a result is a sum over tokens."""
        return any(dtype is not None for dtype in (self.wanted.kernel, self.wanted.bias, self.wanted.adapter))


class Result(NamedTuple):
    """What a form computes.

    Attributes:
      stats: `[*B]`, None for gradients alone.
      grads: those wanted; None for stats alone.
      logits: `[*B, V]`, if they are kept.
    """

    stats: Stats | None
    grads: Grads | None
    logits: Float[Array, "*B V"] | None = None


Role = Literal[
    "hidden",
    "token",
    "kernel",
    "vocab",
    "adapted",
    "adapter",
    "teacher",
    "teacher kernel hv",
    "teacher kernel vh",
    "logits",
]
"""Which dimensions an array has: `[*B, H]`, `[*B]`, the kernel's, `[V]`, `[*B, R]`, `[R, V]`; of a teacher with hidden
states of size `G`, `[*B, G]`, `[G, V]` and `[V, G]`; and `[*B, V]`."""


def operand_roles(config: HeadConfig, tokens: Tokens, head: Head, per_token: Any) -> Any:
    """The role of each operand, in the operands' own tree."""

    def role(name: Role, array: Any) -> Any:
        return None if array is None else name

    teacher = None
    if config.teacher is not None and head.teacher is not None:
        layout = f"teacher kernel {config.teacher.head.kernel_layout}"
        teacher = TeacherHead._make((layout, role("vocab", head.teacher.bias)))
    return (
        Tokens._make(
            (
                "hidden",
                "token",
                "token",
                role("adapted", tokens.adapted),
                role("teacher", tokens.teacher),
                role("logits", tokens.logits),
            )
        ),
        Head._make(
            (
                "kernel",
                role("vocab", head.bias),
                role("vocab", head.class_weights),
                role("adapter", head.adapter),
                teacher,
            )
        ),
        jax.tree.map(lambda _: "token", per_token),
    )


def result_roles(form: Form) -> Result:
    """The role of each result, in the result's own tree."""
    stats = None if form.kind in ("recompute", "kept") else stats_of(form.config, "token", "token")
    if form.kind == "stats":
        return Result(stats, None)
    if form.kind == "kept stats":
        return Result(stats, None, "logits")  # type: ignore[bad-argument-type]  # a role in its place
    roles = zip(("hidden", "kernel", "vocab", "adapted", "adapter"), form.wanted, strict=True)
    return Result(stats, Grads._make(None if dtype is None else role for role, dtype in roles))
