"""Batch dimensions of `jax.vmap` on one device: either merged into the tokens, or looped over."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jliger.ops.linear_head.chunks import saved_tokens
from jliger.ops.linear_head.sharding.passes import LossPass, Result, dims_of_operands
from jliger.ops.linear_head.types import DIMS, Operands
from jliger.ops.logits.objectives import LossArrays


def run_examples(
    loss_pass: LossPass, one_example: Callable[[Operands, LossArrays], Result], operands: Operands, arrays: LossArrays
) -> Result:
    """Runs `one_example` for each example of the enclosing `jax.vmap`s. Every result has their dimensions first.

    A `vmap` whose examples share the head becomes a dimension of tokens, if no result is a sum over tokens and logits
    are not kept within a budget. Otherwise it becomes a loop: each example then has its own head, its own gradient of
    the head, or its own part of the budget.
    """
    leaves, tree = jax.tree.flatten((operands, arrays))
    is_head = [{"t", "u"}.isdisjoint(dims) for dims in jax.tree.leaves(dims_of_operands(loss_pass, operands, arrays))]
    examples = loss_pass.examples
    levels = range(len(examples))
    in_loop = loss_pass.sums_tokens or loss_pass.saves_some
    loops = [level for level in levels if in_loop or any(_select(examples[level], is_head))]
    # Dimensions of loops come first, because `jax.lax.map` loops over the first dimension.
    order = (*loops, *(level for level in levels if level not in loops))
    sizes = _sizes_of_examples(loss_pass, leaves)

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


def shape_to_save(
    loss_pass: LossPass, operands: Operands, arrays: LossArrays, num_devices: int = 1, shares: int = 1
) -> tuple[int, ...]:
    """`LossPass.saved_shape`, for operands of one device.

    With `num_devices`, operands and the result are those of that many devices together. All of their axes are taken to
    shard tokens or the vocabulary, but which do is not known yet: the dimensions divide by any that divide the tokens'.
    The budget is divided by `shares`.
    """
    leaves = jax.tree.leaves((operands, arrays))
    index = jax.tree.leaves(dims_of_operands(loss_pass, operands, arrays)).index(DIMS["labels"])
    shape = leaves[index].shape[sum(loss_pass.examples_of(index)) :]
    vocab = operands.kernel.shape[loss_pass.config.vocab_dim - 2]
    num_tokens = -(-math.prod(shape) // num_devices)
    shares *= math.prod(_sizes_of_examples(loss_pass, leaves))
    num_saved = num_devices * saved_tokens(loss_pass.config, num_tokens, vocab, shares)
    parts = [1 if num_devices == 1 else math.gcd(size, num_devices) for size in shape]
    return (*parts, num_saved // math.prod(parts))


def _select(values: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    return [value for value, flag in zip(values, flags, strict=True) if flag]


def _sizes_of_examples(loss_pass: LossPass, leaves: Sequence[Array]) -> list[int]:
    """The number of examples of each `vmap` on this device."""
    firsts = [flags.index(True) for flags in loss_pass.examples]
    return [leaves[index].shape[sum(loss_pass.examples_of(index)[:level])] for level, index in enumerate(firsts)]
