"""Small things done to arrays in every chunk."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def pad(array: Array, dims: tuple[int, ...], alignment: int) -> Array:
    """Zeros after those `dims` whose sizes are no multiples of `alignment`, up to the next multiple of eight times it.

    On a GPU, where `alignment` is 8, rows then start on 16 bytes, which matrix units need, and padded ones on 128.
    """
    after = [-size % (8 * alignment) if dim in dims and size % alignment else 0 for dim, size in enumerate(array.shape)]
    return jnp.pad(array, [(0, amount) for amount in after]) if any(after) else array


def materialize(operand: Array) -> Array:
    """Keeps XLA from computing an operand of several products again inside each of them."""
    return jax.lax.optimization_barrier(operand)


def accumulate(total: Array | None, part: Array) -> Array:
    """A sum that starts with its first part: nothing is set to zero to be added to."""
    return part if total is None else total + part


def write_block(full: Array, part: Array, offsets: tuple[Any, ...], *, add: bool) -> Array:
    """`full` with `part` written, or added, at `offsets`."""
    if add:
        part = part + jax.lax.dynamic_slice(full, offsets, part.shape)
    return jax.lax.dynamic_update_slice(full, part.astype(full.dtype), offsets)
