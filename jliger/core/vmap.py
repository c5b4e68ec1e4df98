"""Support for `jax.vmap`, through `jax.custom_batching.custom_vmap` (jax 0.12)."""

from collections.abc import Callable
from typing import Any

import jax


def vmappable(operation: Callable[..., Any], batched: tuple[tuple[bool, ...], ...] = ()) -> Callable[..., Any]:
    """Makes `operation(batched, *args)` a function of `args` that `vmap` can batch.

    Each `vmap` only adds a batch dimension and records it in `batched`. `operation` handles the batch dimensions
    itself, because it also handles shardings: it may loop over examples, or process them as more tokens.

    Args:
      operation: a function of `batched` and of trees of arrays. All its results have all batch dimensions.
      batched: for each `vmap`, from the outermost, which leaves of `args` it batches. Batch dimensions come first.
    """
    operation_with_rule = jax.custom_batching.custom_vmap(lambda *args: operation(batched, *args))

    @operation_with_rule.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        del axis_size
        out = vmappable(operation, (tuple(jax.tree.leaves(in_batched)), *batched))(*args)
        return out, jax.tree.map(lambda _: True, out)

    return operation_with_rule
