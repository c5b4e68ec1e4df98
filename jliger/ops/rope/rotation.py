"""The rotation as a differentiable function. Its gradient is the rotation back, so that it saves angles only."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core import partitioned
from jliger.core.backend import Choice, Implementation, run_by_platform
from jliger.core.meshes import sum_to_type
from jliger.core.partitioned import Operation
from jliger.core.second_derivatives import once_differentiable


class Rotation(NamedTuple):
    """The options of a rotation.

    Attributes:
      interleaved: whether pairs are neighbours, or `R / 2` features apart.
      scale: multiplies the rotated features.
      implementation: the backend.
      compute_capability: the GPU to compile for, or None for the one present.
      sign: 1, or −1 for the rotation back.
    """

    interleaved: bool
    scale: float
    implementation: Choice
    compute_capability: int | None
    sign: int = 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rotate(
    rotation: Rotation, x: Float[Array, "*B heads head_dim"], angles: Float[Array, "*B R/2"]
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
    cos, sin = rotation.scale * jnp.cos(angles), rotation.sign * rotation.scale * jnp.sin(angles)
    in_xla = functools.partial(_rotate_in_xla, rotation.interleaved)
    if rotation.implementation == "xla":
        return in_xla(x, cos, sin)
    operation = Operation(_rotate_tokens, rotation, ("tnd", "tp", "tp"), ("tnd",), (x.dtype,), whole="dp")
    run = functools.partial(partitioned.run, operation)
    (result,) = once_differentiable(lambda *args: (in_xla(*args),), run, rotation.implementation)(x, cos, sin)
    return result


def _rotate_tokens(rotation: Rotation, dtypes: Any, x: Array, cos: Array, sin: Array) -> tuple[Array]:
    """Runs one device's part, with tokens as one dimension."""
    del dtypes

    def run(implementation: Implementation, x: Array, cos: Array, sin: Array) -> Array:
        if implementation == "xla":
            return _rotate_in_xla(rotation.interleaved, x, cos, sin)
        # Triton is imported only here, when it is chosen, so that it stays optional.
        from jliger.ops.rope import triton

        capability = rotation.compute_capability
        return triton.rotate(x, cos, sin, interleaved=rotation.interleaved, compute_capability=capability)

    # A grid without programs cannot be launched.
    choice = rotation.implementation if x.size else "xla"
    flat = (x.reshape(-1, *x.shape[-2:]), *(table.reshape(-1, table.shape[-1]) for table in (cos, sin)))
    return (run_by_platform(run, choice, *flat).reshape(x.shape),)


def _rotate_in_xla(interleaved: bool, x: Array, cos: Array, sin: Array) -> Array:
    pairs = cos.shape[-1]
    rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    shape, axis = ((pairs, 2), -1) if interleaved else ((2, pairs), -2)
    wide = rotated.astype(cos.dtype).reshape(*x.shape[:-1], *shape)
    # (−sin, sin) times the swapped pair. A reversal is cheaper in XLA than two halves and their concatenation.
    signs = jnp.expand_dims(jnp.asarray([-1, 1], cos.dtype), 1 if axis == -2 else 0)
    signs = jnp.expand_dims(signs, tuple(range(x.ndim - 1)))
    cos, sin = (jnp.expand_dims(table, (x.ndim - 2, axis)) for table in (cos, sin))
    result = wide * cos + jax.lax.rev(wide, [wide.ndim + axis]) * (sin * signs)
    result = result.astype(x.dtype).reshape(rotated.shape)
    return jnp.concatenate([result, rest], axis=-1) if rest.size else result
