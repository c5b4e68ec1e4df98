"""Dtypes of accumulators and of promoted operands."""

import jax
import jax.numpy as jnp
import numpy as np


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype for sums of numbers of `dtype`: float32, or float64 for float64."""
    # Not jnp.promote_types, which raises under jax_numpy_dtype_promotion="strict".
    return np.promote_types(dtype, np.float32)


def promoted_dtype(*operands: jax.typing.ArrayLike | jax.typing.DTypeLike) -> np.dtype:
    """The dtype that flax's layers cast operands to: what JAX promotes them to.

    Even under jax_numpy_dtype_promotion="strict", where flax's own call raises: a head's dtypes are the user's choice.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*operands)
