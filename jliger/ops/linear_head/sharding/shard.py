"""One device's part of a pass: the computation on its tokens and columns, and the reductions over devices."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jliger.core.backend import Implementation, run_by_platform
from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import Axes
from jliger.ops.linear_head import chunks
from jliger.ops.linear_head.chunks import Stats
from jliger.ops.linear_head.sharding.examples import run_examples, shape_to_save
from jliger.ops.linear_head.sharding.merge import distillation_merge, merge_over, student_merge, top_k_merge
from jliger.ops.linear_head.sharding.passes import LossPass, Result
from jliger.ops.linear_head.sharding.plan import Plan, first_column
from jliger.ops.linear_head.types import DIMS, Differentiable, GradientDtypes, Gradients, Operands, operand_dims
from jliger.ops.logits import RowStats, StatsWanted
from jliger.ops.logits.objectives import LossArrays
from jliger.ops.logits.top_k_divergence import TopKDivergence


def run_on_shard(loss_pass: LossPass, plan: Plan, operands: Operands, arrays: LossArrays) -> Result:
    """Runs the pass on one device's operands. Results are reduced over devices, and sharded according to the plan.

    Leading dimensions are flattened into one dimension of tokens only here, on local arrays: the reshape of a sharded
    array would move data between devices.
    """
    if loss_pass.saves_some and loss_pass.saved_shape is None:
        loss_pass = dataclasses.replace(loss_pass, saved_shape=shape_to_save(loss_pass, operands, arrays))
    if loss_pass.examples:
        one_example = functools.partial(run_on_shard, dataclasses.replace(loss_pass, examples=()), plan)
        return run_examples(loss_pass, one_example, operands, arrays)
    # The loops over chunks need at least one token, because the first chunk is always computed.
    if not operands.labels.size:
        return _run_without_tokens(loss_pass, plan, operands)
    width = operands.kernel.shape[loss_pass.config.vocab_dim]
    start = first_column(plan.columns, width)
    flat = Operands(*(_flatten(name, array) for name, array in operands._asdict().items()))
    # Local index for labels in this shard, −1 for all others.
    labels = flat.labels - start
    flat = flat._replace(labels=jnp.where((labels < 0) | (labels >= width), -1, labels))
    arrays = _flatten_arrays(loss_pass, arrays, operands)
    vocab_size = loss_pass.config.vocab_size
    if vocab_size is not None and plan.columns:
        # The program is the same on every device, so how many columns each has is known at run time only.
        flat = flat._replace(num_columns=jnp.clip(vocab_size - start, 0, width))

    def run(implementation: Implementation, operands: Operands, arrays: LossArrays) -> Result:
        config = dataclasses.replace(loss_pass.config, implementation=implementation)
        return _run_chunks(dataclasses.replace(loss_pass, config=config), plan, start, operands, arrays)

    # The innermost place where both implementations can be traced: everything around it is the same for both.
    result = run_by_platform(run, loss_pass.config.implementation, flat, arrays)
    shape = operands.labels.shape
    of_units = shape[: len(shape) - loss_pass.row_ndim]
    of_tokens = jax.tree.map(
        lambda array: array.reshape(*shape, *array.shape[1:]),
        (result.stats, result.scales, result.row_of, result.skipped),
    )
    of_logits = loss_pass.saved_shape or shape
    return Result(
        stats=of_tokens[0],
        grads=None if result.grads is None else _reduce(loss_pass, plan, result.grads, operands),
        logits=None if result.logits is None else result.logits.reshape(*of_logits, width),
        logit_rows=None if result.logit_rows is None else result.logit_rows.reshape(of_logits),
        row_of=of_tokens[2],
        losses=jax.tree.map(lambda array: array.reshape(*of_units, *array.shape[1:]), result.losses),
        scales=of_tokens[1],
        skipped=of_tokens[3],
    )


def _run_chunks(
    loss_pass: LossPass, plan: Plan, start: Int[Array, ""] | int, operands: Operands, arrays: LossArrays
) -> Result:
    """Runs the loop over chunks, and merges statistics over the devices that shard the vocabulary."""
    config, wanted, per_token = loss_pass.config, _dtypes_of_sums(loss_pass, plan, operands), arrays.per_token
    merge = functools.partial(_merged, plan.columns, start) if plan.columns else None
    stats: Stats | None = None
    grads = logits = logit_rows = row_of = scales = skipped = None
    if isinstance(config.teacher, TopKDivergence):
        coefficients = per_token[0] if per_token else None
        merge_student = student_merge(config.teacher.temperature, plan.columns, start) if plan.columns else None
        stats, grads = chunks.top_k_kl_pass(config, wanted, operands, coefficients, start, merge_student)
    elif config.teacher is not None:
        coefficients = per_token[0] if per_token else None
        merge_pairs = distillation_merge(config.teacher.temperature, plan.columns, start) if plan.columns else None
        stats, grads = chunks.distillation_pass(config, wanted, operands, coefficients, merge=merge_pairs)
    elif config.top_k is not None:
        stats = chunks.top_k_pass(config, operands)
        stats = top_k_merge(plan.columns, start, stats) if plan.columns else stats
    elif config.products is not None:
        stats, grads = _run_float8(loss_pass, wanted, operands, arrays, merge)
    elif loss_pass.kind == "stats":
        stats = chunks.stats_pass(config, operands, low_memory=loss_pass.low_memory)
    elif loss_pass.saved_shape is not None:
        num_saved = math.prod(loss_pass.saved_shape)
        stats, logits, row_of = chunks.stats_and_some_logits_pass(config, operands, num_saved)
        first = jax.lax.axis_index(plan.tokens) * num_saved if plan.tokens else 0
        logit_rows = first + jnp.arange(num_saved, dtype=jnp.int32)
        row_of = jnp.where(row_of < 0, -1, first + row_of)
    elif loss_pass.kind == "save logits":
        stats, logits = chunks.stats_and_logits_pass(config, operands)
    elif loss_pass.kind == "saved logits":
        saved_pass = chunks.saved_logits_pass if config.logits_budget is None else chunks.partly_saved_pass
        grads = saved_pass(config, wanted, operands, *per_token)
    elif loss_pass.skips:
        if merge is not None:
            raise NotImplementedError(
                "skip_gradients_below got a vocabulary that is sharded over devices; shard the tokens instead, or pass "
                "None."
            )
        stats, grads, skipped = chunks.skipping_pass(config, wanted, operands, *per_token)
    elif loss_pass.kind == "fused":
        length = loss_pass.row_length
        stats, grads, scales = chunks.fused_pass(config, wanted, operands, loss_pass.rule, arrays, merge, length)
    else:
        grads = chunks.recompute_pass(config, wanted, operands, *per_token)
    if isinstance(stats, RowStats):
        if merge is not None and loss_pass.kind != "fused" and config.products is None:
            stats = merge(stats)
        if operands.counted is not None:
            stats = stats._replace(prediction=jnp.where(operands.counted, stats.prediction, -1))
        if loss_pass.unit_loss is not None:
            losses = loss_pass.unit_loss.losses(stats, arrays)
            return Result(None, grads, losses=losses, scales=scales if loss_pass.has_scales else None)
    return Result(stats, grads, logits, logit_rows, row_of, skipped=skipped)


def _run_float8(
    loss_pass: LossPass,
    wanted: GradientDtypes,
    operands: Operands,
    arrays: LossArrays,
    merge: Callable[[RowStats], RowStats] | None,
) -> tuple[RowStats | None, Gradients | None]:
    """Runs a pass with 8-bit products. Each computes the statistics from its logits, and merges them."""
    config, kind = loss_pass.config, loss_pass.kind
    if kind == "recompute":
        # What the backward pass knows of the statistics is not enough to choose the units of 8-bit gradients.
        arrays = LossArrays(arrays.per_token[-1:])
        config = dataclasses.replace(config, stats_wanted=StatsWanted())
    run_pass = chunks.float8_pass if config.products == "float8" or kind == "stats" else chunks.fused_pass
    stats, grads, *_ = run_pass(config, wanted, operands, loss_pass.rule, arrays, merge, loss_pass.row_length)
    return (None if kind == "recompute" else stats), (None if kind == "stats" else grads)


def _merged(columns: Axes, start: Int[Array, ""] | int, stats: RowStats) -> RowStats:
    """Statistics of all columns, from those of this device's, which begin with column `start`."""
    return merge_over(columns, stats._replace(prediction=stats.prediction + start))


def _run_without_tokens(loss_pass: LossPass, plan: Plan, operands: Operands) -> Result:
    """Empty statistics, and gradients of zero."""
    hidden, shape = operands.hidden, operands.labels.shape
    rows = jnp.zeros_like(hidden, accumulator_dtype(hidden.dtype), shape=shape)
    stats = chunks.empty_stats(loss_pass.config, hidden, shape) if loss_pass.has_stats else None
    result = Result(stats, None)
    if loss_pass.unit_loss is not None:
        of_units = shape[: len(shape) - loss_pass.row_ndim]
        outputs = loss_pass.unit_loss.outputs
        losses = [jnp.zeros_like(hidden, output.dtype, shape=(*of_units, *output.shape)) for output in outputs]
        result = result._replace(losses=losses, scales=rows if loss_pass.has_scales else None)
    if loss_pass.kind == "stats":
        return result
    if loss_pass.kind == "save logits":
        width = operands.kernel.shape[loss_pass.config.vocab_dim]
        of_logits = loss_pass.saved_shape or shape
        logits = jnp.zeros_like(hidden, loss_pass.config.logits_dtype, shape=(*of_logits, width))
        if loss_pass.saves_some:
            numbers = jnp.zeros_like(operands.labels, jnp.int32, shape=of_logits), operands.labels.astype(jnp.int32)
            result = result._replace(logit_rows=numbers[0], row_of=numbers[1])
        return result._replace(logits=logits)
    grads = chunks.zero_gradients(_dtypes_of_sums(loss_pass, plan, operands), operands)
    skipped = rows if loss_pass.skips else None
    return result._replace(grads=_reduce(loss_pass, plan, grads, operands), skipped=skipped)


def _flatten_arrays(loss_pass: LossPass, arrays: LossArrays, operands: Operands) -> LossArrays:
    """Arrays with one dimension of tokens or units."""
    unit_ndim = operands.labels.ndim - loss_pass.row_ndim
    return LossArrays(
        jax.tree.map(lambda array: array.reshape(-1), arrays.per_token),
        jax.tree.map(lambda array: array.reshape(-1, *array.shape[unit_ndim:]), arrays.per_unit),
        arrays.shared,
    )


def _flatten(name: str, array: Array | None) -> Array | None:
    """`[T, ...]` from `[*B, ...]`, and `[K, ...]` from `[*K, ...]`; arrays without tokens stay as they are."""
    if array is None or {"t", "k"}.isdisjoint(DIMS[name]):
        return array
    return array.reshape(-1, *array.shape[array.ndim - (len(DIMS[name]) - 1) :])


def _dtypes_of_sums(loss_pass: LossPass, plan: Plan, operands: Operands) -> GradientDtypes:
    """The dtypes of this device's gradients: float32 for those that are summed over devices and rounded afterwards."""
    sums = accumulator_dtype(operands.hidden.dtype)
    dims = operand_dims(loss_pass.config)
    return GradientDtypes(
        *(
            sums if dtype is not None and plan.reduction_axes(dims[name]) else dtype
            for name, dtype in loss_pass.wanted._asdict().items()
        )
    )


def _reduce(loss_pass: LossPass, plan: Plan, grads: Gradients, operands: Operands) -> Gradients:
    """Sums gradients over devices, casts them, and restores the leading dimensions of token gradients."""
    dims = operand_dims(loss_pass.config)

    def reduce(name: str, grad: Array | None, dtype: Any, like: Array | None) -> Array | None:
        if grad is None or like is None:
            return None
        grad = plan.reduce(grad, dims[name]).astype(dtype)
        return grad.reshape(like.shape) if "t" in dims[name] else grad

    return Differentiable(*map(reduce, Differentiable._fields, grads, loss_pass.wanted, operands.differentiable))
