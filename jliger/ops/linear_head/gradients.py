"""Gradients: which pass computes them, and for which operands. Independent of devices, chunks and kernels.

There are three differentiable functions. `weighted_loss` and `unit_loss` are scalars whose gradients the fused pass
computes together with the loss; their cotangent only scales them. `token_stats` returns statistics of
each token, which take any cotangents; the recompute pass, or the one with saved logits, computes their gradients in the
backward pass. If the head is frozen, the fused pass computes the gradient of each token's log-probability, which the
token's cotangent scales, if no other result is differentiated.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core.autodiff import (
    decode_absent,
    encode_absent,
    instantiate,
    is_symbolic_zero,
    perturbed_flags,
    primal_values,
)
from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import sum_to_type, with_tokens_of
from jliger.core.second_derivatives import once_differentiable
from jliger.core.vmap import vmappable
from jliger.ops.linear_head import sharding
from jliger.ops.linear_head.sharding import LossPass, Result
from jliger.ops.linear_head.types import DIMS, Differentiable, GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import RowStats
from jliger.ops.logits.objectives import LogprobGradients, LossArrays, coefficients_of
from jliger.ops.logits.top_k_types import TopKStats
from jliger.ops.logits.unit_loss import UnitLoss, label_logprobs

_NO_ARRAYS = LossArrays()


class WeightedLoss(Protocol):
    """A loss that is a weighted sum over tokens, such as `CrossEntropy`."""

    def total(self, stats: Any, labels: Any, weights: Any) -> Float[Array, ""]:
        """The sum."""
        ...

    def coefficients(self, labels: Any, weights: Any) -> Any:
        """The coefficients of its logit gradients, for the row functions; they do not depend on the statistics."""
        ...


# ---- gradients computed together with the loss -----------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_loss(
    config: HeadConfig, loss: WeightedLoss, operands: Operands, labels: Any, weights: Any
) -> tuple[Float[Array, ""], Any, Float[Array, "*B"] | None]:
    """The weighted sum of token losses, the tokens' statistics, and what `Result.skipped` says of their gradients.

    No gradient flows through the last two. If nothing is differentiated, nothing is skipped.
    """
    stats = _run(LossPass("stats", config), operands).stats
    total = loss.total(stats, labels, weights)
    first = jax.tree.leaves(stats)[0]
    skipped = None if config.skip_below is None else jnp.zeros_like(first)
    return total, *_with_examples_of((first, loss.coefficients(labels, weights)), (stats, skipped))


def _weighted_loss_fwd(
    config: HeadConfig, loss: WeightedLoss, operands: Any, labels: Any, weights: Any
) -> tuple[tuple[Float[Array, ""], Any, Float[Array, "*B"] | None], Any]:
    perturbed = perturbed_flags(operands.differentiable)
    operands, labels, weights = primal_values((operands, labels, weights))
    coefficients, unit = _normalize_float16(loss.coefficients(labels, weights), operands.hidden)
    loss_pass = LossPass("fused", config, _only(perturbed, _unscaled_dtypes(operands)))
    result = _run(loss_pass, operands, LossArrays((coefficients,)))
    residuals = encode_absent(result.grads or Differentiable()), unit, _empty_like(operands)
    return (loss.total(result.stats, labels, weights), result.stats, result.skipped), residuals


def _weighted_loss_bwd(
    config: HeadConfig, loss: WeightedLoss, residuals: Any, cotangents: Any
) -> tuple[Operands, None, None]:
    del loss
    grads, unit, like = residuals
    factor = sharding.undo_cotangent_split(config, instantiate(cotangents[0]))
    return _scaled(config, decode_absent(grads), factor if unit is None else factor * unit, like), None, None


weighted_loss.defvjp(_weighted_loss_fwd, _weighted_loss_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def unit_loss(
    config: HeadConfig, loss: UnitLoss, operands: Operands, arrays: LossArrays
) -> tuple[Float[Array, ""], list[Array]]:
    """The sum of a user's loss over units, and the units' auxiliary arrays, through which no gradient flows."""
    return _sum_of_losses(_run(LossPass("stats", config, unit_loss=loss), operands, arrays))


def _unit_loss_fwd(config: HeadConfig, loss: UnitLoss, operands: Any, arrays: Any) -> tuple[Any, Any]:
    for name, trees in (("args", arrays.per_unit), ("loss_fn", arrays.shared)):
        if any(perturbed_flags(trees)):
            what = "is differentiated through arrays that it closes over" if name == "loss_fn" else "are differentiated"
            raise NotImplementedError(
                f"{name} {what}; fused_linear_loss has gradients in hidden, kernel, bias and adapter alone. Pass "
                "constants there: jax.lax.stop_gradient(...)."
            )
    perturbed = perturbed_flags(operands.differentiable)
    operands, arrays = primal_values((operands, arrays))
    wanted = _only(perturbed, _unscaled_dtypes(operands))
    result = _run(LossPass("fused", config, wanted, rule=loss, unit_loss=loss), operands, arrays)
    residuals = encode_absent((*(result.grads or Differentiable()), result.scales))
    return _sum_of_losses(result), (residuals, _empty_like(operands))


def _unit_loss_bwd(config: HeadConfig, loss: UnitLoss, residuals: Any, cotangents: Any) -> tuple[Operands, None]:
    del loss
    (*grads, scales), like = decode_absent(residuals[0]), residuals[1]
    factor = sharding.undo_cotangent_split(config, instantiate(cotangents[0]))
    return _scaled(config, Differentiable(*grads), factor, like, scales), None


unit_loss.defvjp(_unit_loss_fwd, _unit_loss_bwd, symbolic_zeros=True)


def _sum_of_losses(result: Result) -> tuple[Float[Array, ""], list[Array]]:
    assert result.losses is not None
    losses, *others = result.losses
    return losses.sum(), others


# ---- gradients for any cotangents, computed in the backward pass -----------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_stats(config: HeadConfig, with_logprobs: bool, operands: Operands) -> tuple[RowStats, Float[Array, "*B"]]:
    """The tokens' statistics, and their labels' log-probabilities.

    All statistics but `max`, which only shifts `log_sum`, and `prediction` are differentiable. The log-probabilities
    follow from them, but have a cotangent of their own, which says whether they alone are differentiated. Call it
    `with_logprobs` if they may be.
    """
    del with_logprobs
    stats = _run(LossPass("stats", config, low_memory=True), operands).stats
    assert isinstance(stats, RowStats)
    return stats, label_logprobs(stats)


def _token_stats_fwd(config: HeadConfig, with_logprobs: bool, operands: Any) -> tuple[Any, Any]:
    perturbed = perturbed_flags(operands.differentiable)
    operands = primal_values(operands)
    of_head = ["t" not in DIMS[name] for name in Differentiable._fields]
    loss_pass = LossPass("stats", config, low_memory=True)
    if config.keep_logits:
        loss_pass = LossPass("save logits", config)
    elif with_logprobs and not any(flag for flag, is_of_head in zip(perturbed, of_head, strict=True) if is_of_head):
        wanted = _only(perturbed, _unscaled_dtypes(operands))
        loss_pass = LossPass("fused", config, wanted, rule=LogprobGradients())
    result = _run(loss_pass, operands)
    stats = result.stats
    assert isinstance(stats, RowStats)
    flags = Differentiable(*(jnp.ones((1,), jnp.bool) if flag else None for flag in perturbed))
    # The row functions recompute all probabilities from max and log-sum.
    saved = {"logits": result.logits, "logit_rows": result.logit_rows, "row_of": result.row_of}
    of_stats = stats.max, stats.log_sum, stats.mean_logit
    of_grads = encode_absent(flags), encode_absent(result.grads or Differentiable())
    return (stats, label_logprobs(stats)), (operands._replace(**saved), of_stats, of_grads)


def _token_stats_bwd(config: HeadConfig, with_logprobs: bool, residuals: Any, cotangents: Any) -> tuple[Operands]:
    del with_logprobs
    operands, (row_max, log_sum, mean_logit), of_grads = residuals
    flags, logprob_grads = map(decode_absent, of_grads)
    stats, logprobs = cotangents
    others = [stats.log_sum, stats.label_logit, stats.weighted_sum, stats.mean_logit]
    if any(grad is not None for grad in logprob_grads) and all(is_symbolic_zero(ct) for ct in others if ct is not None):
        scales = sharding.undo_cotangent_split(config, instantiate(logprobs))
        return (_scaled(config, logprob_grads, None, _empty_like(operands), scales),)
    if is_symbolic_zero(stats.mean_logit):
        stats = stats._replace(mean_logit=None)  # an unused entropy costs nothing
    stats, logprobs = jax.tree.map(instantiate, (stats, logprobs), is_leaf=is_symbolic_zero)
    stats = stats._replace(log_sum=stats.log_sum - logprobs, label_logit=stats.label_logit + logprobs)
    coefficients = coefficients_of(stats, mean_logit)
    coefficients = jax.tree.map(functools.partial(sharding.undo_cotangent_split, config), coefficients)
    coefficients, unit = _normalize_float16(coefficients, operands.hidden)
    dtypes = Differentiable(*(None if array is None else array.dtype for array in operands.differentiable))
    wanted = _only([flag is not None for flag in flags], dtypes)
    loss_pass = LossPass("recompute" if operands.logits is None else "saved logits", config, wanted)
    grads = _run(loss_pass, operands, LossArrays((row_max, log_sum, coefficients))).grads
    return (_scaled(config, grads or Differentiable(), unit, _empty_like(operands)),)


token_stats.defvjp(_token_stats_fwd, _token_stats_bwd, symbolic_zeros=True)


# ---- no gradients ----------------------------------------------------------------------------------------------


def top_k_stats(config: HeadConfig, operands: Operands) -> TopKStats:
    """The tokens' largest logits, and what makes them log-probabilities."""
    stats = _run(LossPass("stats", config), operands).stats
    assert isinstance(stats, TopKStats)
    return stats


# ---- what both need ------------------------------------------------------------------------------------------


def _run(loss_pass: LossPass, operands: Operands, arrays: LossArrays = _NO_ARRAYS) -> Result:
    def run(examples: Any, operands: Operands, arrays: LossArrays) -> Result:
        return sharding.run(dataclasses.replace(loss_pass, examples=examples), operands, arrays)

    def run_differentiably(operands: Operands, arrays: LossArrays) -> Result:
        if loss_pass.config.products is not None:
            raise NotImplementedError(
                f"a gradient of products={loss_pass.config.products!r} got differentiated: rounding to 8 bits has no "
                "derivative. Pass products=None for second derivatives."
            )
        # Neither Triton's kernels nor custom_partitioning have derivatives: tangents are XLA's on every platform.
        in_xla = dataclasses.replace(loss_pass.config, implementation="xla")
        return sharding.run(dataclasses.replace(loss_pass, config=in_xla), operands, arrays, partition=False)

    once = once_differentiable(run_differentiably, vmappable(run), loss_pass.config.implementation)
    return once(operands, arrays)


def _with_examples_of(others: Any, results: Any) -> Any:
    """`results`, with a dimension for each `vmap` that any of `others` has one for; all of them have one per token.

    `_run` returns results with all dimensions of its arguments. Coefficients are among these only if there are
    gradients. Without, results would have fewer dimensions, which `jax.custom_vjp` does not allow.
    """
    condition = functools.reduce(jnp.logical_or, [jnp.isnan(array) for array in jax.tree.leaves(others)])
    return jax.tree.map(lambda array: jnp.where(condition, array, array), results)


def _unscaled_dtypes(operands: Operands) -> GradientDtypes:
    """The dtypes of gradients that are computed in the forward pass, and scaled in the backward pass.

    Gradients of tokens are written once; those of parameters are sums over chunks, to be rounded after scaling.
    """
    dtype, sums = operands.hidden.dtype, accumulator_dtype(operands.hidden.dtype)
    return GradientDtypes(*(dtype if "t" in DIMS[name] else sums for name in Differentiable._fields))


def _normalize_float16(coefficients: Any, hidden: Array) -> tuple[Any, Float[Array, ""] | None]:
    """Coefficients divided by the largest of them, and that divisor; None, and nothing divided, unless in float16.

    Float16 has no numbers below 6e-8, and 1 / tokens can be as small. Coefficients that are not finite stay their
    tokens' own, and say nothing about the others.
    """
    if hidden.dtype != jnp.float16:
        return coefficients, None
    sizes = [jnp.where(jnp.isfinite(field), jnp.abs(field), 0) for field in jax.tree.leaves(coefficients)]
    largest = functools.reduce(jnp.maximum, [jnp.max(size, initial=0) for size in sizes])
    unit = jnp.where(largest == 0, 1, largest)
    return jax.tree.map(lambda field: field / unit, coefficients), unit


def _only(perturbed: list[bool], dtypes: GradientDtypes) -> GradientDtypes:
    return GradientDtypes(*(dtype if flag else None for flag, dtype in zip(perturbed, dtypes, strict=True)))


def _empty_like(operands: Operands) -> Gradients:
    """Arrays of size zero that keep each operand's dtype and the devices of a `shard_map` that it varies over."""
    return Differentiable(
        *(jnp.zeros((0,)) if array is None else jnp.zeros_like(array, shape=(0,)) for array in operands.differentiable)
    )


def _scaled(
    config: HeadConfig,
    grads: Gradients,
    factor: Float[Array, ""] | None,
    like: Gradients,
    scales: Float[Array, "*B"] | None = None,
) -> Operands:
    """Cotangents of the operands: gradients times `factor`, rounded once to their operands' dtypes.

    Gradients of tokens are also multiplied by `scales`.
    """

    def scaled(name: str, grad: Array | None, like: Array | None) -> Array | None:
        if grad is None or like is None:
            return None
        if factor is not None:
            grad = grad.astype(factor.dtype) * factor
        if scales is not None and "t" in DIMS[name]:
            grad = grad.astype(scales.dtype) * with_tokens_of(grad, scales)[..., None]
        grad = sum_to_type(grad, like).astype(like.dtype)
        return sharding.pre_divide_cotangent(config, grad) if "t" in DIMS[name] else grad

    return Operands(*map(scaled, Differentiable._fields, grads, like))
