"""Logits with 8-bit products: the kernel in e4m3, and its product with a chunk's hidden states."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.ops.linear_head.chunks.arrays import materialize, pad
from jliger.ops.linear_head.types import HeadConfig, Operands
from jliger.ops.logits.float8 import Float8, get_float8, quantized, scale_of

ALIGNMENT = 16
"""What all dimensions of 8-bit products are multiples of."""

_SAMPLE = 256  # entries of each column of the kernel that its scale is chosen from


@dataclasses.dataclass(frozen=True)
class Float8Kernel:
    """The kernel in e4m3: `[V, H]` for logits, `[H, V]` for gradients of hidden states; both times `scale`.

    `float8` has the functions of the backend.
    """

    float8: Float8
    by_column: Float[Array, "V H"]
    by_row: Float[Array, "H V"]
    scale: Float[Array, ""]

    @classmethod
    def make(cls, config: HeadConfig, operands: Operands) -> "Float8Kernel":
        float8 = get_float8(config.implementation, config.compute_capability)
        # The largest entry of 256 of each column's entries stands for all: to read a whole float32 kernel took 3 % of
        # the time. An entry is clipped if it is 56 times larger, and has fewer digits if it is some 256 times smaller.
        # No column is left out, because some may be much larger than all others, as after few steps from zeros.
        step = max(1, operands.hidden.shape[1] // _SAMPLE)
        # Of `[V, H]`, neighbours: every 16th entry of a row would take as long to read as all.
        sample = operands.kernel[::step] if config.kernel_layout == "hv" else operands.kernel[:, :_SAMPLE]
        num_columns = config.vocab_size if operands.num_columns is None else operands.num_columns
        if num_columns is not None:
            column = jax.lax.broadcasted_iota(jnp.int32, sample.shape, config.vocab_dim)
            sample = jnp.where(column < num_columns, sample, 0)  # padding may hold any numbers
        scale = 32 * scale_of(sample)
        copies = float8.both_layouts(pad(operands.kernel, (0, 1), ALIGNMENT), 1 / scale)
        by_row, by_column = copies if config.kernel_layout == "hv" else copies[::-1]
        return cls(float8, by_column, by_row, scale)

    def logits(self, hidden: Float[Array, "T H"], dtype: jax.typing.DTypeLike) -> Float[Array, "T V"]:
        """`hidden · kernel` in `dtype`, before scale, bias and softcap."""
        values, scale = quantized(hidden)
        product = self.float8.product(materialize(values), self.by_column, dtype, fast_sums=True)
        return product * (scale * self.scale).astype(dtype)
