"""Batch dimensions of `jax.vmap` on one device: either merged into the tokens, or looped over."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jliger.ops.linear_head.sharding.passes import LossPass, Result, dims_of_operands
from jliger.ops.linear_head.types import Operands
from jliger.ops.logits.objectives import LossArrays


def run_examples(
    loss_pass: LossPass, one_example: Callable[[Operands, LossArrays], Result], operands: Operands, arrays: LossArrays
) -> Result:
    """Runs `one_example` for each example of the enclosing `jax.vmap`s. Every result has their dimensions first.

    A `vmap` whose examples share the head becomes a dimension of tokens, if no result is a sum over tokens. Otherwise
    it becomes a loop: each example then has its own head, or its own gradient of the head.
    """
    leaves, tree = jax.tree.flatten((operands, arrays))
    is_head = [{"t", "u"}.isdisjoint(dims) for dims in jax.tree.leaves(dims_of_operands(loss_pass, operands, arrays))]
    examples = loss_pass.examples
    levels = range(len(examples))
    loops = [level for level in levels if loss_pass.sums_tokens or any(_select(examples[level], is_head))]
    # Dimensions of loops come first, because `jax.lax.map` loops over the first dimension.
    order = (*loops, *(level for level in levels if level not in loops))
    sizes = [_size(loss_pass, leaves, level) for level in levels]

    def arrange(index: int, leaf: Array) -> Array:
        """Moves the dimensions of loops to the front. Arrays with tokens get every dimension that becomes tokens."""
        has = loss_pass.examples_of(index)
        # A token array that is shared by all examples must be broadcast if these become tokens. In a loop it is not
        # copied: each iteration reads the same array.
        gets = [has[level] or not (level in loops or is_head[index]) for level in levels]
        whole = jnp.expand_dims(leaf, [level for level in levels if not has[level]])
        whole = whole.transpose(*order, *range(len(levels), whole.ndim))
        shape = [sizes[level] if gets[level] else 1 for level in order]
        whole = jnp.broadcast_to(whole, (*shape, *whole.shape[len(levels) :]))
        return whole.squeeze([place for place, level in enumerate(order) if not gets[level]])

    def loop(leaves: Sequence[Array], remaining: Sequence[int]) -> Result:
        if not remaining:
            return one_example(*tree.unflatten(leaves))
        flags = examples[remaining[0]]

        def run_member(mapped: list[Array]) -> Result:
            rest = iter(mapped)
            return loop([next(rest) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)], remaining[1:])

        return jax.lax.map(run_member, _select(leaves, flags))

    result = loop([arrange(index, leaf) for index, leaf in enumerate(leaves)], loops)
    # Results have the dimensions in the order of `order`; callers expect the outermost vmap first.
    back = [order.index(level) for level in levels]
    return jax.tree.map(lambda array: array.transpose(*back, *range(len(levels), array.ndim)), result)


def _select(values: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    return [value for value, flag in zip(values, flags, strict=True) if flag]


def _size(loss_pass: LossPass, leaves: Sequence[Array], level: int) -> int:
    """The number of examples of one `vmap` on this device."""
    index = loss_pass.examples[level].index(True)
    return leaves[index].shape[sum(loss_pass.examples_of(index)[:level])]
