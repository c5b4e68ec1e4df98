"""What `jax.custom_vjp(symbolic_zeros=True)` hands to its rules, and how to read it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def perturbed_flags(inputs: Any) -> list[bool]:
    """Which inputs are being differentiated; an absent bias is not."""
    return [field is not None and field.perturbed for field in inputs]


def primal_values(tree: Any) -> Any:
    primal = jax.custom_derivatives.CustomVJPPrimal
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=lambda leaf: isinstance(leaf, primal))


def is_symbolic_zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def instantiate(cotangent: Any) -> Array:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if is_symbolic_zero(cotangent) else cotangent
