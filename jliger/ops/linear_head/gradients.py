"""gradients: which form computes them, and for what. Knows nothing of devices, chunks or kernels.

Two differentiable functions. `weighted_loss` is the forward form: a scalar whose gradients are computed along with it,
so that its cotangent only scales them. `token_stats` is the recompute form: per-token stats with any cotangents.

Both learn from `symbolic_zeros` which inputs are being differentiated. In place of what is not needed stands an array
of size zero: a residual tree that changed its structure would not survive a cached trace under `jax.checkpoint`.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core import meshes
from jliger.core.autodiff import instantiate, is_symbolic_zero, perturbed_flags, primal_values
from jliger.core.dtypes import accumulator_dtype
from jliger.core.second_derivatives import once_differentiable
from jliger.core.vmap import vmappable
from jliger.ops.linear_head import sharding
from jliger.ops.linear_head.chunks import Grads, GradTypes, Head, TeacherHead, Tokens
from jliger.ops.linear_head.sharding import Form, Result
from jliger.ops.linear_head.types import Context, HeadConfig, Inputs
from jliger.ops.logits import RowStats
from jliger.ops.logits.objectives import coefficients_of


class WeightedLoss(Protocol):
    """A loss that is a weighted sum over tokens, such as `CrossEntropy`."""

    def total(self, stats: Any, labels: Any, weights: Any) -> Float[Array, ""]:
        """The sum."""
        ...

    def coefficients(self, labels: Any, weights: Any) -> Any:
        """Those of its logit gradients, for the row functions; known before the stats are."""
        ...


# ---- the forward form ----------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_loss(
    config: HeadConfig, loss: WeightedLoss, inputs: Inputs, context: Context, labels: Any, weights: Any
) -> tuple[Float[Array, ""], Any]:
    """The weighted sum of token losses, and the tokens' stats, through which no gradient flows."""
    stats = _stats(Form("stats", config), inputs, context)
    return loss.total(stats, labels, weights), stats


def _weighted_loss_fwd(
    config: HeadConfig, loss: WeightedLoss, inputs: Any, context: Any, labels: Any, weights: Any
) -> tuple[tuple[Float[Array, ""], Any], Any]:
    perturbed = perturbed_flags(inputs)
    inputs, context, labels, weights = primal_values((inputs, context, labels, weights))
    sums = accumulator_dtype(inputs.hidden.dtype)
    wanted = _only(perturbed, GradTypes(inputs.hidden.dtype, sums, sums, inputs.hidden.dtype, sums))
    coefficients, unit = _in_units(loss.coefficients(labels, weights), inputs.hidden)
    stats, grads, _ = _run(Form("forward", config, wanted), inputs, context, coefficients)
    assert stats is not None
    # Of the inputs only their types are kept.
    return (loss.total(stats, labels, weights), stats), (_with_placeholders(grads), unit, _empty_like(inputs))


def _weighted_loss_bwd(
    config: HeadConfig, loss: WeightedLoss, residuals: Any, cotangents: Any
) -> tuple[Inputs, None, None, None]:
    del loss
    grads, unit, like = residuals
    factor = sharding.whole_cotangent(config, instantiate(cotangents[0]))
    return _scaled(config, grads, factor if unit is None else factor * unit, like), None, None, None


weighted_loss.defvjp(_weighted_loss_fwd, _weighted_loss_bwd, symbolic_zeros=True)


# ---- the recompute form --------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_stats(config: HeadConfig, inputs: Inputs, context: Context) -> RowStats:
    """The tokens' stats, differentiable in all but `max`, a mere shift of `log_sum`, and `prediction`."""
    return _stats(Form("stats", config, lean=True), inputs, context)


def _token_stats_fwd(config: HeadConfig, inputs: Any, context: Any) -> tuple[RowStats, Any]:
    perturbed = perturbed_flags(inputs)
    inputs, context = primal_values((inputs, context))
    form = Form("kept stats", config) if config.keep_logits else Form("stats", config, lean=True)
    stats, _, logits = _run(form, inputs, context)
    assert isinstance(stats, RowStats)
    flags = [jnp.zeros((int(flag),), jnp.bool) for flag in perturbed]
    # From max and log-sum alone the row functions know every probability again.
    return stats, (inputs, context, (stats.max, stats.log_sum), stats.mean_logit, logits, flags)


def _token_stats_bwd(config: HeadConfig, residuals: Any, cotangents: Any) -> tuple[Inputs, None]:
    inputs, context, kept, mean_logit, logits, flags = residuals
    if is_symbolic_zero(cotangents.mean_logit):
        cotangents = cotangents._replace(mean_logit=None)  # nothing is computed for an entropy that nobody uses
    cotangents = jax.tree.map(instantiate, cotangents, is_leaf=is_symbolic_zero)
    coefficients = coefficients_of(cotangents, mean_logit)
    coefficients = jax.tree.map(functools.partial(sharding.whole_cotangent, config), coefficients)
    coefficients, unit = _in_units(coefficients, inputs.hidden)
    wanted = _only([flag.size > 0 for flag in flags], GradTypes(*_own_dtypes(inputs)))
    form = Form("recompute" if logits is None else "kept", config, wanted)
    grads = _run(form, inputs, context, *kept, coefficients, logits=logits).grads
    return _scaled(config, _with_placeholders(grads), unit, _empty_like(inputs)), None


token_stats.defvjp(_token_stats_fwd, _token_stats_bwd, symbolic_zeros=True)


# ---- what both need ------------------------------------------------------------------------------------------


def _stats(form: Form, inputs: Inputs, context: Context) -> Any:
    stats = _run(form, inputs, context).stats
    assert stats is not None
    return stats


def _run(
    form: Form, inputs: Inputs, context: Context, *per_token: Any, logits: Float[Array, "*B V"] | None = None
) -> Result:
    teacher_hidden = teacher_head = None
    if context.teacher is not None:
        teacher_hidden, teacher_head = context.teacher.hidden, TeacherHead(*context.teacher[1:])
    tokens = Tokens(inputs.hidden, context.labels, context.counted, inputs.adapted, teacher_hidden, logits)
    head = Head(inputs.kernel, inputs.bias, context.class_weights, inputs.adapter, teacher_head)

    def run(config: HeadConfig, examples: Any, tokens: Tokens, head: Head, per_token: Any) -> Result:
        return sharding.run(dataclasses.replace(form, config=config, examples=examples), tokens, head, per_token)

    config = form.config
    # Triton's kernels cannot be differentiated. Where lowering chooses, tangents are XLA's on every platform.
    in_xla = dataclasses.replace(config, implementation="xla")
    operation = once_differentiable(
        functools.partial(run, in_xla, ()), vmappable(functools.partial(run, config)), config.implementation
    )
    return operation(tokens, head, per_token)


def _in_units(coefficients: Any, hidden: Array) -> tuple[Any, Float[Array, ""] | None]:
    """Float16 holds nothing below 6e-8, which 1 / tokens soon is: its gradients are kept in units of the largest."""
    if hidden.dtype != jnp.float16:
        return coefficients, None
    largest = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(field), initial=0) for field in jax.tree.leaves(coefficients)]
    )
    unit = jnp.where(largest == 0, 1, largest)
    return jax.tree.map(lambda field: field / unit, coefficients), unit


def _own_dtypes(inputs: Inputs) -> list[Any]:
    return [None if field is None else field.dtype for field in inputs]


def _only(perturbed: list[bool], dtypes: GradTypes) -> GradTypes:
    return GradTypes(*(dtype if flag else None for flag, dtype in zip(perturbed, dtypes, strict=True)))


def _with_placeholders(grads: Grads | None) -> Grads:
    return Grads(*(jnp.zeros((0,)) if grad is None else grad for grad in grads or (None,) * len(Grads._fields)))


def _empty_like(inputs: Inputs) -> Inputs:
    """Arrays of size zero, of the inputs' dtypes, that vary over the devices of a `shard_map` as they do."""
    return Inputs(*(jnp.zeros((0,)) if field is None else jnp.zeros_like(field, shape=(0,)) for field in inputs))


def _scaled(config: HeadConfig, grads: Grads, factor: Float[Array, ""] | None, like: Inputs) -> Inputs:
    """Gradients times `factor`, rounded once, as their inputs' types want them."""

    def scaled(grad: Array | None, like: Array | None) -> Array | None:
        if grad is None or like is None or not grad.size:
            return None
        if factor is not None:
            grad = grad.astype(factor.dtype) * factor
        return meshes.sum_to_type(grad, like).astype(like.dtype)

    found = Inputs(*map(scaled, grads, like))
    return found._replace(
        hidden=None if found.hidden is None else sharding.split_cotangent(config, found.hidden),
        adapted=None if found.adapted is None else sharding.split_cotangent(config, found.adapted),
    )
