"""One device's share: its tokens, its columns, and the sums over devices that its results are part of."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jliger import chunks
from jliger.chunks import Grads, GradTypes, Head, Tokens
from jliger.rows import RowStats
from jliger.sharding.form import Form, Result
from jliger.sharding.plan import Axes, Plan, first_column


def run_share(form: Form, plan: Plan, tokens: Tokens, head: Head, per_token: Any) -> Result:
    """What this device contributes, with all sums over devices done; results are sharded as the plan says.

    Leading dimensions become tokens here, on the share, where that moves nothing between devices.
    """
    if not tokens.labels.size:
        return _of_no_tokens(form, plan, tokens, head)
    width = head.kernel.shape[plan.vocab_dim]
    start = first_column(plan.columns, width)
    # Elsewhere a label is no column here; one that is none anywhere stays negative.
    labels = tokens.labels - start
    labels = jnp.where((labels < 0) | (labels >= width), -1, labels)
    flat = Tokens(tokens.hidden.reshape(-1, tokens.hidden.shape[-1]), labels.reshape(-1), tokens.counted.reshape(-1))
    per_token = jax.tree.map(lambda array: array.reshape(-1), per_token)
    wanted = _in_sums(form.wanted, plan, tokens)

    merge = functools.partial(merge_over, plan.columns) if plan.columns else None
    stats, grads = None, None
    if form.kind == "stats":
        stats = chunks.token_stats(form.config, flat, head, lean=form.lean)
    elif form.kind == "forward":
        stats, grads = chunks.forward_form(form.config, wanted, flat, head, *per_token, merge=merge)
    else:
        grads = chunks.recompute_form(form.config, wanted, flat, head, *per_token)
    if stats is not None and merge is not None:
        stats = merge(stats._replace(prediction=jnp.where(flat.counted, stats.prediction + start, -1)))
    if stats is not None:
        stats = jax.tree.map(lambda array: array.reshape(tokens.labels.shape), stats)
    return Result(stats, None if grads is None else _summed(grads, form.wanted, plan, tokens))


def _of_no_tokens(form: Form, plan: Plan, tokens: Tokens, head: Head) -> Result:
    """Stats of no rows, and gradients of zero."""
    rows = jnp.zeros_like(tokens.hidden, chunks.accumulator_dtype(tokens.hidden.dtype), shape=tokens.labels.shape)
    weighted = rows if form.config.with_weighted_sum else None
    stats = RowStats(rows, rows, rows, rows.astype(jnp.int32), weighted)
    if form.kind == "stats":
        return Result(stats, None)

    def zeros(like: Array | None, dtype: Any) -> Array | None:
        return None if dtype is None or like is None else jnp.zeros_like(like, dtype)

    grads = Grads(
        zeros(tokens.hidden, form.wanted.hidden),
        zeros(head.kernel, form.wanted.kernel),
        zeros(head.bias, form.wanted.bias),
    )
    return Result(stats if form.kind == "forward" else None, _summed(grads, form.wanted, plan, tokens))


def merge_over(axes: Axes, stats: RowStats) -> RowStats:
    """The stats of all columns from those of each device's: nothing larger than `[T]` moves."""
    row_max = jax.lax.pmax(stats.max, axes)
    sum_exp = jax.lax.psum(jnp.exp(stats.log_sum + (stats.max - row_max)), axes)
    # The first column of those that have the maximum; devices without it offer a number past every column.
    nowhere = jnp.iinfo(stats.prediction.dtype).max
    return RowStats(
        max=row_max,
        log_sum=jnp.log(sum_exp),
        label_logit=jax.lax.psum(stats.label_logit, axes),
        prediction=jax.lax.pmin(jnp.where(stats.max == row_max, stats.prediction, nowhere), axes),
        weighted_sum=None if stats.weighted_sum is None else jax.lax.psum(stats.weighted_sum, axes),
    )


def _in_sums(wanted: GradTypes, plan: Plan, tokens: Tokens) -> GradTypes:
    """What is summed over devices is summed in float32, and rounded after."""
    sums = chunks.accumulator_dtype(tokens.hidden.dtype)
    hidden, kernel, bias = wanted
    return GradTypes(
        sums if hidden is not None and plan.columns else hidden,
        sums if kernel is not None and plan.tokens else kernel,
        sums if bias is not None and plan.tokens else bias,
    )


def _summed(grads: Grads, wanted: GradTypes, plan: Plan, tokens: Tokens) -> Grads:
    hidden, kernel, bias = grads
    if hidden is not None:
        hidden = jax.lax.psum(hidden, plan.columns) if plan.columns else hidden
        hidden = hidden.astype(wanted.hidden).reshape(tokens.hidden.shape)
    if kernel is not None:
        kernel = plan.sum_kernel_grad(kernel).astype(wanted.kernel)
    if bias is not None:
        bias = plan.sum_bias_grad(bias).astype(wanted.bias)
    return Grads(hidden, kernel, bias)
