"""One device's part of a pass: the computation on its tokens and columns, and the reductions over devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jliger.core.backend import Implementation, run_by_platform
from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head import chunks
from jliger.ops.linear_head.chunks import Stats
from jliger.ops.linear_head.sharding.examples import run_examples
from jliger.ops.linear_head.sharding.merge import distillation_merge, merge_over
from jliger.ops.linear_head.sharding.passes import LossPass, Result
from jliger.ops.linear_head.sharding.plan import Plan, first_column
from jliger.ops.linear_head.types import DIMS, Differentiable, GradientDtypes, Gradients, Operands, operand_dims
from jliger.ops.logits import RowStats


def run_on_shard(loss_pass: LossPass, plan: Plan, operands: Operands, per_token: Any) -> Result:
    """Runs the pass on one device's operands. Results are reduced over devices, and sharded according to the plan.

    Leading dimensions are flattened into one dimension of tokens only here, on local arrays: the reshape of a sharded
    array would move data between devices.
    """
    if loss_pass.examples:
        one_example = functools.partial(run_on_shard, dataclasses.replace(loss_pass, examples=()), plan)
        return run_examples(loss_pass, one_example, operands, per_token)
    # The loops over chunks need at least one token, because the first chunk is always computed.
    if not operands.labels.size:
        return _run_without_tokens(loss_pass, plan, operands)
    width = operands.kernel.shape[loss_pass.config.vocab_dim]
    start = first_column(plan.columns, width)
    flat = Operands(*(_flatten(name, array) for name, array in operands._asdict().items()))
    # Local index for labels in this shard, −1 for all others.
    labels = flat.labels - start
    flat = flat._replace(labels=jnp.where((labels < 0) | (labels >= width), -1, labels))
    vocab_size = loss_pass.config.vocab_size
    if vocab_size is not None and plan.columns:
        # The program is the same on every device, so how many columns each has is known at run time only.
        flat = flat._replace(num_columns=jnp.clip(vocab_size - start, 0, width))
    per_token = jax.tree.map(lambda array: array.reshape(-1), per_token)

    def run(implementation: Implementation, *arrays: Any) -> Result:
        config = dataclasses.replace(loss_pass.config, implementation=implementation)
        return _run_chunks(dataclasses.replace(loss_pass, config=config), plan, start, *arrays)

    # The innermost place where both implementations can be traced: everything around it is the same for both.
    stats, grads, logits = run_by_platform(run, loss_pass.config.implementation, flat, per_token)
    return Result(
        jax.tree.map(lambda array: array.reshape(operands.labels.shape), stats),
        None if grads is None else _reduce(loss_pass, plan, grads, operands),
        None if logits is None else logits.reshape(*operands.labels.shape, width),
    )


def _run_chunks(
    loss_pass: LossPass, plan: Plan, start: Int[Array, ""] | int, operands: Operands, per_token: Any
) -> Result:
    """Runs the loop over chunks, and merges statistics over the devices that shard the vocabulary."""
    config, wanted = loss_pass.config, _dtypes_of_sums(loss_pass, plan, operands)
    merge = functools.partial(merge_over, plan.columns) if plan.columns else None
    stats: Stats | None = None
    grads = logits = None
    if config.teacher is not None:
        coefficients = per_token[0] if per_token else None
        merge_pairs = distillation_merge(config.teacher.temperature, plan.columns, start) if plan.columns else None
        stats, grads = chunks.distillation_pass(config, wanted, operands, coefficients, merge=merge_pairs)
    elif loss_pass.kind == "stats":
        stats = chunks.stats_pass(config, operands, low_memory=loss_pass.low_memory)
    elif loss_pass.kind == "save logits":
        stats, logits = chunks.stats_and_logits_pass(config, operands)
    elif loss_pass.kind == "saved logits":
        grads = chunks.saved_logits_pass(config, wanted, operands, *per_token)
    elif loss_pass.kind == "fused":
        stats, grads = chunks.fused_pass(config, wanted, operands, loss_pass.rule, per_token, merge=merge)
    else:
        grads = chunks.recompute_pass(config, wanted, operands, *per_token)
    if isinstance(stats, RowStats) and merge is not None:
        prediction = stats.prediction + start
        if operands.counted is not None:
            prediction = jnp.where(operands.counted, prediction, -1)
        stats = merge(stats._replace(prediction=prediction))
    return Result(stats, grads, logits)


def _run_without_tokens(loss_pass: LossPass, plan: Plan, operands: Operands) -> Result:
    """Empty statistics, and gradients of zero."""
    hidden, shape = operands.hidden, operands.labels.shape
    rows = jnp.zeros_like(hidden, accumulator_dtype(hidden.dtype), shape=shape)
    stats = chunks.stats_of(loss_pass.config, rows, rows.astype(jnp.int32)) if loss_pass.has_stats else None
    if loss_pass.kind == "stats":
        return Result(stats, None)
    if loss_pass.kind == "save logits":
        width = operands.kernel.shape[loss_pass.config.vocab_dim]
        return Result(stats, None, jnp.zeros_like(hidden, loss_pass.config.logits_dtype, shape=(*shape, width)))
    grads = chunks.zero_gradients(_dtypes_of_sums(loss_pass, plan, operands), operands)
    return Result(stats, _reduce(loss_pass, plan, grads, operands))


def _flatten(name: str, array: Array | None) -> Array | None:
    """`[T, ...]` from `[*B, ...]`; arrays without tokens stay as they are."""
    if array is None or "t" not in DIMS[name]:
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
