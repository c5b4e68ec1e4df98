"""How the operation behaves under `jax.vmap`: a batch of tokens is more tokens, a batch of kernels is a loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def vmappable(operation: Callable[..., Any], *, sums_tokens: bool) -> Callable[..., Any]:
    """Makes `operation(tokens, head, *per_token)`, which takes tokens of any leading dimensions, usable under `vmap`.

    Args:
      operation: a function of per-token trees and, second, of the head that all tokens share.
      sums_tokens: whether it returns sums over its tokens. Each member of the batch then needs its own, and the batch
        is gone through one by one; otherwise it joins the tokens' leading dimensions.
    """
    operation_with_rule = jax.custom_batching.custom_vmap(operation)

    @operation_with_rule.def_vmap
    def rule(axis_size: int, in_batched: Any, tokens: Any, head: Any, *per_token: Any) -> tuple[Any, Any]:
        args = (tokens, head, *per_token)
        if sums_tokens or any(jax.tree.leaves(in_batched[1])):
            out = _map(vmappable(operation, sums_tokens=sums_tokens), in_batched, args)
        else:

            def with_batch(array: Any, batched: bool) -> Any:
                return array if batched else jnp.broadcast_to(array, (axis_size, *array.shape))

            trees = jax.tree.map(with_batch, (tokens, *per_token), (in_batched[0], *in_batched[2:]))
            out = vmappable(operation, sums_tokens=False)(trees[0], head, *trees[1:])
        return out, jax.tree.map(lambda _: True, out)

    return operation_with_rule


def _map(function: Callable[..., Any], in_batched: Any, args: Any) -> Any:
    """`jax.lax.map` over those leaves of `args` that are batched."""
    leaves, tree = jax.tree.flatten(args)
    flags = jax.tree.leaves(in_batched)

    def one(batched_leaves: list[Any]) -> Any:
        remaining = iter(batched_leaves)
        return function(
            *tree.unflatten([next(remaining) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)])
        )

    return jax.lax.map(one, [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag])
