"""The vocabulary in blocks of columns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jliger.chunks.arrays import pad, whole, write_block
from jliger.chunks.types import Head, Kernel, accumulator_dtype
from jliger.config import HeadConfig
from jliger.rows import Block, LogitMap


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A head's columns in blocks of one width, in the products' dtype.

    The last block starts early enough to fit, and leaves out the columns that it shares with the one before. Blocks are
    taken from the last to the first, so that a whole one overwrites what the last one left out.

    Attributes:
      head: as given; in the products' dtype and padded, if one block is all.
      dtype: the products'.
      alignment: what sides of products are padded to.
      vocab: columns in all.
      width: columns a block.
    """

    config: HeadConfig
    head: Head
    dtype: jax.typing.DTypeLike
    alignment: int
    vocab: int
    width: int

    @classmethod
    def make(
        cls, config: HeadConfig, head: Head, dtype: jax.typing.DTypeLike, alignment: int, width: int | None = None
    ) -> "Blocks":
        """Blocks of `width` columns; None for one of all."""
        vocab = head.kernel.shape[config.vocab_dim]
        if width is None or width == vocab:
            return cls(config, _prepared(head, dtype, alignment), dtype, alignment, vocab, vocab)
        return cls(config, head, dtype, alignment, vocab, width)

    @property
    def num_blocks(self) -> int:
        return -(-self.vocab // self.width)

    @property
    def logit_map(self) -> LogitMap:
        return self.config.logit_map(self.width)

    def sweep(self, step: Callable[[Any, Any], Any], carry: Any) -> Any:
        """`carry = step(index, carry)` from the last block to the first."""
        carry = step(self.num_blocks - 1, carry)
        if self.num_blocks == 1:
            return carry
        return jax.lax.fori_loop(1, self.num_blocks, lambda done, carry: step(self.num_blocks - 1 - done, carry), carry)

    def block(
        self, index: Int[Array, ""] | int, labels: Int[Array, " C"]
    ) -> tuple[Kernel, Block, Int[Array, ""] | int]:
        """A block's kernel, its other operands, and the first of its columns."""
        if self.num_blocks == 1:
            return self.head.kernel, Block(self.head.bias, self.head.class_weights, labels), 0
        start = jnp.minimum(index * self.width, self.vocab - self.width)
        first = None if self.vocab % self.width == 0 else (index * self.width - start).astype(jnp.int32)[None]

        def part(array: Array, dim: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, self.width, dim)

        def vector(array: Array | None) -> Array | None:
            if array is None:
                return None
            columns = part(array, 0)
            # As it may start on any four bytes, kernels need a copy; of a mere slice XLA would hand them a pointer.
            return columns if first is None else jnp.where(jnp.arange(self.width) >= first, columns, 0)

        head = Head(
            part(self.head.kernel, self.config.vocab_dim), vector(self.head.bias), vector(self.head.class_weights)
        )
        head = _prepared(head, self.dtype, self.alignment)
        return head.kernel, Block(head.bias, head.class_weights, labels - start, first), start

    def write_kernel(self, full: Kernel, part: Kernel, start: Int[Array, ""] | int, *, add: bool) -> Kernel:
        if self.config.kernel_layout == "hv":
            return write_block(full, part[: full.shape[0], : self.width], (0, start), add=add)
        return write_block(full, part[: self.width, : full.shape[1]], (start, 0), add=add)


def _prepared(head: Head, dtype: jax.typing.DTypeLike, alignment: int) -> Head:
    """As products and row functions take them."""

    def vector(array: Array | None) -> Array | None:
        return None if array is None else pad(array.astype(accumulator_dtype(dtype)), (0,), alignment)

    kernel = whole(pad(head.kernel.astype(dtype), (0, 1), alignment))
    return Head(kernel, vector(head.bias), vector(head.class_weights))
