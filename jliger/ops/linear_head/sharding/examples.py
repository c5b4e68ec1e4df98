"""The dimensions that `jax.vmap` adds, on one device: tokens of its examples, or a loop over them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jliger.ops.linear_head.chunks import Head, Tokens
from jliger.ops.linear_head.sharding.passes import Form, Result


def run_examples(
    form: Form, one: Callable[[Tokens, Head, Any], Result], tokens: Tokens, head: Head, per_token: Any
) -> Result:
    """`one`, which knows no examples, for each of them; results have all of their dimensions, which lead.

    Examples that share a head, and no sum over tokens, are more tokens. Otherwise they are a loop.
    """
    operands = (tokens, head, per_token)
    leaves, tree = jax.tree.flatten(operands)
    is_head = [part is head for part in operands for _ in jax.tree.leaves(part)]
    levels = range(len(form.examples))
    loops = [level for level in levels if form.sums_tokens or any(_select(form.examples[level], is_head))]
    order = (*loops, *(level for level in levels if level not in loops))
    sizes = [_size(form, leaves, level) for level in levels]

    def arranged(index: int, leaf: Array) -> Array:
        """Dimensions of loops first, those that it has; then those of tokens, which all per-token arrays get."""
        has = [flags[index] for flags in form.examples]
        gets = [has[level] or not (level in loops or is_head[index]) for level in levels]
        whole = jnp.expand_dims(leaf, [level for level in levels if not has[level]])
        whole = whole.transpose(*order, *range(len(levels), whole.ndim))
        shape = [sizes[level] if gets[level] else 1 for level in order]
        whole = jnp.broadcast_to(whole, (*shape, *whole.shape[len(levels) :]))
        return whole.squeeze([place for place, level in enumerate(order) if not gets[level]])

    def loop(leaves: Sequence[Array], remaining: Sequence[int]) -> Result:
        if not remaining:
            return one(*tree.unflatten(leaves))
        flags = form.examples[remaining[0]]

        def member(mapped: list[Array]) -> Result:
            found = iter(mapped)
            each = [next(found) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            return loop(each, remaining[1:])

        return jax.lax.map(member, _select(leaves, flags))

    result = loop([arranged(index, leaf) for index, leaf in enumerate(leaves)], loops)
    back = [order.index(level) for level in levels]
    return jax.tree.map(lambda array: array.transpose(*back, *range(len(levels), array.ndim)), result)


def _select(values: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    return [value for value, flag in zip(values, flags, strict=True) if flag]


def _size(form: Form, leaves: Sequence[Array], level: int) -> int:
    """How many examples a level has here."""
    index = form.examples[level].index(True)
    return leaves[index].shape[sum(flags[index] for flags in form.examples[:level])]
