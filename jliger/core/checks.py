"""Errors at trace time: each names the argument, what it got, and what to do."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jliger.core.backend import can_run_triton, has_triton
from jliger.ops.linear_head.types import KernelLayout

_LAYOUTS = {"hv": "[H, V]", "vh": "[V, H]"}


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} got {value!r}; pass one of {', '.join(map(repr, choices))}.")


def is_array(value: Any) -> bool:
    """Whether `jnp.asarray` takes it as one array: a box, a module or a list of arrays is none."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "OSU"
    if isinstance(value, jax.Array | np.generic | int | float | complex):
        return True
    return hasattr(type(value), "__jax_array__") or hasattr(type(value), "__array__")


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as a JAX array."""
    if is_array(value):
        return jnp.asarray(value)
    if value is None:
        raise TypeError(f"{name} got None; pass an array.")
    if isinstance(value, list | tuple | np.ndarray):
        instead = "pass one array of numbers, such as jnp.asarray or jnp.stack makes."
    elif isinstance(value, Mapping):
        instead = "pass one of its arrays; the functions of jliger.linen take a layer's variables."
    elif hasattr(value, "unbox"):
        instead = "pass the array in this box: flax.linen.meta.unbox takes all boxes off."
    else:
        instead = (
            "pass an array. Of a Flax layer pass the kernel (an Embed's embedding with kernel_layout='vh'); the "
            "functions of jliger.nnx and jliger.linen take the layer itself."
        )
    raise TypeError(f"{name} got a {type(value).__name__}; {instead}")


def check_number(
    name: str, value: Any, *, least: float | None = None, most: float | None = None, instead: str = ""
) -> None:
    """A finite Python number in `[least, most]`: it becomes part of the compiled program.

    `instead` is what else to do with a traced number.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} got a traced value; pass a Python number, since it becomes part of the compiled kernel (jax.jit "
            f"keeps one as it is with static_argnames){instead}."
        )
    if not isinstance(value, int | float | np.number):
        raise TypeError(
            f"{name} got {type(value).__name__}; pass a Python number, since it becomes part of the compiled kernel."
        )
    if not np.isfinite(value) or (least is not None and value < least) or (most is not None and value > most):
        bounds = f"in [{least}, {most}]" if most is not None else f"of at least {least}" if least is not None else ""
        raise ValueError(f"{name} got {value!r}; pass a finite number {bounds}".rstrip() + ".")


def check_logit_options(
    *,
    kernel_layout: str,
    logit_scale: Any,
    logit_softcap: Any,
    ignore_index: Any,
    chunk_size: Any,
    implementation: Any,
    whose: str = "",
) -> None:
    """What `HeadConfig` is made of; `whose` is what the names of the head's own arguments begin with."""
    check_choice(f"{whose}kernel_layout", kernel_layout, tuple(_LAYOUTS))
    check_number(f"{whose}logit_scale", logit_scale, instead=f", or multiply {whose}hidden and {whose}bias by it")
    if logit_softcap is not None:
        check_number(f"{whose}logit_softcap", logit_softcap)
        if logit_softcap <= 0:
            raise ValueError(f"{whose}logit_softcap got {logit_softcap!r}; pass a number above 0, or None for no cap.")
    check_integer("ignore_index", ignore_index)
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size)
        if chunk_size < 1:
            raise ValueError(
                f"chunk_size got {chunk_size}; pass a number of tokens of at least 1, or None for the rule."
            )
    check_choice("implementation", implementation, ("triton", "xla", None))
    if implementation == "triton" and not has_triton():
        raise ValueError(
            "implementation got 'triton', but triton and jax-triton are not installed; install them, or pass 'xla'."
        )
    if implementation == "triton" and not can_run_triton():
        raise ValueError(
            f"implementation got 'triton', but JAX has no GPU here (its default backend is {jax.default_backend()}); "
            "pass 'xla' or None. To compile for a GPU of another machine, use jliger.compute_capability."
        )


def check_axes(name: str, value: Any) -> tuple[str, ...]:
    """Names of manual mesh axes, as a tuple."""
    axes = (value,) if isinstance(value, str) or not isinstance(value, list | tuple | None) else tuple(value or ())
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for axis in axes:
        if axis not in manual:
            raise ValueError(
                f"{name} got {axis!r}, which is no manual mesh axis here (there are {tuple(manual)}); it is for use "
                "inside jax.shard_map. Outside of it shard the kernel, and leave it out."
            )
    return axes


def check_operands(
    hidden: Any,
    kernel: Any,
    labels: Any,
    bias: Any,
    *,
    kernel_layout: KernelLayout,
    implementation: str,
    whose: str = "",
) -> None:
    """The arrays that make logits, and the labels; `whose` is what the names of all but the labels begin with."""
    _check_floating(f"{whose}hidden", hidden)
    _check_floating(f"{whose}kernel", kernel)
    if hidden.ndim < 1:
        raise ValueError(f"{whose}hidden got a scalar; pass an array [*B, H].")
    if kernel.ndim != 2:
        raise ValueError(
            f"{whose}kernel got shape {kernel.shape}; pass {_LAYOUTS[kernel_layout]}, as "
            f"{whose}kernel_layout={kernel_layout!r} says."
        )
    vocab_dim = 1 if kernel_layout == "hv" else 0
    if kernel.shape[1 - vocab_dim] != hidden.shape[-1]:
        other = "vh" if kernel_layout == "hv" else "hv"
        hint = (
            f" If the kernel is {_LAYOUTS[other]}, pass {whose}kernel_layout={other!r}; if {whose}hidden is logits, "
            "pass the hidden states that they are made of."
            if kernel.shape[vocab_dim] == hidden.shape[-1]
            else ""
        )
        raise ValueError(
            f"{whose}kernel got shape {kernel.shape}, which as {_LAYOUTS[kernel_layout]} does not fit {whose}hidden of "
            f"shape {hidden.shape}; H must agree.{hint}"
        )
    if kernel.shape[vocab_dim] == 0:
        raise ValueError(f"{whose}kernel got shape {kernel.shape}; the vocabulary needs at least one column.")
    if export.is_symbolic_dim(kernel.shape[vocab_dim]) or (
        implementation == "triton" and export.is_symbolic_dim(hidden.shape[-1])
    ):
        raise ValueError(
            f"{whose}kernel got the symbolic shape {kernel.shape}; export with numbers there. Only the number of "
            "tokens may be symbolic."
        )
    if kernel.dtype not in (hidden.dtype, np.dtype("float32")):
        raise TypeError(
            f"{whose}kernel got dtype {kernel.dtype} with {whose}hidden of {hidden.dtype}; pass a kernel of hidden's "
            "dtype or of float32 (products are taken in hidden's dtype)."
        )
    if hidden.dtype == np.dtype("float64") and implementation == "triton":
        raise TypeError(
            f"{whose}hidden got dtype float64, which the Triton kernels do not take; pass implementation='xla'."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels got dtype {labels.dtype}; pass integers.")
    check_shape("labels", labels, hidden.shape[:-1], "hidden's leading dimensions")
    if bias is not None:
        check_vocab_vector(f"{whose}bias", bias, kernel, vocab_dim)


def check_adapter(adapter: Any, hidden: Any, kernel: Any, vocab_dim: int, whose: str = "") -> None:
    """A `LinearAdapter` that fits the head; `whose` is as in `check_operands`."""
    for name, side, dim, size, what in (
        ("a", adapter.a, 0, hidden.shape[-1], "[H, R]"),
        ("b", adapter.b, 1, kernel.shape[vocab_dim], "[R, V]"),
    ):
        _check_floating(f"{whose}adapter.{name}", side)
        if side.dtype not in (hidden.dtype, np.dtype("float32")):
            raise TypeError(
                f"{whose}adapter.{name} got dtype {side.dtype} with {whose}hidden of {hidden.dtype}; pass hidden's "
                "dtype or float32."
            )
        if side.ndim != 2 or side.shape[dim] != size:
            raise ValueError(
                f"{whose}adapter.{name} got shape {side.shape}; pass {what} for {whose}hidden of shape {hidden.shape} "
                f"and a vocabulary of {kernel.shape[vocab_dim]} (whatever {whose}kernel_layout says)."
            )
    if adapter.a.shape[1] != adapter.b.shape[0] or adapter.a.shape[1] == 0:
        raise ValueError(
            f"{whose}adapter got a of shape {adapter.a.shape} and b of shape {adapter.b.shape}; pass [H, R] and [R, V] "
            "of one rank R of at least 1."
        )
    if jnp.ndim(adapter.scale) != 0:
        raise ValueError(f"{whose}adapter.scale got shape {jnp.shape(adapter.scale)}; pass a scalar.")


def check_shape(name: str, array: Any, shape: tuple[int, ...], what: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} got shape {array.shape}; pass {what}, {shape}.")


def check_vocab_vector(name: str, array: Any, kernel: Any, vocab_dim: int) -> None:
    _check_floating(name, array)
    check_shape(name, array, (kernel.shape[vocab_dim],), "one value a column of the vocabulary")


def check_where(where: Any, labels: Any) -> None:
    if where.dtype != np.dtype("bool"):
        raise TypeError(f"where got dtype {where.dtype}; pass bools (`where != 0`), or numbers as `weights`.")
    check_shape("where", where, labels.shape, "one bool a token")


def check_weights(weights: Any, labels: Any) -> None:
    if not (jnp.issubdtype(weights.dtype, jnp.floating) or jnp.issubdtype(weights.dtype, jnp.integer)):
        raise TypeError(f"weights got dtype {weights.dtype}; pass real numbers, or bools as `where`.")
    check_shape("weights", weights, labels.shape, "one weight a token")


def as_logits_dtype(dtype: Any, hidden: Any, implementation: str) -> np.dtype:
    try:
        dtype = jnp.dtype(hidden.dtype if dtype is None else dtype)
    except TypeError as error:
        raise TypeError(
            f"logits_dtype got {dtype!r}; pass a floating-point dtype, such as jnp.bfloat16 or 'bfloat16', or None for "
            "hidden's."
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"logits_dtype got {dtype}; pass a floating-point dtype, or None for hidden's.")
    if implementation == "triton" and dtype not in (np.dtype("float32"), np.dtype("float16"), jnp.dtype("bfloat16")):
        raise TypeError(f"logits_dtype got {dtype}; the Triton kernels take float32, bfloat16 and float16.")
    return dtype


def check_precision(precision: Any) -> None:
    """Whatever `jax.lax.dot_general` takes; as part of the compiled program it has to be hashable, too."""
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


def _check_floating(name: str, array: Any) -> None:
    if array.dtype not in (np.dtype("float16"), jnp.dtype("bfloat16"), np.dtype("float32"), np.dtype("float64")):
        raise TypeError(f"{name} got dtype {array.dtype}; pass float32, bfloat16, float16 or (XLA only) float64.")


def check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} got {value!r}; pass a Python integer.")
