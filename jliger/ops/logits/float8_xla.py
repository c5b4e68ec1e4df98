"""8-bit operands in plain JAX, on any device: products are those of the same numbers in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.ops.logits import xla
from jliger.ops.logits.float8 import E4M3, E5M2
from jliger.ops.logits.types import Block, Coefficients, LogitMap


def product(left: Float[Array, "M K"], right: Float[Array, "N K"], dtype: jax.typing.DTypeLike) -> Float[Array, "M N"]:
    wide = left.astype(jnp.float32), right.astype(jnp.float32)
    return jax.lax.dot_general(*wide, (((1,), (1,)), ((), ())), precision="highest").astype(dtype)


def both_layouts(
    matrix: Float[Array, "M N"], factor: Float[Array, ""]
) -> tuple[Float[Array, "M N"], Float[Array, "N M"]]:
    limit = float(jnp.finfo(E4M3).max)
    wide = matrix.astype(jnp.float32)
    values = jnp.where(jnp.isinf(wide), jnp.nan, jnp.clip(wide * factor, -limit, limit)).astype(E4M3)
    return values, values.T


def row_grads(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
) -> tuple[Float[Array, "T V"], Float[Array, "V T"]]:
    grads = xla.row_grads(product, block, logit_map, row_max, log_sum, coefficients, dtype=jnp.float32).astype(E5M2)
    return grads, grads.T
