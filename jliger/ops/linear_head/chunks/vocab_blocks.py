"""The vocabulary in blocks of columns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head.chunks.arrays import pad, whole, write_block
from jliger.ops.linear_head.types import Head, HeadConfig
from jliger.ops.logits import Block, LogitMap


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

    def block(self, index: Int[Array, ""] | int, labels: Int[Array, " C"]) -> tuple[Head, Block, Int[Array, ""] | int]:
        """A block of the head, what row functions want of it, and the first of its columns."""
        if self.num_blocks == 1:
            return self.head, Block(self.head.bias, self.head.class_weights, labels), 0
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
            part(self.head.kernel, self.config.vocab_dim),
            vector(self.head.bias),
            vector(self.head.class_weights),
            None if self.head.adapter is None else part(self.head.adapter, 1),
        )
        head = _prepared(head, self.dtype, self.alignment)
        return head, Block(head.bias, head.class_weights, labels - start, first), start

    def write(self, full: Array, part: Array, start: Int[Array, ""] | int, vocab_dim: int, *, add: bool) -> Array:
        """`full` with a block's part of it, without its padding, written or added."""
        sizes = [self.width if dim == vocab_dim else size for dim, size in enumerate(full.shape)]
        offsets = tuple(start if dim == vocab_dim else 0 for dim in range(full.ndim))
        return write_block(full, part[tuple(map(slice, sizes))], offsets, add=add)


def _prepared(head: Head, dtype: jax.typing.DTypeLike, alignment: int) -> Head:
    """As products and row functions take them."""

    def vector(array: Array | None) -> Array | None:
        return None if array is None else pad(array.astype(accumulator_dtype(dtype)), (0,), alignment)

    def matrix(array: Array) -> Array:
        return whole(pad(array.astype(dtype), (0, 1), alignment))

    adapter = None if head.adapter is None else matrix(head.adapter)
    return Head(matrix(head.kernel), vector(head.bias), vector(head.class_weights), adapter)
