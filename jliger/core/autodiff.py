"""What `jax.custom_vjp` with `symbolic_zeros=True` hands to its rules, and what may stand in residuals.

`CustomVJPPrimal` and `SymbolicZero` are public in `jax.custom_derivatives`; everything that reads them is here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def perturbed_flags(primals: Any) -> list[bool]:
    """Which of a tuple of primals are differentiated; None never is."""
    return [primal is not None and primal.perturbed for primal in primals]


def primal_values(tree: Any) -> Any:
    """The arrays of a tree of primals."""
    primal = jax.custom_derivatives.CustomVJPPrimal
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=lambda leaf: isinstance(leaf, primal))


def is_symbolic_zero(cotangent: Any) -> bool:
    """Whether the result that this cotangent belongs to was not used."""
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def instantiate(cotangent: Any) -> Array:
    """A cotangent as an array."""
    return jnp.zeros(cotangent.shape, cotangent.dtype) if is_symbolic_zero(cotangent) else cotangent


def encode_absent[T: tuple](fields: T) -> T:
    """Residuals with an array of size zero for each field that is None.

    Which gradients are wanted can differ from one trace to the next. A residual tree whose structure differed too would
    give errors, or silently wrong gradients, when `jax.checkpoint` uses a cached trace again.
    """
    return type(fields)(*(jnp.zeros((0,)) if field is None else field for field in fields))


def decode_absent[T: tuple](fields: T) -> T:
    """The inverse of `encode_absent`."""
    return type(fields)(*(field if field.size else None for field in fields))
