"""The dtype of accumulators."""

import jax
import numpy as np


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype for sums of numbers of `dtype`: float32, or float64 for float64."""
    # Not jnp.promote_types, which raises under jax_numpy_dtype_promotion="strict".
    return np.promote_types(dtype, np.float32)
