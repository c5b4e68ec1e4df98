"""8-bit operands in plain JAX, on any device: products are those of the same numbers in float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jliger.ops.logits import xla
from jliger.ops.logits.float8 import E4M3, E5M2
from jliger.ops.logits.types import Block, Coefficients, LogitMap


def product(
    left: Float[Array, "M K"], right: Float[Array, "N K"], dtype: jax.typing.DTypeLike, *, fast_sums: bool = False
) -> Float[Array, "M N"]:
    del fast_sums
    wide = left.astype(jnp.float32), right.astype(jnp.float32)
    return jax.lax.dot_general(*wide, (((1,), (1,)), ((), ())), precision="highest").astype(dtype)


def both_layouts(
    matrix: Float[Array, "M N"], factor: Float[Array, ""]
) -> tuple[Float[Array, "M N"], Float[Array, "N M"]]:
    limit = float(jnp.finfo(E4M3).max)
    wide = matrix.astype(jnp.float32)
    values = jnp.where(jnp.isinf(wide), jnp.nan, jnp.clip(wide * factor, -limit, limit)).astype(E4M3)
    return values, values.T


def hashed(index: Int[Array, "..."]) -> UInt[Array, "..."]:
    """32 bits from an index: a finalizer in the manner of MurmurHash3."""
    bits = index.astype(jnp.uint32) * np.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x85EBCA77)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE3D)
    return bits ^ (bits >> 16)


def dithered(values: Float[Array, "T V"]) -> Float[Array, "T V"]:
    """float32 numbers with the mantissa of e5m2, rounded up or down with probabilities that make the mean exact.

    Rounding to the nearest would move all entries of a row alike where probabilities are nearly equal, as early in
    training. What is random follows from row and column. Numbers that e5m2 holds are not changed.
    """
    rows, columns = (hashed(jnp.arange(size)) for size in values.shape)
    below = (rows[:, None] ^ columns[None]) & np.uint32(0x1FFFFF)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) + below
    rounded = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFE00000), jnp.float32)
    return jnp.where(jnp.isnan(values), values, rounded)


def row_grads(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
) -> tuple[Float[Array, "T V"], Float[Array, "V T"]]:
    grads = xla.row_grads(product, block, logit_map, row_max, log_sum, coefficients, dtype=jnp.float32)
    values = dithered(grads).astype(E5M2)
    return values, values.T
