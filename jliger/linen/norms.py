"""Norms for Flax Linen: drop-in replacements for Flax's own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array, Float

from jliger.ops.norms.api import normalize_as


class RMSNorm(nn.RMSNorm):
    """`flax.linen.RMSNorm`, computed by the same function as `jliger.rms_norm`.

    Attributes, parameters and promotion of dtypes are those of `flax.linen.RMSNorm`, so that a checkpoint of one loads
    into the other. The backward pass gets the input and one number per row. With a mask, an `axis_name`,
    `force_float32_reductions=False`, or axes other than the last one, it is Flax's own function that runs.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> norm, x = jliger.linen.RMSNorm(), jnp.ones((2, 5, 8))
      >>> print(norm.apply(norm.init(jax.random.key(0), x), x).shape)
      (2, 5, 8)
    """

    def __call__(self, x: Float[Array, "*B H"], *, mask: jax.Array | None = None) -> Float[Array, "*B H"]:
        return self.normalized(x) if _is_of_rows(self, mask) else super().__call__(x, mask=mask)

    @nn.compact
    def normalized(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        """The norm of each row."""
        return _norm(self, x, use_bias=False, centered=False)


class LayerNorm(nn.LayerNorm):
    """`flax.linen.LayerNorm`, computed by the same function as `jliger.layer_norm`.

    Attributes, parameters and promotion of dtypes are those of `flax.linen.LayerNorm`, so that a checkpoint of one
    loads into the other. The backward pass gets the input and two numbers per row. The variance is always the accurate
    one, as with `use_fast_variance=False`. With a mask, an `axis_name`, `force_float32_reductions=False`, or axes other
    than the last one, it is Flax's own function that runs.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> norm, x = jliger.linen.LayerNorm(), jnp.ones((2, 5, 8))
      >>> print(norm.apply(norm.init(jax.random.key(0), x), x).shape)
      (2, 5, 8)
    """

    def __call__(self, x: Float[Array, "*B H"], *, mask: jax.Array | None = None) -> Float[Array, "*B H"]:
        return self.normalized(x) if _is_of_rows(self, mask) else super().__call__(x, mask=mask)

    @nn.compact
    def normalized(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        """The norm of each row."""
        return _norm(self, x, use_bias=self.use_bias, centered=True)


def _is_of_rows(module: Any, mask: Any) -> bool:
    is_last = module.reduction_axes == module.feature_axes == -1
    return mask is None and module.axis_name is None and is_last and module.force_float32_reductions


def _norm(module: Any, x: Array, *, use_bias: bool, centered: bool) -> Array:
    x = jnp.asarray(x)
    shape = x.shape[-1:]
    scale = module.param("scale", module.scale_init, shape, module.param_dtype) if module.use_scale else None
    bias = module.param("bias", module.bias_init, shape, module.param_dtype) if use_bias else None
    dtype = canonicalize_dtype(x, scale, bias, dtype=module.dtype)
    return normalize_as(dtype, x, scale, bias, epsilon=module.epsilon, centered=centered)
