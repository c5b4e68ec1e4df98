"""The options, checks and defaults that `fused_linear_kl` and `fused_linear_jsd` share."""

import dataclasses
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.core.backend import Implementation
from jliger.core.checks import coefficient
from jliger.core.dtypes import accumulator_dtype
from jliger.core.reduction import Normalizer
from jliger.ops.linear_head.adapter import LinearAdapter
from jliger.ops.linear_head.arguments import head_arguments
from jliger.ops.linear_head.checks import triton_takes
from jliger.ops.linear_head.types import HeadConfig, KernelLayout, Operands, TeacherConfig
from jliger.ops.logits import StatsWanted


class DistillationOptions(TypedDict, total=False):
    """The options that `fused_linear_kl` and `fused_linear_jsd` share.

    What begins with `student_` or `teacher_` is an option of that head; the defaults are those of any head.
    """

    temperature: float
    labels: Int[Array, "*B"] | None
    hard_weight: Float[Array, ""] | float
    soft_weight: Float[Array, ""] | float
    weights: Float[Array, "*B"] | None
    reduction: Literal["mean", "sum"]
    normalizer: Normalizer
    student_bias: Float[Array, " V"] | None
    student_kernel_layout: KernelLayout
    student_logit_scale: float
    student_logit_softcap: float | None
    student_adapter: LinearAdapter | None
    teacher_bias: Float[Array, " V"] | None
    teacher_kernel_layout: KernelLayout
    teacher_logit_scale: float
    teacher_logit_softcap: float | None
    where: Bool[Array, "*B"] | None
    ignore_index: int | None
    vocab_size: int | None
    logits_dtype: jax.typing.DTypeLike | None
    precision: jax.lax.PrecisionLike
    chunk_size: int | None
    vocab_axis_name: str | tuple[str, ...] | None
    implementation: Implementation | None


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call."""

    config: HeadConfig
    reduction: Literal["mean", "sum"]
    ignore_index: int | None


class DistillationArguments(NamedTuple):
    """Checked arguments: arrays, and the static configuration."""

    call: Call
    operands: Operands
    adapter: LinearAdapter | None
    labels: Int[Array, "*B"] | None
    where: Bool[Array, "*B"] | None
    weights: Float[Array, "*B"] | None
    normalizer: Normalizer
    hard_weight: Float[Array, ""] | float
    soft_weight: Float[Array, ""] | float


def distillation_arguments(
    student_hidden: Any,
    student_kernel: Any,
    teacher_hidden: Any,
    teacher_kernel: Any,
    *,
    beta: float,
    **options: Unpack[DistillationOptions],
) -> DistillationArguments:
    """Checks the arguments of both losses."""
    for name in options:
        if name not in DistillationOptions.__annotations__:
            raise TypeError(f"{name} is no option here; pass one of {', '.join(DistillationOptions.__annotations__)}.")
    temperature, normalizer = options.get("temperature", 1.0), options.get("normalizer")
    reduction = options.get("reduction", "mean")
    checks.check_number("beta", beta, least=0, most=1)
    check_loss_options(temperature, reduction, normalizer)
    student_hidden = checks.as_array("student_hidden", student_hidden)
    teacher_hidden = checks.as_array("teacher_hidden", teacher_hidden)
    _check_same_tokens(student_hidden, teacher_hidden)
    dtype = accumulator_dtype(student_hidden.dtype)
    hard_weight = coefficient("hard_weight", options.get("hard_weight", 0.0), dtype, least=0)
    soft_weight = coefficient("soft_weight", options.get("soft_weight", 1.0), dtype, least=0)
    with_labels = not (isinstance(hard_weight, float) and hard_weight == 0)
    labels = options.get("labels")
    if labels is None and with_labels:
        raise ValueError("labels got None with a hard_weight; pass the labels that the cross entropy is to be with.")
    some_labels = jnp.zeros(student_hidden.shape[:-1], jnp.int32) if labels is None else labels
    student_options, teacher_options = _head_options(options)
    student = head_arguments(
        student_hidden, student_kernel, some_labels, stats_wanted=StatsWanted(), whose="student_", **student_options
    )
    teacher = head_arguments(
        teacher_hidden, teacher_kernel, student.labels, stats_wanted=StatsWanted(), whose="teacher_", **teacher_options
    )
    config, of_teacher = student.config, teacher.operands
    _check_same_vocabulary(config, student.operands.kernel, teacher.config, of_teacher.kernel)
    weights = options.get("weights")
    if weights is not None:
        weights = checks.as_array("weights", weights)
        checks.check_weights(weights, student.labels)
    if options.get("implementation") is None and not triton_takes(of_teacher.hidden, teacher.config.logits_dtype):
        config = dataclasses.replace(config, implementation="xla")
    of_config = TeacherConfig(teacher.config, float(beta), float(temperature), with_labels)
    return DistillationArguments(
        call=Call(dataclasses.replace(config, teacher=of_config), reduction, student.ignore_index),
        operands=student.operands._replace(
            teacher_hidden=of_teacher.hidden, teacher_kernel=of_teacher.kernel, teacher_bias=of_teacher.bias
        ),
        adapter=student.adapter,
        labels=None if labels is None else student.labels,
        where=student.where,
        weights=weights,
        normalizer=normalizer,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
    )


_OF_THE_LOSS = ("temperature", "labels", "hard_weight", "soft_weight", "weights", "reduction", "normalizer")


def _head_options(options: DistillationOptions) -> tuple[Any, Any]:
    """Each head's own options and the shared ones; the student's arguments say which tokens count."""
    student, teacher = {}, {}
    for name, value in options.items():
        if name not in (*_OF_THE_LOSS, "where") and not name.startswith("student_"):
            teacher[name.removeprefix("teacher_")] = value
        if name not in _OF_THE_LOSS and not name.startswith("teacher_"):
            student[name.removeprefix("student_")] = value
    return student, teacher


def check_loss_options(temperature: Any, reduction: Any, normalizer: Any) -> None:
    """Checks the options that all distillation losses have."""
    checks.check_number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature got {temperature!r}; pass a number above 0.")
    checks.check_choice("reduction", reduction, ("mean", "sum"))
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer divides a mean; with reduction={reduction!r} divide the result, or pass 'mean'.")


def _check_same_tokens(student_hidden: Any, teacher_hidden: Any) -> None:
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden got shape {teacher_hidden.shape} with student_hidden of shape {student_hidden.shape}; "
            "pass hidden states of the same tokens: all but the last dimension must agree."
        )
    if (teacher_hidden.dtype == jnp.float64) != (student_hidden.dtype == jnp.float64):
        raise TypeError(
            f"teacher_hidden got dtype {teacher_hidden.dtype} with student_hidden of {student_hidden.dtype}; pass "
            "float64 for both, or for neither."
        )


def _check_same_vocabulary(config: HeadConfig, kernel: Any, teacher_config: HeadConfig, teacher_kernel: Any) -> None:
    vocab, teacher_vocab = kernel.shape[config.vocab_dim], teacher_kernel.shape[teacher_config.vocab_dim]
    if teacher_vocab != vocab:
        raise ValueError(
            f"teacher_kernel got shape {teacher_kernel.shape}, for a vocabulary of {teacher_vocab}, with "
            f"student_kernel of shape {kernel.shape}, for one of {vocab}; pass heads over the same vocabulary."
        )
