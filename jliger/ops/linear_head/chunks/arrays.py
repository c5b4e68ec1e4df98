"""Array helpers for the loops over chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def pad(array: Array, dims: tuple[int, ...], alignment: int) -> Array:
    """Pads with zeros the `dims` whose size is not a multiple of `alignment`, to a multiple of `8 · alignment`.

    On a GPU, `alignment` is 8. Rows of 16-bit numbers then start at multiples of 16 bytes, which matrix units require;
    rows that had to be padded start at multiples of 128 bytes.
    """
    after = [-size % (8 * alignment) if dim in dims and size % alignment else 0 for dim, size in enumerate(array.shape)]
    return jnp.pad(array, [(0, amount) for amount in after]) if any(after) else array


def materialize(operand: Array) -> Array:
    """Makes XLA compute an operand once. Without the barrier it may fuse the computation into each product again."""
    return jax.lax.optimization_barrier(operand)


def accumulate(total: Array | None, part: Array) -> Array:
    """`total + part`; `part` if there is no total yet, which saves writing and reading zeros."""
    return part if total is None else total + part


def write_block(full: Array, part: Array, offsets: tuple[Any, ...], *, add: bool) -> Array:
    """`full` with `part` written at `offsets`, or added there."""
    if add:
        part = part + jax.lax.dynamic_slice(full, offsets, part.shape)
    return jax.lax.dynamic_update_slice(full, part.astype(full.dtype), offsets)
