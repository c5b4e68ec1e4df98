"""The static configuration of an operation on a linear head, its arrays, and their dimensions."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jliger.core.backend import Choice
from jliger.ops.logits import LogitMap, StatsWanted
from jliger.ops.logits.top_k_divergence import TopKDivergence

KernelLayout = Literal["hv", "vh"]
Kernel = Float[Array, "H V"] | Float[Array, "V H"]
Products = Literal["float8", "float8_forward"]


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The teacher's head, and how the student is compared with it.

    Attributes:
      head: how the teacher's logits are computed.
      beta: as in `jliger.ops.logits.distillation_types.DistillationMap`.
      temperature: divides the logits of both.
      with_labels: whether the loss has a cross entropy with labels, too.
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
      logits_dtype: the dtype that products are rounded to before the row functions read them.
      precision: of every product, resolved: the backward pass may be traced under another default.
      chunk_size: tokens a chunk, or None for the rule in `jliger.ops.linear_head.chunks`.
      implementation: the backend of the row functions; below `sharding.shard` it is never `"by platform"`.
      compute_capability: the GPU to compile for, or None for the one present.
      stats_wanted: which optional statistics to compute.
      keep_logits: whether per-token stats keep logits for their backward pass, rather than compute them again.
      logits_budget: the most bytes of logits that each device keeps; None for no limit.
      vocab_axes: inside a user's `shard_map`, the manual axes that shard the kernel's columns.
      vocab_size: how many of the whole kernel's columns exist; the rest is padding. None for all.
      teacher: the teacher's head, or how the student is compared with a teacher of which K columns are known; or None.
      top_k: how many of each token's largest logits to return; None for statistics of all logits.
      products: `"float8"` for products of 8-bit operands, `"float8_forward"` for those of logits alone; None for
        hidden's dtype.
      skip_below: the share of a token's weight up to which the fused pass may skip its logit gradients; None for all.
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
    vocab_size: int | None = None
    keep_logits: bool = False
    logits_budget: int | None = None
    teacher: TeacherConfig | TopKDivergence | None = None
    top_k: int | None = None
    products: Products | None = None
    skip_below: float | None = None

    @property
    def vocab_dim(self) -> int:
        """Which dimension of the kernel is the vocabulary."""
        return 1 if self.kernel_layout == "hv" else 0

    @property
    def of_adapter(self) -> "HeadConfig":
        """For products with an adapter, whose layout is always `[R, V]`."""
        return dataclasses.replace(self, kernel_layout="hv")

    def most_columns(self, width: int) -> int:
        """How many of the first `width` columns exist, at most: of a vocabulary in shards, the first has the most."""
        return width if self.vocab_size is None else min(width, self.vocab_size)

    def logit_map(self, width: int) -> LogitMap:
        return LogitMap(self.logit_scale, self.logit_softcap, self.most_columns(width))


class Head(NamedTuple):
    """A linear head over some columns of the vocabulary.

    Attributes:
      kernel: multiplies the hidden states.
      bias: added to the logits, or None.
      class_weights: multiply the terms of label smoothing, or None for 1.
      adapter: multiplies `Operands.adapted`; the product is added to the logits. None for no adapter.
      num_columns: how many of these columns exist, if that is only known at run time.
    """

    kernel: Kernel
    bias: Float[Array, " V"] | None = None
    class_weights: Float[Array, " V"] | None = None
    adapter: Float[Array, "R V"] | None = None
    num_columns: Int[Array, ""] | None = None


class Operands(NamedTuple):
    """Every array that a loss pass reads, from the public functions down to the loops over chunks.

    The first five can be differentiated; they are the fields of `Differentiable`. `DIMS` says which dimensions each
    array has. `*B` is any number of leading dimensions, and one (`T`) inside a shard.

    Attributes:
      hidden: hidden states.
      kernel: the head's kernel.
      bias: the head's bias.
      adapted: hidden states multiplied by the first matrix of an adapter of rank R.
      adapter: the second matrix of that adapter.
      labels: each token's column; negative if it is out of range.
      counted: which tokens count; None if it is known beforehand that all do.
      class_weights: weights of the columns in label smoothing.
      inverse_temperature: `1 / T`, which multiplies a token's logits last; None for 1.
      teacher_hidden, teacher_kernel, teacher_bias: a second head to compare with, for distillation.
      teacher_ids: in its stead, the columns that are known of the teacher: each at most once, and negative for none.
      teacher_logprobs: the teacher's log-probabilities of these columns; −∞ where there is none.
      teacher_rest: the teacher's probability of all other columns together; None if they are not compared.
      logits: the products, if an earlier pass kept them: of all tokens; of some with `HeadConfig.logits_budget`.
      logit_rows: with a budget, the number of each row of `logits`. Numbers are unique over all devices.
      row_of: with a budget, the number of each token's row of `logits`; −1 if it has none.
      num_columns: how many of a shard's columns exist, if devices differ in that. Only `sharding.shard` sets it.
    """

    hidden: Any
    kernel: Any
    bias: Float[Array, " V"] | None = None
    adapted: Float[Array, "*B R"] | None = None
    adapter: Float[Array, "R V"] | None = None
    labels: Any = None
    counted: Any = None
    class_weights: Float[Array, " V"] | None = None
    inverse_temperature: Float[Array, "*B"] | None = None
    teacher_hidden: Float[Array, "*B G"] | None = None
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"] | None = None
    teacher_bias: Float[Array, " V"] | None = None
    teacher_ids: Int[Array, "*B N"] | None = None
    teacher_logprobs: Float[Array, "*B N"] | None = None
    teacher_rest: Float[Array, "*B"] | None = None
    logits: Float[Array, "*B V"] | Float[Array, "*K V"] | None = None
    logit_rows: Int[Array, "*K"] | None = None
    row_of: Int[Array, "*B"] | None = None
    num_columns: Int[Array, ""] | None = None

    @property
    def head(self) -> Head:
        return Head(self.kernel, self.bias, self.class_weights, self.adapter, self.num_columns)

    @property
    def teacher_head(self) -> Head:
        assert self.teacher_kernel is not None
        return Head(self.teacher_kernel, self.teacher_bias, num_columns=self.num_columns)

    @property
    def differentiable(self) -> "Differentiable[Any]":
        return Differentiable(*self[: len(Differentiable._fields)])


class Differentiable[T](NamedTuple):
    """A value for each operand that can be differentiated: its gradient, or that gradient's dtype.

    None for an operand that is absent or not differentiated; nothing is computed for it.
    """

    hidden: T | None = None
    kernel: T | None = None
    bias: T | None = None
    adapted: T | None = None
    adapter: T | None = None


Gradients = Differentiable[Array]
GradientDtypes = Differentiable[np.dtype]

# Which dimensions each operand, and its gradient, has: t tokens, h hidden, v vocabulary, r the adapter's rank, g the
# teacher's hidden size, k tokens whose logits are kept within a budget, n columns of a token, such as its largest.
# Shardings, reductions over devices and dtypes of sums all follow from this table: a gradient without t is a sum over
# tokens, one without v is a sum over columns.
DIMS: Mapping[str, str] = {
    "hidden": "th",
    "kernel": "hv",
    "bias": "v",
    "adapted": "tr",
    "adapter": "rv",
    "labels": "t",
    "counted": "t",
    "class_weights": "v",
    "inverse_temperature": "t",
    "teacher_hidden": "tg",
    "teacher_kernel": "gv",
    "teacher_bias": "v",
    "teacher_ids": "tn",
    "teacher_logprobs": "tn",
    "teacher_rest": "t",
    "logits": "tv",
    "num_columns": "",
    "logit_rows": "k",
    "row_of": "t",
}


def operand_dims(config: HeadConfig) -> dict[str, str]:
    """`DIMS`, with the kernel layouts of `config`, and logits of the tokens that it says."""
    dims = dict(DIMS)
    if config.logits_budget is not None:
        dims["logits"] = "kv"
    if config.kernel_layout == "vh":
        dims["kernel"] = "vh"
    if isinstance(config.teacher, TeacherConfig) and config.teacher.head.kernel_layout == "vh":
        dims["teacher_kernel"] = "vg"
    return dims
