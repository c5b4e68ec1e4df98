"""One device's share: its tokens, its columns, and the sums over devices that its results are part of."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jliger.core.backend import Implementation, run_by_platform
from jliger.core.meshes import Axes
from jliger.ops.linear_head import chunks
from jliger.ops.linear_head.chunks import Grads, GradTypes, Head, Tokens
from jliger.ops.linear_head.sharding.examples import run_examples
from jliger.ops.linear_head.sharding.merge import merge_over, pair_merge
from jliger.ops.linear_head.sharding.passes import Form, Result
from jliger.ops.linear_head.sharding.plan import Plan, first_column
from jliger.ops.logits import RowStats


def run_share(form: Form, plan: Plan, tokens: Tokens, head: Head, per_token: Any) -> Result:
    """What this device contributes, with all sums over devices done; results are sharded as the plan says.

    This is where `implementation=None` becomes one of the implementations, or both of them.
    """

    def run(implementation: Implementation, *operands: Any) -> Result:
        config = dataclasses.replace(form.config, implementation=implementation)
        return _run(dataclasses.replace(form, config=config), plan, *operands)

    return run_by_platform(run, form.config.implementation, tokens, head, per_token)


def _run(form: Form, plan: Plan, tokens: Tokens, head: Head, per_token: Any) -> Result:
    """Leading dimensions become tokens here, on the share, where that moves nothing between devices."""
    if form.examples:
        one = functools.partial(_run, dataclasses.replace(form, examples=()), plan)
        return run_examples(form, one, tokens, head, per_token)
    if not tokens.labels.size:
        return _of_no_tokens(form, plan, tokens, head)
    width = head.kernel.shape[plan.vocab_dim]
    start = first_column(plan.columns, width)
    # Elsewhere a label is no column here; one that is none anywhere stays negative.
    labels = tokens.labels - start
    labels = jnp.where((labels < 0) | (labels >= width), -1, labels)
    flat = Tokens(
        tokens.hidden.reshape(-1, tokens.hidden.shape[-1]),
        labels.reshape(-1),
        tokens.counted.reshape(-1),
        *(
            None if array is None else array.reshape(-1, array.shape[-1])
            for array in (tokens.adapted, tokens.teacher, tokens.logits)
        ),
    )
    per_token = jax.tree.map(lambda array: array.reshape(-1), per_token)
    wanted = _in_sums(form.wanted, plan, tokens)

    merge = functools.partial(merge_over, plan.columns) if plan.columns else None
    stats, grads, logits = None, None, None
    if form.config.teacher is not None:
        coefficients = per_token[0] if per_token else None
        merge_pairs = pair_merge(form.config.teacher.temperature, plan.columns, start) if plan.columns else None
        stats, grads = chunks.distillation_form(form.config, wanted, flat, head, coefficients, merge=merge_pairs)
    elif form.kind == "stats":
        stats = chunks.token_stats(form.config, flat, head, lean=form.lean)
    elif form.kind == "kept stats":
        stats, logits = chunks.kept_stats(form.config, flat, head)
    elif form.kind == "kept":
        grads = chunks.kept_form(form.config, wanted, flat, head, *per_token)
    elif form.kind == "forward":
        stats, grads = chunks.forward_form(form.config, wanted, flat, head, *per_token, merge=merge)
    else:
        grads = chunks.recompute_form(form.config, wanted, flat, head, *per_token)
    if isinstance(stats, RowStats) and merge is not None:
        stats = merge(stats._replace(prediction=jnp.where(flat.counted, stats.prediction + start, -1)))
    if stats is not None:
        stats = jax.tree.map(lambda array: array.reshape(tokens.labels.shape), stats)
    return Result(
        stats,
        None if grads is None else _summed(grads, form.wanted, plan, tokens),
        None if logits is None else logits.reshape(*tokens.labels.shape, width),
    )


def _of_no_tokens(form: Form, plan: Plan, tokens: Tokens, head: Head) -> Result:
    """Stats of no rows, and gradients of zero."""
    rows = jnp.zeros_like(tokens.hidden, chunks.accumulator_dtype(tokens.hidden.dtype), shape=tokens.labels.shape)
    stats = chunks.stats_of(form.config, rows, rows.astype(jnp.int32))
    if form.kind == "stats":
        return Result(stats, None)
    if form.kind == "kept stats":
        shape = (*tokens.labels.shape, head.kernel.shape[plan.vocab_dim])
        return Result(stats, None, jnp.zeros_like(tokens.hidden, form.config.logits_dtype, shape=shape))
    grads = chunks.empty_grads(form.wanted, tokens, head)
    return Result(stats if form.kind == "forward" else None, _summed(grads, form.wanted, plan, tokens))


def _in_sums(wanted: GradTypes, plan: Plan, tokens: Tokens) -> GradTypes:
    """What is summed over devices is summed in float32, and rounded after."""
    sums = chunks.accumulator_dtype(tokens.hidden.dtype)

    def in_sums(dtype: Any, axes: Axes) -> Any:
        return sums if dtype is not None and axes else dtype

    return GradTypes(
        hidden=in_sums(wanted.hidden, plan.columns),
        kernel=in_sums(wanted.kernel, plan.tokens),
        bias=in_sums(wanted.bias, plan.tokens),
        adapted=in_sums(wanted.adapted, plan.columns),
        adapter=in_sums(wanted.adapter, plan.tokens),
    )


def _summed(grads: Grads, wanted: GradTypes, plan: Plan, tokens: Tokens) -> Grads:
    def of_tokens(grad: Array | None, dtype: Any, like: Array | None) -> Array | None:
        if grad is None or like is None:
            return None
        grad = jax.lax.psum(grad, plan.columns) if plan.columns else grad
        return grad.astype(dtype).reshape(like.shape)

    def of_columns(grad: Array | None, dtype: Any, summed: Callable[[Array], Array]) -> Array | None:
        return None if grad is None else summed(grad).astype(dtype)

    return Grads(
        hidden=of_tokens(grads.hidden, wanted.hidden, tokens.hidden),
        kernel=of_columns(grads.kernel, wanted.kernel, plan.sum_kernel_grad),
        bias=of_columns(grads.bias, wanted.bias, plan.sum_over_tokens),
        adapted=of_tokens(grads.adapted, wanted.adapted, tokens.adapted),
        adapter=of_columns(grads.adapter, wanted.adapter, plan.sum_over_tokens),
    )
