"""How the operation behaves under `jax.vmap`."""

from collections.abc import Callable
from typing import Any

import jax


def vmappable(operation: Callable[..., Any], batched: tuple[tuple[bool, ...], ...] = ()) -> Callable[..., Any]:
    """Makes `operation(batched, *args)` a function of `args` that is usable under `vmap`.

    Nothing is computed here: each `vmap` only adds a dimension of examples, and `operation` is told of it. It is the
    operation that knows on which devices the examples are.

    Args:
      operation: a function of `batched` and of trees of arrays. Each of its results has all dimensions of examples.
      batched: for each `vmap`, the outermost first, which leaves of `args` have its dimension. These dimensions lead.
    """
    operation_with_rule = jax.custom_batching.custom_vmap(lambda *args: operation(batched, *args))

    @operation_with_rule.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        del axis_size
        out = vmappable(operation, (tuple(jax.tree.leaves(in_batched)), *batched))(*args)
        return out, jax.tree.map(lambda _: True, out)

    return operation_with_rule
