"""The three matrix products of a linear head, for both kernel layouts, without transposed copies."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.ops.linear_head.types import HeadConfig


def logits_product(
    config: HeadConfig,
    hidden: Float[Array, "T H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    adapted: Float[Array, "T R"] | None = None,
    adapter: Float[Array, "R V"] | None = None,
) -> Float[Array, "T V"]:
    """`hidden · kernel + adapted · adapter`, rounded to `config.logits_dtype`."""
    product = _dot(config, hidden, kernel, 1, 1 - config.vocab_dim, config.logits_dtype)
    return product if adapter is None else product + _dot(config, adapted, adapter, 1, 0, config.logits_dtype)


def hidden_grad_product(
    config: HeadConfig,
    logit_grads: Float[Array, "T V"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "T H"]:
    """`logit_grads · kernelᵀ`."""
    return _dot(config, logit_grads, kernel, 1, config.vocab_dim, dtype)


def kernel_grad_product(
    config: HeadConfig,
    hidden: Float[Array, "T H"],
    logit_grads: Float[Array, "T V"],
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "H V"] | Float[Array, "V H"]:
    """`hiddenᵀ · logit_grads`, in the kernel's layout."""
    left, right = (hidden, logit_grads) if config.kernel_layout == "hv" else (logit_grads, hidden)
    return _dot(config, left, right, 0, 0, dtype)


def _dot(
    config: HeadConfig, left: Any, right: Any, left_dim: int, right_dim: int, dtype: jax.typing.DTypeLike
) -> Array:
    # cuBLAS has no product from one 16-bit type to the other: compute in float32, then cast.
    kinds = {left.dtype, jnp.dtype(dtype)}
    through_float32 = len(kinds) == 2 and all(kind.itemsize == 2 for kind in kinds)
    return jax.lax.dot_general(
        left,
        right,
        (((left_dim,), (right_dim,)), ((), ())),
        precision=config.precision,
        preferred_element_type=jnp.float32 if through_float32 else dtype,
    ).astype(dtype)
