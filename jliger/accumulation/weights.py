"""What a weighted sum is divided by."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def divisor(weight: Float[Array, ""]) -> Float[Array, ""]:
    """The weight, and 1 for 0: the mean of nothing is 0, as its sum is."""
    return jnp.where(weight == 0, 1, weight)
