"""Types of the statistics and gradients that the loops over chunks return."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head.types import Differentiable, GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import RowStats
from jliger.ops.logits.distillation import DistillationStats, SoftmaxStats
from jliger.ops.logits.distillation_types import Comparison

Stats = RowStats | Comparison


def stats_of(config: HeadConfig, number: Any, column: Any) -> Stats:
    """The statistics tree that `config` asks for, with `number` at float leaves and `column` at index leaves."""
    teacher = config.teacher
    if teacher is None:
        optional = (number if wanted else None for wanted in config.stats_wanted)
        return RowStats(number, number, number, column, *optional)
    softmax = SoftmaxStats(number, number, column)
    with_labels = teacher.with_labels
    with_hard_sum = with_labels and teacher.temperature != 1
    return Comparison(
        DistillationStats(softmax, softmax, number if with_labels else None, number if with_hard_sum else None), number
    )


def dtypes_of_sums(wanted: GradientDtypes, dtype: jax.typing.DTypeLike) -> GradientDtypes:
    """The dtypes of gradients while they are summed over chunks, for hidden states of `dtype`."""
    sums = accumulator_dtype(dtype)
    of_head = {name: sums for name in ("kernel", "bias", "adapter") if getattr(wanted, name) is not None}
    return wanted._replace(**of_head)


def zero_gradients(wanted: GradientDtypes, operands: Operands) -> Gradients:
    """Zeros for the wanted gradients. In a `shard_map` they vary over the same axes as the hidden states."""

    def zeros(like: Array | None, dtype: np.dtype | None) -> Array | None:
        return None if dtype is None or like is None else jnp.zeros_like(operands.hidden, dtype, shape=like.shape)

    return Differentiable(*map(zeros, operands.differentiable, wanted))
