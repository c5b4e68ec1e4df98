"""Types of the statistics and gradients that the loops over chunks return."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head.types import Differentiable, GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import RowStats
from jliger.ops.logits.distillation import DistillationStats, SoftmaxStats
from jliger.ops.logits.distillation_types import Comparison, LabelledStudent
from jliger.ops.logits.top_k_divergence import TopKDivergence
from jliger.ops.logits.top_k_types import TopKStats, TopLogits

Stats = RowStats | Comparison | TopKStats


def stats_of(config: HeadConfig, leaf: Callable[[str, bool], Any]) -> Stats:
    """The statistics tree that `config` asks for.

    `leaf` makes a leaf from its dimensions, named as in `types.DIMS`, and from whether it holds columns, not numbers.
    """
    number, column = leaf("t", False), leaf("t", True)
    if config.top_k is not None:
        return TopKStats(TopLogits(leaf("tn", True), leaf("tn", False)), number, number)
    teacher = config.teacher
    if teacher is None:
        optional = (number if wanted else None for wanted in config.stats_wanted)
        return RowStats(number, number, number, column, *optional)
    softmax = SoftmaxStats(number, number, column)
    with_labels = teacher.with_labels
    label_logit = number if with_labels else None
    hard_log_sum = number if with_labels and teacher.temperature != 1 else None
    if isinstance(teacher, TopKDivergence):
        return Comparison(LabelledStudent(softmax, label_logit, hard_log_sum), number)
    return Comparison(DistillationStats(softmax, softmax, label_logit, hard_log_sum), number)


def empty_stats(config: HeadConfig, hidden: Array, shape: tuple[int, ...]) -> Any:
    """Statistics of 0 and columns of −1 for tokens of this shape, varying over the same mesh axes as `hidden`."""

    def leaf(dims: str, is_column: bool) -> Array:
        of_token = () if dims == "t" else (config.top_k,)
        dtype = jnp.dtype(jnp.int32) if is_column else accumulator_dtype(hidden.dtype)
        return jnp.full_like(hidden, -1 if is_column else 0, dtype, shape=(*shape, *of_token))

    return stats_of(config, leaf)


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
