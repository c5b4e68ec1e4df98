"""Norms for Flax NNX: drop-in replacements for Flax's own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, Float

from jliger.ops.norms.api import normalize_as


class RMSNorm(nnx.RMSNorm):
    """`flax.nnx.RMSNorm`, computed by the same function as `jliger.rms_norm`.

    Arguments, parameters and promotion of dtypes are those of `flax.nnx.RMSNorm`, so that a checkpoint of one loads
    into the other. The backward pass gets the input and one number per row. With a mask, an `axis_name`, or axes other
    than the last one, it is Flax's own function that runs.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> from flax import nnx
      >>> norm = jliger.nnx.RMSNorm(8, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.ones((2, 5, 8))).shape)
      (2, 5, 8)
    """

    def __call__(self, x: Float[Array, "*B H"], mask: jax.Array | None = None) -> Float[Array, "*B H"]:
        if not _is_of_rows(self, mask):
            return super().__call__(x, mask)
        return _norm(self, x, None, centered=False)


class LayerNorm(nnx.LayerNorm):
    """`flax.nnx.LayerNorm`, computed by the same function as `jliger.layer_norm`.

    Arguments, parameters and promotion of dtypes are those of `flax.nnx.LayerNorm`, so that a checkpoint of one loads
    into the other. The backward pass gets the input and two numbers per row. The variance is always the accurate one,
    as with `use_fast_variance=False`. With a mask, an `axis_name`, or axes other than the last one, it is Flax's own
    function that runs.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> from flax import nnx
      >>> norm = jliger.nnx.LayerNorm(8, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.ones((2, 5, 8))).shape)
      (2, 5, 8)
    """

    def __call__(self, x: Float[Array, "*B H"], *, mask: jax.Array | None = None) -> Float[Array, "*B H"]:
        if not _is_of_rows(self, mask):
            return super().__call__(x, mask=mask)
        return _norm(self, x, None if self.bias is None else self.bias[...], centered=True)


def _is_of_rows(module: Any, mask: Any) -> bool:
    return mask is None and module.axis_name is None and module.reduction_axes == module.feature_axes == -1


def _norm(module: Any, x: Array, bias: Array | None, *, centered: bool) -> Array:
    x, scale = jnp.asarray(x), None if module.scale is None else module.scale[...]
    promoted, scale, bias = module.promote_dtype((x, scale, bias), dtype=module.dtype)
    # A cast of x to a wider dtype is exact: it happens inside the norm, which then saves the narrow array.
    is_exact = (
        module.promote_dtype is dtypes.promote_dtype and jnp.promote_types(x.dtype, promoted.dtype) == promoted.dtype
    )
    inputs = x if is_exact else promoted
    return normalize_as(promoted.dtype, inputs, scale, bias, epsilon=module.epsilon, centered=centered)
