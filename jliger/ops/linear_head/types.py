"""What is known when the operation is traced, in one hashable place."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jliger.core.backend import Choice
from jliger.ops.logits import LogitMap, StatsWanted

KernelLayout = Literal["hv", "vh"]


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A teacher's head, and by what the head's distribution is held against the teacher's.

    Attributes:
      head: how the teacher's logits come about.
      beta: as in `jliger.ops.logits.distillation_types.PairMap`.
      temperature: divides the logits of both.
      with_labels: whether labels have a say too.
    """

    head: "HeadConfig"
    beta: float
    temperature: float
    with_labels: bool


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """How hidden states and a kernel become logits, and how that is computed.

    Attributes:
      kernel_layout: `"hv"` for a kernel `[H, V]`, `"vh"` for `[V, H]`.
      logit_scale: multiplies the logits.
      logit_softcap: `c` in `c · tanh(z / c)`, or None.
      logits_dtype: what products are rounded to before the row functions read them.
      precision: of every product, resolved: the backward pass may be traced where the user's default is another.
      chunk_size: tokens a chunk, or None for the rule in `jliger.ops.linear_head.chunks`.
      implementation: the backend of the row functions; below `sharding.shard` it is never `"by platform"`.
      compute_capability: the GPU to compile for, or None for the one present.
      stats_wanted: which of the stats that not every loss needs.
      keep_logits: whether per-token stats keep logits for their backward pass, rather than compute them again.
      vocab_axes: inside a user's `shard_map`, the manual axes over which the kernel's columns are spread.
      teacher: the head that this one is to learn from, or None.
    """

    kernel_layout: KernelLayout
    logit_scale: float
    logit_softcap: float | None
    logits_dtype: np.dtype
    precision: jax.lax.PrecisionLike
    chunk_size: int | None
    implementation: Choice
    compute_capability: int | None
    stats_wanted: StatsWanted
    vocab_axes: tuple[str, ...] = ()
    keep_logits: bool = False
    teacher: TeacherConfig | None = None

    @property
    def vocab_dim(self) -> int:
        """Which dimension of the kernel is the vocabulary."""
        return 1 if self.kernel_layout == "hv" else 0

    @property
    def of_adapter(self) -> "HeadConfig":
        """For products with an adapter, whose layout is always `[R, V]`."""
        return dataclasses.replace(self, kernel_layout="hv")

    def logit_map(self, width: int) -> LogitMap:
        return LogitMap(self.logit_scale, self.logit_softcap, width)


class Inputs(NamedTuple):
    """What carries gradients; as cotangents, None for those that are not asked for."""

    hidden: Float[Array, "*B H"] | Any
    kernel: Float[Array, "H V"] | Float[Array, "V H"] | Any
    bias: Float[Array, " V"] | None
    adapted: Float[Array, "*B R"] | None = None
    adapter: Float[Array, "R V"] | None = None


class Teacher(NamedTuple):
    """A model to learn from."""

    hidden: Float[Array, "*B G"]
    kernel: Float[Array, "G V"] | Float[Array, "V G"]
    bias: Float[Array, " V"] | None


class Context(NamedTuple):
    """What carries none. `class_weights` are here for the row functions, to smooth labels with."""

    labels: Int[Array, "*B"]
    counted: Bool[Array, "*B"]
    class_weights: Float[Array, " V"] | None
    teacher: Teacher | None = None
