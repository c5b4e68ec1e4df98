"""What the chunk loops take and give."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jliger.ops.linear_head.types import HeadConfig
from jliger.ops.logits import RowStats
from jliger.ops.logits.distillation import PairStats, SoftmaxStats
from jliger.ops.logits.distillation_types import Comparison

Kernel = Float[Array, "H V"] | Float[Array, "V H"]


class TeacherHead(NamedTuple):
    """The vocabulary's side of what is learnt from."""

    kernel: Kernel
    bias: Float[Array, " V"] | None


class Head(NamedTuple):
    """The vocabulary's side of the operation.

    Attributes:
      kernel: what hidden states are multiplied with.
      bias: added to the logits, or None.
      class_weights: of the row functions, or None for 1.
      adapter: what `Tokens.adapted` is multiplied with, to be added to the logits, or None.
      teacher: the head to learn from, over the same columns, or None.
    """

    kernel: Kernel
    bias: Float[Array, " V"] | None
    class_weights: Float[Array, " V"] | None
    adapter: Float[Array, "R V"] | None = None
    teacher: TeacherHead | None = None


class Tokens(NamedTuple):
    """The tokens' side of the operation.

    Attributes:
      hidden: the hidden states.
      labels: columns.
      counted: which tokens count.
      adapted: hidden states as an adapter has brought them to its rank, or None.
      teacher: hidden states of the teacher, or None.
      logits: the product as it was kept, or None.
    """

    hidden: Float[Array, "T H"]
    labels: Int[Array, " T"]
    counted: Bool[Array, " T"]
    adapted: Float[Array, "T R"] | None = None
    teacher: Float[Array, "T G"] | None = None
    logits: Float[Array, "T V"] | None = None


class GradTypes(NamedTuple):
    """The dtype each gradient is wanted in; None where it is not wanted, and then nothing is computed for it."""

    hidden: np.dtype | None
    kernel: np.dtype | None
    bias: np.dtype | None
    adapted: np.dtype | None = None
    adapter: np.dtype | None = None


class Grads(NamedTuple):
    """Gradients; None where not wanted."""

    hidden: Float[Array, "T H"] | None
    kernel: Kernel | None
    bias: Float[Array, " V"] | None
    adapted: Float[Array, "T R"] | None = None
    adapter: Float[Array, "R V"] | None = None


Stats = RowStats | Comparison


def stats_of(config: HeadConfig, number: Any, column: Any) -> Stats:
    """Stats as `config` asks for them, of the same two things throughout: for numbers, and for columns."""
    teacher = config.teacher
    if teacher is None:
        optional = (number if wanted else None for wanted in config.stats_wanted)
        return RowStats(number, number, number, column, *optional)
    softmax = SoftmaxStats(number, number, column)
    with_labels = teacher.with_labels
    with_hard_sum = with_labels and teacher.temperature != 1
    return Comparison(
        PairStats(softmax, softmax, number if with_labels else None, number if with_hard_sum else None), number
    )


def empty_grads(wanted: GradTypes, tokens: Tokens, head: Head) -> Grads:
    """Zeros, that vary over the devices of a `shard_map` as hidden states do."""

    def zeros(like: Array | None, dtype: np.dtype | None) -> Array | None:
        return None if dtype is None or like is None else jnp.zeros_like(tokens.hidden, dtype, shape=like.shape)

    like = Grads(tokens.hidden, head.kernel, head.bias, tokens.adapted, head.adapter)
    return Grads(*map(zeros, like, wanted))
