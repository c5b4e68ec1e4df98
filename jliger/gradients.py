"""gradients: which form computes them, and for what. Knows nothing of devices, chunks or kernels.

Two differentiable functions. `weighted_loss` is the forward form: a scalar whose gradients are computed along with it,
so that its cotangent only scales them. `token_stats` is the recompute form: per-token stats with any cotangents.

Both learn from `symbolic_zeros` which inputs are being differentiated. In place of what is not needed stands an array
of size zero: a residual tree that changed its structure would not survive a cached trace under `jax.checkpoint`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger import sharding
from jliger.batching import vmappable
from jliger.chunks import Grads, GradTypes, Head, Tokens, accumulator_dtype
from jliger.config import HeadConfig
from jliger.cross_entropy import CrossEntropy, LossWeights, coefficients_of
from jliger.rows import Coefficients, RowStats


class Inputs(NamedTuple):
    """What carries gradients."""

    hidden: Float[Array, "*B H"]
    kernel: Float[Array, "H V"] | Float[Array, "V H"]
    bias: Float[Array, " V"] | None


class Context(NamedTuple):
    """What carries none."""

    labels: Int[Array, "*B"]
    counted: Bool[Array, "*B"]
    class_weights: Float[Array, " V"] | None


# ---- the forward form ----------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_loss(
    config: HeadConfig, loss: CrossEntropy, inputs: Inputs, context: Context, weights: LossWeights
) -> tuple[Float[Array, ""], RowStats]:
    """The weighted sum of token losses, and the tokens' stats, through which no gradient flows."""
    stats = _stats(config, inputs, context, lean=False)
    return loss.total(stats, context.labels, context.class_weights, weights), stats


def _weighted_loss_fwd(
    config: HeadConfig, loss: CrossEntropy, inputs: Any, context: Any, weights: Any
) -> tuple[tuple[Float[Array, ""], RowStats], Any]:
    perturbed = _perturbed(inputs)
    inputs, context, weights = _values((inputs, context, weights))
    sums = accumulator_dtype(inputs.hidden.dtype)
    wanted = _only(perturbed, GradTypes(inputs.hidden.dtype, sums, sums))
    coefficients = loss.coefficients(context.labels, context.class_weights, weights)
    coefficients, unit = _in_units(coefficients, inputs.hidden)
    stats, grads = _on_tokens(sharding.forward_form, config, wanted)(*_sides(config, inputs, context), coefficients)
    value = loss.total(stats, context.labels, context.class_weights, weights)
    return (value, stats), (_with_placeholders(grads), unit, _empty_like(inputs))


def _weighted_loss_bwd(
    config: HeadConfig, loss: CrossEntropy, residuals: Any, cotangents: Any
) -> tuple[Inputs, None, None]:
    del config, loss
    grads, unit, like = residuals
    factor = _instantiated(cotangents[0])
    return _scaled(grads, factor if unit is None else factor * unit, like), None, None


weighted_loss.defvjp(_weighted_loss_fwd, _weighted_loss_bwd, symbolic_zeros=True)


# ---- the recompute form --------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_stats(config: HeadConfig, inputs: Inputs, context: Context) -> RowStats:
    """The tokens' stats, differentiable in all but `max`, a mere shift of `log_sum`, and `prediction`."""
    return _stats(config, inputs, context, lean=True)


def _token_stats_fwd(config: HeadConfig, inputs: Any, context: Any) -> tuple[RowStats, Any]:
    perturbed = _perturbed(inputs)
    inputs, context = _values((inputs, context))
    stats = _stats(config, inputs, context, lean=True)
    flags = Inputs(*(jnp.zeros((int(flag),), jnp.bool) for flag in perturbed))
    # The row functions recompute probabilities from these two alone.
    kept = RowStats(stats.max, stats.log_sum, None, None, None)
    return stats, (inputs, context, kept, flags)


def _token_stats_bwd(config: HeadConfig, residuals: Any, cotangents: Any) -> tuple[Inputs, None]:
    inputs, context, kept, flags = residuals
    cotangents = RowStats(*(None if c is None else _instantiated(c) for c in cotangents))
    coefficients, unit = _in_units(coefficients_of(cotangents), inputs.hidden)
    wanted = _only(Inputs(*(flag.size > 0 for flag in flags)), GradTypes(*_own_dtypes(inputs)))
    grads = _on_tokens(sharding.recompute_form, config, wanted)(*_sides(config, inputs, context), kept, coefficients)
    return _scaled(_with_placeholders(grads), unit, _empty_like(inputs)), None


token_stats.defvjp(_token_stats_fwd, _token_stats_bwd, symbolic_zeros=True)


# ---- what both need ------------------------------------------------------------------------------------------


def _stats(config: HeadConfig, inputs: Inputs, context: Context, *, lean: bool) -> RowStats:
    operation = vmappable(functools.partial(sharding.token_stats, config, lean), sums_tokens=False)
    return operation(*_sides(config, inputs, context))


def _on_tokens(form: Callable[..., Any], config: HeadConfig, wanted: GradTypes) -> Callable[..., Any]:
    sums_tokens = wanted.kernel is not None or wanted.bias is not None
    return vmappable(functools.partial(form, config, wanted), sums_tokens=sums_tokens)


def _sides(config: HeadConfig, inputs: Inputs, context: Context) -> tuple[Tokens, Head]:
    # Class weights of labels are the loss's affair; the row functions need those of all columns, to smooth labels.
    class_weights = context.class_weights if config.with_weighted_sum else None
    return Tokens(inputs.hidden, context.labels, context.counted), Head(inputs.kernel, inputs.bias, class_weights)


def _in_units(coefficients: Coefficients, hidden: Array) -> tuple[Coefficients, Float[Array, ""] | None]:
    """Float16 holds nothing below 6e-8, which 1 / tokens soon is: its gradients are kept in units of the largest."""
    if hidden.dtype != jnp.float16:
        return coefficients, None
    largest = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(field), initial=0) for field in jax.tree.leaves(coefficients)]
    )
    unit = jnp.where(largest == 0, 1, largest)
    return jax.tree.map(lambda field: field / unit, coefficients), unit


def _perturbed(inputs: Any) -> Inputs:
    """Which inputs are being differentiated; an absent bias is not."""
    return Inputs(*(field is not None and field.perturbed for field in inputs))


def _values(tree: Any) -> Any:
    primal = jax.custom_derivatives.CustomVJPPrimal
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=lambda leaf: isinstance(leaf, primal))


def _instantiated(cotangent: Any) -> Array:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _own_dtypes(inputs: Inputs) -> list[Any]:
    return [None if field is None else field.dtype for field in inputs]


def _only(perturbed: Inputs, dtypes: GradTypes) -> GradTypes:
    return GradTypes(*(dtype if flag else None for flag, dtype in zip(perturbed, dtypes, strict=True)))


def _with_placeholders(grads: Grads) -> Grads:
    return Grads(*(jnp.zeros((0,)) if grad is None else grad for grad in grads))


def _empty_like(inputs: Inputs) -> Inputs:
    return Inputs(*(jnp.zeros((0,), dtype) for dtype in _own_dtypes(inputs)))


def _scaled(grads: Grads, factor: Float[Array, ""] | None, like: Inputs) -> Inputs:
    """Gradients times `factor`, rounded once, to their inputs' dtypes."""

    def scaled(grad: Array, like: Array) -> Array | None:
        if not grad.size:
            return None
        if factor is not None:
            grad = grad.astype(jnp.promote_types(grad.dtype, factor.dtype)) * factor
        return grad.astype(like.dtype)

    return Inputs(*(scaled(grad, empty) for grad, empty in zip(grads, like, strict=True)))
