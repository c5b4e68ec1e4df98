"""For tests in a process that forbids implicit promotion of dtypes and ranks. Not part of the wheel."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def with_promotion[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function, with implicit promotion allowed: for references, and for code of other libraries that needs it."""

    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped


def promoting(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with implicit promotion allowed in it: optax multiplies integers and float numbers."""
    optimizer = optax.with_extra_args_support(optimizer)
    return optax.GradientTransformationExtraArgs(with_promotion(optimizer.init), with_promotion(optimizer.update))
