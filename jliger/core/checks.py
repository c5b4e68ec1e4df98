"""Argument checks at trace time. Each error names the argument, the value that it got, and what to pass instead."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} got {value!r}; pass one of {', '.join(map(repr, choices))}.")


def is_array(value: Any) -> bool:
    """Whether `value` is a single array: not a Flax box, a module or a list of arrays."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "OSU"
    if isinstance(value, jax.Array | np.generic | int | float | complex):
        return True
    return hasattr(type(value), "__jax_array__") or hasattr(type(value), "__array__")


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as a JAX array; raises if it is not a single array."""
    if is_array(value):
        return jnp.asarray(value)
    if value is None:
        raise TypeError(f"{name} got None; pass an array.")
    if isinstance(value, list | tuple | np.ndarray):
        instead = "pass one array of numbers, for example the result of jnp.asarray or jnp.stack."
    elif isinstance(value, Mapping):
        instead = "pass one of its arrays; the functions of jliger.linen take the variables of a layer."
    elif isinstance(value, str):
        instead = "pass an array."
    elif hasattr(value, "unbox"):
        instead = "pass the array in this box: flax.linen.meta.unbox removes all boxes."
    else:
        instead = (
            "pass an array. For a Flax layer, pass the kernel (or an Embed's embedding, with kernel_layout='vh'); the "
            "functions of jliger.nnx and jliger.linen take the layer itself."
        )
    raise TypeError(f"{name} got a {type(value).__name__}; {instead}")


def check_number(
    name: str, value: Any, *, least: float | None = None, most: float | None = None, instead: str = ""
) -> None:
    """Raises unless `value` is a finite Python number in `[least, most]`. It becomes part of the compiled program.

    `instead` is added to the error for a traced number, and says what else to do with it.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} got a traced value; pass a Python number, since it becomes part of the compiled kernel (with "
            f"static_argnames, jax.jit does not trace it){instead}."
        )
    # A bool is an int, but True for a number is a mistake: a flag's value, or a threshold of 1.
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(
            f"{name} got {type(value).__name__}; pass a Python number, since it becomes part of the compiled kernel."
        )
    if not np.isfinite(value) or (least is not None and value < least) or (most is not None and value > most):
        bounds = f"in [{least}, {most}]" if most is not None else f"of at least {least}" if least is not None else ""
        raise ValueError(f"{name} got {value!r}; pass a finite number {bounds}".rstrip() + ".")


def check_axes(name: str, value: Any) -> tuple[str, ...]:
    """The names of manual mesh axes as a tuple; raises if one is not a manual axis."""
    axes = (value,) if isinstance(value, str) or not isinstance(value, list | tuple | None) else tuple(value or ())
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for axis in axes:
        if axis not in manual:
            raise ValueError(
                f"{name} got {axis!r}, which is no manual mesh axis here (there are {tuple(manual)}); it is for use "
                "inside jax.shard_map. Outside of it, leave it out and shard the kernel."
            )
    return axes


def check_shape(name: str, array: Any, shape: tuple[int, ...], what: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} got shape {array.shape}; pass {what}, {shape}.")


def check_where(where: Any, labels: Any) -> None:
    if where.dtype != np.dtype("bool"):
        raise TypeError(f"where got dtype {where.dtype}; pass bools (`where != 0`), or numbers as `weights`.")
    check_shape("where", where, labels.shape, "one bool per token")


def check_weights(weights: Any, labels: Any) -> None:
    if not _is_real(weights):
        raise TypeError(f"weights got dtype {weights.dtype}; pass real numbers, or bools as `where`.")
    check_shape("weights", weights, labels.shape, "one weight per token")


def check_normalizer(normalizer: Any) -> None:
    if not _is_real(normalizer):
        raise TypeError(f"normalizer got dtype {normalizer.dtype}; pass a real number.")
    check_shape("normalizer", normalizer, (), "a scalar")


def _is_real(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)


def check_precision(precision: Any) -> None:
    """Raises unless `jax.lax.dot_general` accepts `precision`, which must also be hashable, to be a static argument."""
    try:
        _try_precision(precision)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"precision got {precision!r}; pass what jax.lax.dot_general takes: None, a string such as 'highest', a "
            "jax.lax.Precision, a tuple of two of these, or a jax.lax.DotAlgorithmPreset."
        ) from error


@functools.cache
def _try_precision(precision: Any) -> None:
    number = jax.ShapeDtypeStruct((), jnp.float32)
    jax.eval_shape(lambda a, b: jax.lax.dot_general(a, b, (((), ()), ((), ())), precision), number, number)


def check_floating(name: str, array: Any) -> None:
    if array.dtype not in (np.dtype("float16"), jnp.dtype("bfloat16"), np.dtype("float32"), np.dtype("float64")):
        raise TypeError(f"{name} got dtype {array.dtype}; pass float32, bfloat16, float16 or (XLA only) float64.")


def check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} got {value!r}; pass a Python integer.")


def coefficient(name: str, value: Any, dtype: Any, *, least: float | None = None, above: float | None = None) -> Any:
    """A Python number as a float, after a check of its range; or a scalar array of `dtype`, which is not checked."""
    if isinstance(value, int | float | np.number):
        if not np.isfinite(value) or (least is not None and value < least) or (above is not None and value <= above):
            bounds = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""
            raise ValueError(f"{name} got {value!r}; pass a finite number{bounds}.")
        return float(value)
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} got dtype {array.dtype}; pass a real number.")
    check_shape(name, array, (), "one number")
    return array.astype(dtype)
