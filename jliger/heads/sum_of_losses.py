"""A sum of losses whose terms are differentiated in the forward pass, so that only gradients are kept.

Ordinary differentiation of a sum keeps the residuals of every term until the backward pass. Here each term is
differentiated right after it is computed. This is the fused pass (`jliger.ops.linear_head.gradients`), for a sum of
losses.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core import meshes
from jliger.core.dtypes import accumulator_dtype

Term = Callable[[Any, Array, Any], tuple[Float[Array, ""], Any]]


def sum_with_eager_gradients(
    term: Term, parts: Any, shared: Float[Array, "..."], contexts: Any
) -> tuple[Float[Array, ""], Any]:
    """`Σ term(part, shared, context)[0]`, and the terms' auxiliary outputs, stacked.

    Args:
      term: returns a scalar, and auxiliary arrays without gradients. It is hashable and closes over no array.
      parts: a tree of arrays whose first axis is that of the terms. Each term is differentiated in its own part.
      shared: an array that all terms are differentiated in.
      contexts: a tree of arrays whose first axis is that of the terms, without gradients.
    """
    # The cotangent of the sum, which may be a loss scale, is not known in the forward pass. Without the scale, float16
    # gradients would underflow, so they are computed in the backward pass.
    function = _sum if shared.dtype == jnp.float16 else _sum_with_eager_gradients
    return function(term, parts, shared, contexts)


def _sum(term: Term, parts: Any, shared: Array, contexts: Any) -> tuple[Float[Array, ""], Any]:
    def step(_: None, part_and_context: tuple[Any, Any]) -> tuple[None, Any]:
        part, context = part_and_context
        return None, term(part, shared, context)

    values, others = jax.lax.scan(step, None, (parts, contexts))[1]
    return values.sum(), others


_sum_with_eager_gradients = jax.custom_vjp(_sum, nondiff_argnums=(0,))


def _fwd(term: Term, *primals: Any) -> tuple[Any, Any]:
    perturbed = jax.tree.map(lambda primal: primal.perturbed, primals[:2], is_leaf=_is_primal)
    parts, shared, contexts = jax.tree.map(lambda primal: primal.value, primals, is_leaf=_is_primal)
    like = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, shape=(0,)), (parts, shared))
    # In a `shard_map`, gradients stay per device until the backward pass multiplies them by this device's cotangent.
    parts, shared = _varying_as_the_sum(term, parts, shared, contexts)

    def step(shared_grad: Array, part_and_context: tuple[Any, Any]) -> tuple[Array, Any]:
        part, context = part_and_context
        value, other, (grad, more) = _value_and_grad(term, (part, shared), context, perturbed)
        return shared_grad + more.astype(shared_grad.dtype), (value, other, grad)

    # Unneeded gradients are arrays of size zero, for the reason that `core.autodiff.encode_absent` gives.
    dtype = accumulator_dtype(shared.dtype)
    start = jnp.zeros_like(shared, dtype) if perturbed[1] else jnp.zeros((0,))
    shared_grad, (values, others, grads) = jax.lax.scan(step, start, (parts, contexts))
    return (values.sum(), others), ((grads, shared_grad), like)


def _bwd(term: Term, residuals: Any, cotangents: Any) -> tuple[Any, Any, None]:
    del term
    factor = cotangents[0]

    def scaled(grad: Array, like: Array) -> Array | None:
        if not grad.size:
            return None
        product = grad.astype(factor.dtype) * factor
        return meshes.sum_to_type(product, like).astype(like.dtype)

    return *jax.tree.map(scaled, *residuals), None


_sum_with_eager_gradients.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _value_and_grad(
    term: Term, differentiated: tuple[Any, Array], context: Any, perturbed: Any
) -> tuple[Array, Any, tuple[Any, Array]]:
    """Value, auxiliary output and gradients of a term; unneeded gradients are empty arrays."""
    leaves, tree = jax.tree.flatten(differentiated)
    flags = jax.tree.leaves(perturbed)

    def merged(wanted: Iterable[Any], others: Sequence[Any]) -> Any:
        wanted = iter(wanted)
        return jax.tree.unflatten(
            tree, [next(wanted) if flag else other for other, flag in zip(others, flags, strict=True)]
        )

    def function(wanted: list[Array]) -> Any:
        part, shared = merged(wanted, leaves)
        return term(part, shared, context)

    wanted = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
    value, pull_back, other = jax.vjp(function, wanted, has_aux=True)
    (grads,) = pull_back(jnp.ones_like(value))
    return value, other, merged(grads, [jnp.zeros((0,))] * len(leaves))


def _varying_as_the_sum(term: Term, parts: Any, shared: Array, contexts: Any) -> tuple[Any, Array]:
    """In a `shard_map`, casts the differentiated arrays to vary over the sum's axes, so gradients stay per device."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return parts, shared
    # `manual_axis_type` and `jax.lax.pcast` are those of jax 0.12.
    types: Any = jax.make_jaxpr(functools.partial(_sum, term))(parts, shared, contexts).out_avals
    axes = types[0].manual_axis_type.varying

    def varying(leaf: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(leaf).manual_axis_type.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(varying, (parts, shared))


def _is_primal(value: Any) -> bool:
    return isinstance(value, jax.custom_derivatives.CustomVJPPrimal)
