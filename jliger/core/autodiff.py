"""Reads the arguments of `jax.custom_vjp` rules with `symbolic_zeros=True`, and encodes residuals.

`CustomVJPPrimal` and `SymbolicZero` are public in `jax.custom_derivatives` (jax 0.12). All code that reads them is
here.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def perturbed_flags(primals: Any) -> list[bool]:
    """Which primals of a tuple are differentiated; False for None."""
    return [primal is not None and primal.perturbed for primal in primals]


def primal_values(tree: Any) -> Any:
    """The arrays in a tree of primals."""
    primal = jax.custom_derivatives.CustomVJPPrimal
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=lambda leaf: isinstance(leaf, primal))


def is_symbolic_zero(cotangent: Any) -> bool:
    """Whether the cotangent is a symbolic zero: its result was not used."""
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def instantiate(cotangent: Any) -> Array:
    """The cotangent as an array; zeros for a symbolic zero."""
    return jnp.zeros(cotangent.shape, cotangent.dtype) if is_symbolic_zero(cotangent) else cotangent


def encode_absent[T: tuple](fields: T) -> T:
    """Replaces each None among the residuals by an array of size zero, so that their tree structure is always the same.

    Which gradients are wanted can differ between traces. If the structure of the residuals differed as well,
    `jax.checkpoint`, which reuses cached traces, would raise errors or give wrong gradients silently.
    """
    return _of_type(fields, (jnp.zeros((0,)) if field is None else field for field in fields))


def decode_absent[T: tuple](fields: T) -> T:
    """The inverse of `encode_absent`."""
    return _of_type(fields, (field if field.size else None for field in fields))


def _of_type[T: tuple](fields: T, values: Iterable[Any]) -> T:
    return type(fields)(*values) if hasattr(fields, "_fields") else type(fields)(values)
