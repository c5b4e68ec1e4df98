"""A batch's rows in microbatches, and back in their order."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

Tree = Any


def check_rows(batch: tuple[Tree, ...], num_microbatches: int, shares: int) -> None:
    """Refuses what has no rows, rows of different numbers, and a number that doesn't divide a device's share of them.

    Args:
      batch: trees of arrays `[rows, ...]`.
      num_microbatches: how many microbatches each device's share is split into.
      shares: how many shares the rows are in.
    """
    rows = {}
    for path, leaf in jax.tree.leaves_with_path(batch):
        if leaf.ndim < 1:
            raise ValueError(f"batch got a scalar at {jax.tree_util.keystr(path)}; its arrays have a row an example.")
        rows.setdefault(leaf.shape[0], jax.tree_util.keystr(path))
    if not rows:
        raise ValueError("batch got no array; pass arrays whose first dimension is the batch's.")
    if len(rows) > 1:
        result = ", ".join(f"{count} at {path}" for count, path in rows.items())
        raise ValueError(f"batch got arrays of different numbers of rows: {result}; all have a row an example.")
    (count,) = rows
    if count % (num_microbatches * shares):
        among = f" over {shares} devices" if shares > 1 else ""
        more = -count % (num_microbatches * shares)
        raise ValueError(
            f"num_microbatches got {num_microbatches}, which doesn't divide the batch's {count} rows{among}; choose "
            f"another number, or add {more} rows whose weight is 0."
        )


def split_rows(batch: Tree, num_microbatches: int) -> Tree:
    """`[rows, ...]` to `[rows / n, n, ...]`, whose second dimension is the microbatches'; nothing is copied.

    The i-th has every n-th row from the i-th on. Where devices have consecutive rows, nothing moves between them: each
    has some of each microbatch.
    """

    def split(array: Array) -> Array:
        shape = (array.shape[0] // num_microbatches, num_microbatches, *array.shape[1:])
        spec = _explicit_spec(array)
        return _reshape(array, shape, spec and (spec[0], None, *spec[1:]))

    return jax.tree.map(split, batch)


def microbatch(batch: Tree, index: Int[Array, ""] | int) -> Tree:
    """The rows `[rows / n, ...]` of one microbatch, from what `split_rows` returns."""
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, axis=1, keepdims=False), batch)


def merge_rows(array: Array) -> Array:
    """`[n, rows / n, ...]`, from all microbatches, to `[rows, ...]` in the batch's order."""
    spec = _explicit_spec(array)
    return _reshape(array.swapaxes(0, 1), (-1, *array.shape[2:]), spec and (spec[1], *spec[2:]))


def shares_of_rows(batch: Tree) -> int:
    """In how many shares devices have the rows, as far as types say."""
    shares = 1
    for leaf in jax.tree.leaves(batch):
        if leaf.ndim and _explicit_spec(leaf):
            sharding = jax.typeof(leaf).sharding
            shares = max(shares, leaf.shape[0] // sharding.shard_shape(leaf.shape)[0])
    return shares


def _explicit_spec(array: Array) -> tuple[Any, ...] | None:
    """An entry for each dimension, where the mesh has Explicit axes."""
    sharding = jax.typeof(array).sharding
    if not sharding.mesh.explicit_axes:
        return None
    return (*sharding.spec, *(None,) * (array.ndim - len(sharding.spec)))


def _reshape(array: Array, shape: tuple[int, ...], spec: tuple[Any, ...] | None) -> Array:
    if spec is None:
        return array.reshape(shape)
    return jnp.reshape(array, shape, out_sharding=NamedSharding(jax.typeof(array).sharding.mesh, P(*spec)))
