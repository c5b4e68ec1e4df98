"""Splits the vocabulary into blocks of columns."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head.chunks.arrays import materialize, pad, write_block
from jliger.ops.linear_head.chunks.packed_tokens import Chunk
from jliger.ops.linear_head.types import Head, HeadConfig
from jliger.ops.logits import Block


class Span(NamedTuple):
    """The columns of one block. The start may be traced; the width is static."""

    start: Int[Array, ""] | int
    width: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A head in blocks of columns of equal width, except that the last block may be narrower.

    Attributes:
      config: the layout of the kernel.
      head: the head; already cast to the products' dtype and padded if it is one block, with all columns.
      dtype: the dtype of the products' operands.
      alignment: the dimensions of products are padded to multiples of this.
      vocab: number of columns that exist. At run time there may be fewer: `head.num_columns`.
      width: columns per block: all, with their padding, or a multiple of 128.
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
        """Splits a head into blocks of `width` columns; a width of None means one block with all columns."""
        size = head.kernel.shape[config.vocab_dim]
        vocab = config.most_columns(size)
        if width is None or width >= size:
            # Casts and pads once, outside the loop. Several blocks are cast one at a time instead (`block`), so that
            # the whole kernel is never held in a second dtype.
            whole = _prepared(head, dtype, alignment)
            return cls(config, whole, dtype, alignment, vocab, whole.kernel.shape[config.vocab_dim])
        # XLA may pass kernels a pointer into the whole bias or class weights, instead of a copy of the block. Triton
        # kernels are compiled for pointers aligned to 16 bytes; 128 float32 columns are 512 bytes.
        assert width % 128 == 0
        return cls(config, head, dtype, alignment, vocab, width)

    @property
    def num_blocks(self) -> int:
        return -(-self.vocab // self.width)

    @property
    def full_span(self) -> Span:
        return Span(0, self.vocab)

    def sweep(self, step: Callable[[Span, Any], Any], carry: Any) -> Any:
        """`carry = step(span, carry)` for all blocks, from the last to the first.

        The last block runs before the loop: it may be narrower, and its results initialise sums, so that no zeros are
        needed. Its `carry` may therefore have None where later ones have arrays.
        """
        last = (self.num_blocks - 1) * self.width
        carry = step(Span(last, self.vocab - last), carry)
        if self.num_blocks == 1:
            return carry

        def whole_step(done: Int[Array, ""], carry: Any) -> Any:
            return step(Span(last - done * self.width, self.width), carry)

        first = 1
        if self.head.num_columns is not None:
            # Skips blocks of which no column exists.
            first = jnp.maximum(self.num_blocks - (self.head.num_columns + self.width - 1) // self.width, 1)
        return jax.lax.fori_loop(first, self.num_blocks, whole_step, carry)

    def block(self, span: Span, chunk: Chunk) -> tuple[Head, Block]:
        """The head's columns in `span`, and the `Block` for the row functions, with labels relative to the span."""
        head, width = self.head, self.head.num_columns
        if width is not None:
            width = jnp.clip(width - span.start, 0, span.width)
        if self.width < head.kernel.shape[self.config.vocab_dim]:

            def part(array: Array | None, dim: int) -> Any:
                return None if array is None else jax.lax.dynamic_slice_in_dim(array, *span, axis=dim)

            kernel = part(head.kernel, self.config.vocab_dim)
            parts = Head(kernel, part(head.bias, 0), part(head.class_weights, 0), part(head.adapter, 1))
            head = _prepared(parts, self.dtype, self.alignment)
        return head, Block(head.bias, head.class_weights, chunk.labels - span.start, chunk.inverse_temperature, width)

    def write(self, full: Array, part: Array, span: Span, vocab_dim: int, *, add: bool) -> Array:
        """`full` with a block's `part` written or added at `span`, without the part's padding."""
        sizes = [span.width if dim == vocab_dim else size for dim, size in enumerate(full.shape)]
        offsets = tuple(span.start if dim == vocab_dim else 0 for dim in range(full.ndim))
        return write_block(full, part[tuple(map(slice, sizes))], offsets, add=add)


def _prepared(head: Head, dtype: jax.typing.DTypeLike, alignment: int) -> Head:
    """The head padded and cast: matrices to the products' dtype, vectors to the row functions' accumulator dtype."""

    def vector(array: Array | None) -> Array | None:
        return None if array is None else pad(array.astype(accumulator_dtype(dtype)), (0,), alignment)

    def matrix(array: Array) -> Array:
        return materialize(pad(array.astype(dtype), (0, 1), alignment))

    adapter = None if head.adapter is None else matrix(head.adapter)
    return Head(matrix(head.kernel), vector(head.bias), vector(head.class_weights), adapter, head.num_columns)
