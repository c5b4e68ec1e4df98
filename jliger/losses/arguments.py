"""Argument handling shared by all losses: checks at trace time, casts to float32, one sharding, and masks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jliger.core import checks


def real_arrays(what: str, **arrays: Any) -> tuple[Array, ...]:
    """Checks that arrays are floating-point and of one shape; casts them to float32, or to float64 if one is float64.

    Nothing is broadcast: `[B]` with `[B, 1]` would give `[B, B]`, whose sum is a wrong loss without an error.
    """
    for name, array in arrays.items():
        _check_no_tuple(name, array)
    result = {name: checks.as_array(name, array) for name, array in arrays.items()}
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
    """`real_arrays` for arrays with one number per sequence or per pair; raises for arrays with one per token."""
    result = real_arrays(what, **arrays)
    if result[0].ndim > 1:
        raise ValueError(
            f"{next(iter(arrays))} got shape {result[0].shape}; pass {what}, [B]. Reduce log-probabilities of tokens "
            "with losses.sequence_logprobs first; if sequences have several axes, pass `.ravel()`."
        )
    return result


def mask(name: str, value: Any, like: Array, what: str) -> Bool[Array, "..."]:
    """A bool array of the shape of `like`; all True if `value` is None."""
    if value is None:
        return jnp.ones_like(like, dtype=bool)
    array = checks.as_array(name, value)
    if array.dtype != np.dtype("bool"):
        raise TypeError(f"{name} got dtype {array.dtype}; pass bools (`{name} != 0`).")
    checks.check_shape(name, array, like.shape, what)
    return sharded_like(like, array)


def sharded_like(like: Array, array: Array) -> Array:
    """`array` with the sharding of `like`, which has its shape.

    On Explicit mesh axes JAX raises for elementwise operations on arrays of different shardings.
    """
    wanted, result = jax.typeof(like).sharding, jax.typeof(array).sharding
    return _resharded(like, array) if wanted.mesh.explicit_axes and result != wanted else array


# If no mesh is set, jit takes the mesh from its arguments. `like` has it, so jit must not drop this unused argument.
@functools.partial(jax.jit, keep_unused=True)
def _resharded(like: Array, array: Array) -> Array:
    return jax.sharding.reshard(array, jax.typeof(like).sharding)


def number(name: str, value: Any, *, least: float | None = None, most: float | None = None) -> float:
    """Checks the range of a Python number; returns a float, since a NumPy float64 would promote the loss to float64."""
    checks.check_number(name, value, least=least, most=most)
    return float(value)


def zero_unless(counted: Bool[Array, "*B"], *arrays: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], ...]:
    """Sets uncounted elements to 0, so that their values, even NaN, reach neither the loss nor a gradient."""
    return tuple(jnp.where(counted, array, 0) for array in arrays)


def constant(*arrays: Any) -> Any:
    """The same arrays, treated as constants in differentiation."""
    return jax.lax.stop_gradient(arrays)


def _check_no_tuple(name: str, value: Any) -> None:
    """Raises for a `LinearLogprobs` or a `SequenceLogprobs`, whose fields `jnp.asarray` would stack."""
    if isinstance(value, tuple) and hasattr(value, "logprobs"):
        field = name if hasattr(value, name) else "logprobs"
        raise TypeError(f"{name} got a {type(value).__name__}; pass its field `.{field}`.")
