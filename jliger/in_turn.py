"""in_turn: a sum of losses, each differentiated as soon as it is known, so that only sums of gradients are kept.

Differentiating a sum as it is written down keeps what each term needs for its backward pass until the last term is
done. This is to several losses what the forward form (`jliger.gradients`) is to one.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger import sharding

Term = Callable[[Any, Array, Any], tuple[Float[Array, ""], Any]]


def sum_in_turn(
    term: Term, parts: Sequence[Any], shared: Float[Array, "..."], contexts: Sequence[Any]
) -> tuple[Float[Array, ""], tuple[Any, ...]]:
    """The sum of `term(part, shared, context)[0]`, and a tuple of what each term has beside its value.

    Args:
      term: gives a scalar, and other things that carry no gradient. It is hashable, and closes over no array.
      parts: trees of arrays that one term each is differentiated in.
      shared: what all terms are differentiated in.
      contexts: trees of arrays that carry no gradient, one for each term.
    """
    # Float16 underflows without the cotangent of the sum, a loss scale, which is not known here.
    function = _sum if shared.dtype == jnp.float16 else _sum_in_turn
    return function(term, tuple(parts), shared, tuple(contexts))


def _sum(term: Term, parts: tuple[Any, ...], shared: Array, contexts: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
    total, others = jnp.float32(0), []
    for part, context in zip(parts, contexts, strict=True):
        value, other = term(part, shared, context)
        total = total + value
        shared, total = _after(shared, total)
        others.append(other)
    return total, tuple(others)


_sum_in_turn = jax.custom_vjp(_sum, nondiff_argnums=(0,))


def _fwd(term: Term, *primals: Any) -> tuple[Any, Any]:
    perturbed = jax.tree.map(lambda primal: primal.perturbed, primals, is_leaf=_is_primal)
    parts, shared, contexts = jax.tree.map(lambda primal: primal.value, primals, is_leaf=_is_primal)
    like = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, shape=(0,)), (parts, shared))
    # Gradients stay each device's own until its cotangent has come.
    parts, shared = _varying_as_the_sum(term, parts, shared, contexts)

    total, others, grads, shared_grad = jnp.float32(0), [], [], None
    for part, context, of_part in zip(parts, contexts, perturbed[0], strict=True):
        value, other, (grad, more) = _value_and_grad(term, (part, shared), context, (of_part, perturbed[1]))
        total = total + value
        if more is not None:
            more = more.astype(jnp.promote_types(more.dtype, jnp.float32))
            shared_grad = more if shared_grad is None else shared_grad + more
        shared, (total, grad, shared_grad) = _after(shared, (total, grad, shared_grad))
        others.append(other)
        grads.append(grad)
    # In place of what is not asked for an array of size zero, for the reason given in `jliger.gradients`.
    kept = jax.tree.map(lambda _, grad: jnp.zeros((0,)) if grad is None else grad, like, (tuple(grads), shared_grad))
    return (total, tuple(others)), (kept, like)


def _bwd(term: Term, residuals: Any, cotangents: Any) -> tuple[Any, Any, None]:
    del term
    factor = cotangents[0]

    def scaled(grad: Array, like: Array) -> Array | None:
        if not grad.size:
            return None
        product = grad.astype(jnp.promote_types(grad.dtype, factor.dtype)) * factor
        return sharding.sum_to_type(product, like).astype(like.dtype)

    return *jax.tree.map(scaled, *residuals), None


_sum_in_turn.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _value_and_grad(
    term: Term, differentiated: tuple[Any, Array], context: Any, perturbed: Any
) -> tuple[Array, Any, tuple[Any, Array | None]]:
    """A term, what it has beside its value, and its gradients, None for those that are not asked for."""
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
    return value, other, merged(grads, [None] * len(leaves))


def _after(shared: Array, results: Any) -> tuple[Array, Any]:
    """What the next term reads, not before this one's results are there: XLA might work on both at once."""
    return jax.lax.optimization_barrier((shared, results))


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
