"""What every loss does with its arguments: checks at trace time, float32, one sharding, and masks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jliger.core import checks


def real_arrays(what: str, **arrays: Any) -> tuple[Array, ...]:
    """Floating-point arrays of one shape, all in float32, or in float64 where one of them is.

    Nothing is broadcast: a `[B]` against a `[B, 1]` would make a `[B, B]` that sums to some number or other.
    """
    for name, array in arrays.items():
        _check_no_tuple(name, array)
    result = {name: jnp.asarray(array) for name, array in arrays.items()}
    first, shape = next((name, array.shape) for name, array in result.items())
    for name, array in result.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} got dtype {array.dtype}; pass floating-point numbers.")
        if array.shape != shape:
            raise ValueError(f"{name} got shape {array.shape}; pass {what}, {shape} as {first}.")
    dtype = jnp.float64 if any(array.dtype == jnp.float64 for array in result.values()) else jnp.float32
    like = next((array for array in result.values() if jax.typeof(array).sharding.mesh.explicit_axes), result[first])
    return tuple(sharded_like(like, array.astype(dtype)) for array in result.values())


def sequence_arrays(what: str, **arrays: Any) -> tuple[Array, ...]:
    """`real_arrays` of one number a sequence, or a pair; those of tokens are refused."""
    result = real_arrays(what, **arrays)
    if result[0].ndim > 1:
        raise ValueError(
            f"{next(iter(arrays))} got shape {result[0].shape}; pass {what}, [B]. Log-probabilities of tokens become "
            "those of sequences through losses.sequence_logprobs; of sequences along several axes, pass `.ravel()`."
        )
    return result


def mask(name: str, value: Any, like: Array, what: str) -> Bool[Array, "..."]:
    """Bools of the shape of `like`; all true for None."""
    if value is None:
        return jnp.ones_like(like, dtype=bool)
    array = jnp.asarray(value)
    if array.dtype != np.dtype("bool"):
        raise TypeError(f"{name} got dtype {array.dtype}; pass bools (`{name} != 0`).")
    checks.check_shape(name, array, like.shape, what)
    return sharded_like(like, array)


def sharded_like(like: Array, array: Array) -> Array:
    """`array`, spread over Explicit mesh axes as `like` of the same shape is: JAX combines no others."""
    wanted, result = jax.typeof(like).sharding, jax.typeof(array).sharding
    return _resharded(like, array) if wanted.mesh.explicit_axes and result != wanted else array


# Where no mesh is set, jit takes that of `like`, which it otherwise has no use for.
@functools.partial(jax.jit, keep_unused=True)
def _resharded(like: Array, array: Array) -> Array:
    return jax.sharding.reshard(array, jax.typeof(like).sharding)


def number(name: str, value: Any, *, least: float | None = None, most: float | None = None) -> float:
    """A Python number in its range, as a Python float: a float64 of NumPy would make the loss one."""
    checks.check_number(name, value, least=least, most=most)
    return float(value)


def zero_unless(counted: Bool[Array, "*B"], *arrays: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], ...]:
    """Zeros where nothing counts: what stands there, NaN included, then reaches neither a value nor a gradient."""
    return tuple(jnp.where(counted, array, 0) for array in arrays)


def constant(*arrays: Any) -> Any:
    """The same, without a gradient."""
    return jax.lax.stop_gradient(arrays)


def _check_no_tuple(name: str, value: Any) -> None:
    """Refuses a `LinearLogprobs` or `SequenceLogprobs`: `jnp.asarray` would stack its fields."""
    if isinstance(value, tuple) and hasattr(value, "logprobs"):
        field = name if hasattr(value, name) else "logprobs"
        raise TypeError(f"{name} got a {type(value).__name__}; pass its field `.{field}`.")
