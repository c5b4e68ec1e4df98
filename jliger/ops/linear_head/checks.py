"""Checks of the arguments that every operation on a linear head takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jliger.core.backend import capability_in_use, check_implementation
from jliger.core.checks import check_choice, check_floating, check_integer, check_number, check_shape
from jliger.ops.linear_head.types import HeadConfig, KernelLayout

_TRITON_DTYPES = (np.dtype("float32"), np.dtype("float16"), jnp.dtype("bfloat16"))
_LAYOUTS = {"hv": "[H, V]", "vh": "[V, H]"}


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
    """Checks the options in `HeadConfig`; `whose` is the prefix of the head's own arguments."""
    check_choice(f"{whose}kernel_layout", kernel_layout, tuple(_LAYOUTS))
    check_number(f"{whose}logit_scale", logit_scale, instead=f", or multiply {whose}hidden and {whose}bias by it")
    if logit_softcap is not None:
        check_number(f"{whose}logit_softcap", logit_softcap)
        if logit_softcap <= 0:
            raise ValueError(f"{whose}logit_softcap got {logit_softcap!r}; pass a number above 0, or None for no cap.")
    if ignore_index is not None:
        check_integer("ignore_index", ignore_index)
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size)
        if chunk_size < 1:
            raise ValueError(
                f"chunk_size got {chunk_size}; pass a number of tokens of at least 1, or None for the rule."
            )
    check_implementation(implementation)


def check_operands(
    hidden: Any,
    kernel: Any,
    labels: Any,
    bias: Any,
    *,
    kernel_layout: KernelLayout,
    implementation: str | None,
    whose: str = "",
) -> None:
    """Checks the arrays of the logits, and the labels; `whose` is the prefix of all names but the labels'."""
    check_floating(f"{whose}hidden", hidden)
    check_floating(f"{whose}kernel", kernel)
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
    """Checks that a `LinearAdapter` fits the head; `whose` is as in `check_operands`."""
    for name, side, dim, size, what in (
        ("a", adapter.a, 0, hidden.shape[-1], "[H, R]"),
        ("b", adapter.b, 1, kernel.shape[vocab_dim], "[R, V]"),
    ):
        check_floating(f"{whose}adapter.{name}", side)
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


def check_vocab_vector(name: str, array: Any, kernel: Any, vocab_dim: int) -> None:
    check_floating(name, array)
    check_shape(name, array, (kernel.shape[vocab_dim],), "one value a column of the vocabulary")


def as_logits_dtype(dtype: Any, hidden: Any, implementation: str | None) -> np.dtype:
    try:
        dtype = jnp.dtype(hidden.dtype if dtype is None else dtype)
    except TypeError as error:
        raise TypeError(
            f"logits_dtype got {dtype!r}; pass a floating-point dtype, such as jnp.bfloat16 or 'bfloat16', or None for "
            "hidden's."
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"logits_dtype got {dtype}; pass a floating-point dtype, or None for hidden's.")
    if implementation == "triton" and dtype not in _TRITON_DTYPES:
        raise TypeError(f"logits_dtype got {dtype}; the Triton kernels take float32, bfloat16 and float16.")
    return dtype


def check_products(products: Any, config: HeadConfig, hidden: Any) -> None:
    """Checks the option for 8-bit products against what they support."""
    check_choice("products", products, ("float8", "float8_forward", None))
    if products is None:
        return
    for name, dtype in (("hidden", hidden.dtype), ("logits_dtype", config.logits_dtype)):
        if dtype not in (np.dtype("float32"), jnp.dtype("bfloat16")):
            raise TypeError(f"{name} got dtype {dtype} with products={products!r}; pass bfloat16 or float32.")
    if config.precision != jax.config.jax_default_matmul_precision:
        raise ValueError(
            f"precision got {config.precision!r} with products={products!r}, of 8-bit operands; pass None."
        )
    capability = capability_in_use()
    if config.implementation != "xla" and capability is not None and capability < 89:
        raise ValueError(
            f"products={products!r} needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), and got "
            f"one of {capability / 10}; pass products=None."
        )


def triton_takes(hidden: Any, logits_dtype: np.dtype) -> bool:
    """Whether the Triton kernels support these arguments, if no implementation is named."""
    return (
        hidden.dtype != np.dtype("float64")
        and logits_dtype in _TRITON_DTYPES
        and not export.is_symbolic_dim(hidden.shape[-1])
    )
