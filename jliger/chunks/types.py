"""What the chunk loops take and give."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Kernel = Float[Array, "H V"] | Float[Array, "V H"]


class Head(NamedTuple):
    """The vocabulary's side of the operation."""

    kernel: Kernel
    bias: Float[Array, " V"] | None
    class_weights: Float[Array, " V"] | None


class Tokens(NamedTuple):
    """The tokens' side of the operation."""

    hidden: Float[Array, "T H"]
    labels: Int[Array, " T"]
    counted: Bool[Array, " T"]


class GradTypes(NamedTuple):
    """The dtype each gradient is wanted in; None where it is not wanted, and then nothing is computed for it."""

    hidden: np.dtype | None
    kernel: np.dtype | None
    bias: np.dtype | None


class Grads(NamedTuple):
    """Gradients; None where not wanted."""

    hidden: Float[Array, "T H"] | None
    kernel: Kernel | None
    bias: Float[Array, " V"] | None


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """What sums are kept in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
