"""Splits the rows of a batch into microbatches, and restores their order."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

Tree = Any


def check_rows(batch: tuple[Tree, ...], num_microbatches: int, shares: int) -> None:
    """Raises unless all arrays have the same number of rows, and `num_microbatches` divides each device's rows.

    Args:
      batch: trees of arrays `[rows, ...]`.
      num_microbatches: the number of microbatches that each device's rows are split into.
      shares: the number of devices that the rows are sharded over.
    """
    rows = {}
    for path, leaf in jax.tree.leaves_with_path(batch):
        if leaf.ndim < 1:
            raise ValueError(
                f"batch got a scalar at {jax.tree_util.keystr(path)}; pass arrays with one row per example."
            )
        rows.setdefault(leaf.shape[0], jax.tree_util.keystr(path))
    if not rows:
        raise ValueError("batch got no array; pass arrays whose first dimension is the batch's.")
    if len(rows) > 1:
        result = ", ".join(f"{count} at {path}" for count, path in rows.items())
        raise ValueError(f"batch got arrays of different numbers of rows: {result}; pass one row per example.")
    (count,) = rows
    if count % (num_microbatches * shares):
        among = f" over {shares} devices" if shares > 1 else ""
        more = -count % (num_microbatches * shares)
        raise ValueError(
            f"num_microbatches got {num_microbatches}, which doesn't divide the batch's {count} rows{among}; choose "
            f"another number, or add {more} rows whose weight is 0."
        )


def split_rows(batch: Tree, num_microbatches: int) -> Tree:
    """Reshapes `[rows, ...]` to `[rows / n, n, ...]`, whose second dimension is that of microbatches; copies nothing.

    The i-th microbatch has every n-th row, from row i on. If each device has consecutive rows, it has some rows of each
    microbatch, so that no data moves between devices.
    """

    def split(array: Array) -> Array:
        shape = (array.shape[0] // num_microbatches, num_microbatches, *array.shape[1:])
        spec = _explicit_spec(array)
        return _reshape(array, shape, spec and (spec[0], None, *spec[1:]))

    return jax.tree.map(split, batch)


def microbatch(batch: Tree, index: Int[Array, ""] | int) -> Tree:
    """The rows `[rows / n, ...]` of one microbatch; `batch` is a result of `split_rows`."""
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, axis=1, keepdims=False), batch)


def merge_rows(array: Array) -> Array:
    """Merges `[n, rows / n, ...]`, the rows of all microbatches, into `[rows, ...]` in the batch's order."""
    spec = _explicit_spec(array)
    return _reshape(array.swapaxes(0, 1), (-1, *array.shape[2:]), spec and (spec[1], *spec[2:]))


def shares_of_rows(batch: Tree) -> int:
    """The number of devices that the rows are sharded over, according to the arrays' types (Explicit axes)."""
    shares = 1
    for leaf in jax.tree.leaves(batch):
        if leaf.ndim and _explicit_spec(leaf):
            sharding = jax.typeof(leaf).sharding
            shares = max(shares, leaf.shape[0] // sharding.shard_shape(leaf.shape)[0])
    return shares


def _explicit_spec(array: Array) -> tuple[Any, ...] | None:
    """The spec with an entry for each dimension, or None if the mesh has no Explicit axes."""
    sharding = jax.typeof(array).sharding
    if not sharding.mesh.explicit_axes:
        return None
    return (*sharding.spec, *(None,) * (array.ndim - len(sharding.spec)))


def _reshape(array: Array, shape: tuple[int, ...], spec: tuple[Any, ...] | None) -> Array:
    if spec is None:
        return array.reshape(shape)
    return jnp.reshape(array, shape, out_sharding=NamedSharding(jax.typeof(array).sharding.mesh, P(*spec)))
