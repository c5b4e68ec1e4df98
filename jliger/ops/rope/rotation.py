"""The rotation as a differentiable function. Its gradient is the rotation back, so that it saves angles only."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core.meshes import sum_to_type


class Rotation(NamedTuple):
    """The options of a rotation.

    Attributes:
      interleaved: whether pairs are neighbours, or `R / 2` features apart.
      scale: multiplies the rotated features.
      sign: 1, or −1 for the rotation back.
    """

    interleaved: bool
    scale: float
    sign: int = 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rotate(
    rotation: Rotation, x: Float[Array, "*B heads head_dim"], angles: Float[Array, "*B pairs"]
) -> Float[Array, "*B heads head_dim"]:
    """Rotates the first `R` features of each head. The angles have no gradient."""
    return _rotated(rotation, x, angles)


def _rotate_fwd(rotation: Rotation, x: Array, angles: Array) -> tuple[Array, Any]:
    return _rotated(rotation, x, angles), (angles, jnp.zeros_like(x, shape=(0,)))


def _rotate_bwd(rotation: Rotation, residuals: Any, cotangent: Array) -> tuple[Array, Array]:
    angles, like = residuals
    return sum_to_type(_rotated(rotation._replace(sign=-1), cotangent, angles), like), jnp.zeros_like(angles)


rotate.defvjp(_rotate_fwd, _rotate_bwd)


def _rotated(rotation: Rotation, x: Array, angles: Array) -> Array:
    # The two forms are those that XLA compiled to the fastest kernels on an H100 (docs/other_kernels.md).
    cos, sin = (jnp.expand_dims(function(angles), -2) * rotation.scale for function in (jnp.cos, jnp.sin))
    sin, width = rotation.sign * sin, 2 * angles.shape[-1]
    rotated, rest = x[..., :width].astype(cos.dtype), x[..., width:]
    parts = (_neighbours if rotation.interleaved else _halves)(rotated, cos, sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in parts), rest], axis=-1)


def _halves(x: Array, cos: Array, sin: Array) -> list[Array]:
    """The rotation of features that are half the width apart, in two parts."""
    first, second = jnp.split(x, 2, axis=-1)
    return [first * cos - second * sin, second * cos + first * sin]


def _neighbours(x: Array, cos: Array, sin: Array) -> list[Array]:
    """The rotation of neighbouring features, as a whole."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    signs = jnp.expand_dims(jnp.asarray([-1, 1], x.dtype), tuple(range(x.ndim)))
    # A reversal, and not two strided halves.
    rotated = pairs * cos[..., None] + jax.lax.rev(pairs, [x.ndim]) * (sin[..., None] * signs)
    return [rotated.reshape(x.shape)]
