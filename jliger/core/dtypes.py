"""Which dtype sums are kept in."""

import jax
import numpy as np


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """What sums are kept in: float32, or float64 for float64."""
    # That of JAX raises under jax_numpy_dtype_promotion="strict".
    return np.promote_types(dtype, np.float32)
