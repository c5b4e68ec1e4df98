"""A sum of losses, each differentiated along with its value, so that only sums of gradients are kept.

Differentiating a sum as it is written down keeps what each term needs for its backward pass until the last term is
done. This is to several losses what the forward form (`jliger.ops.linear_head.gradients`) is to one.
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
    """The sum of `term(part, shared, context)[0]`, and what each term has beside its value, stacked.

    Args:
      term: gives a scalar, and other arrays that carry no gradient. It is hashable, and closes over no array.
      parts: a tree of arrays with a leading axis of terms, which are each differentiated in its own.
      shared: what all terms are differentiated in.
      contexts: a tree of arrays with a leading axis of terms that carry no gradient.
    """
    # Float16 underflows without the cotangent of the sum, a loss scale, which is not known here.
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
    # Gradients stay each device's own until its cotangent has come.
    parts, shared = _varying_as_the_sum(term, parts, shared, contexts)

    def step(shared_grad: Array, part_and_context: tuple[Any, Any]) -> tuple[Array, Any]:
        part, context = part_and_context
        value, other, (grad, more) = _value_and_grad(term, (part, shared), context, perturbed)
        return shared_grad + more.astype(shared_grad.dtype), (value, other, grad)

    # Unneeded gradients are arrays of size zero, for the reason given in `ops.linear_head.gradients`.
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
    """A term, what it has beside its value, and its gradients, of size zero where they are not asked for."""
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
    """Inside a `shard_map`, what is differentiated as each device's own, if the sum is."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return parts, shared
    types: Any = jax.make_jaxpr(functools.partial(_sum, term))(parts, shared, contexts).out_avals
    axes = types[0].manual_axis_type.varying

    def varying(leaf: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(leaf).manual_axis_type.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(varying, (parts, shared))


def _is_primal(value: Any) -> bool:
    return isinstance(value, jax.custom_derivatives.CustomVJPPrimal)
