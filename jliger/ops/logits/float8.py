"""8-bit operands of matrix products: what a backend implements.

`e4m3` has 3 bits of mantissa and ends at 448; `e5m2` has 2, and 30 octaves of range, which small probabilities need.
Products take operands that both contract over their last dimension, as the matrix units of sm_89 and sm_90 require. So
each operand of two products exists twice, as it is and transposed.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core.backend import Choice
from jliger.ops.logits.types import Block, Coefficients, LogitMap

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2

LARGEST_GRADIENT = 2.0**15
"""What scaled logit gradients should not exceed in the label's column; e5m2 ends at 1.75 times this."""


class _Product(Protocol):
    def __call__(
        self,
        left: Float[Array, "M K"],
        right: Float[Array, "N K"],
        dtype: jax.typing.DTypeLike,
        *,
        fast_sums: bool = False,
    ) -> Float[Array, "M N"]:
        """`left · rightᵀ` of 8-bit operands, summed in float32, in `dtype`.

        With `fast_sums`, where a GPU has them, a term may be lost that is 2¹³ times smaller than the sum so far.
        """
        ...


class _BothLayouts(Protocol):
    def __call__(
        self, matrix: Float[Array, "M N"], factor: Float[Array, ""]
    ) -> tuple[Float[Array, "M N"], Float[Array, "N M"]]:
        """`factor · matrix` in e4m3, clipped to its range, and its transpose; NaN for infinite entries."""
        ...


class _RowGrads(Protocol):
    def __call__(
        self,
        product: Float[Array, "T V"],
        block: Block,
        logit_map: LogitMap,
        row_max: Float[Array, " T"],
        log_sum: Float[Array, " T"],
        coefficients: Coefficients,
    ) -> tuple[Float[Array, "T V"], Float[Array, "V T"]]:
        """The gradients of `Rows.row_grads` in e5m2, dithered, and their transpose."""
        ...


class Float8(NamedTuple):
    """The functions of a backend."""

    product: _Product
    both_layouts: _BothLayouts
    row_grads: _RowGrads


def get_float8(implementation: Choice, compute_capability: int | None) -> Float8:
    """The functions of a backend; Triton is imported only when it is chosen."""
    if implementation == "xla":
        from jliger.ops.logits import float8_xla

        return Float8(float8_xla.product, float8_xla.both_layouts, float8_xla.row_grads)
    from jliger.ops.logits import float8_triton

    for_gpu = functools.partial(functools.partial, compute_capability=compute_capability)
    return Float8(float8_triton.product, for_gpu(float8_triton.both_layouts), for_gpu(float8_triton.row_grads))


class Quantized(NamedTuple):
    """A matrix in 8 bits: `values · scale`."""

    values: Float[Array, "M N"]
    scale: Float[Array, ""]


def quantized(matrix: Float[Array, "M N"]) -> Quantized:
    """A matrix in e4m3."""
    scale = scale_of(matrix)
    return Quantized((matrix.astype(jnp.float32) / scale).astype(E4M3), scale)


def scale_of(array: Array) -> Float[Array, ""]:
    """The power of two that maps the largest magnitude to between 128 and 256, well inside e4m3's range.

    A power of two, so that scaling adds no error: not even to a product that is rounded to bfloat16 before.
    """
    largest = jnp.max(jnp.abs(array)).astype(jnp.float32)
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    return jnp.maximum(jax.lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-100) / 128
