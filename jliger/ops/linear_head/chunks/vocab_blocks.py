"""The vocabulary in blocks of columns."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int

from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head.chunks.arrays import materialize, pad, write_block
from jliger.ops.linear_head.chunks.packed_tokens import Chunk
from jliger.ops.linear_head.types import Head, HeadConfig
from jliger.ops.logits import Block


class Span(NamedTuple):
    """Which columns are one block's; how many is known when the operation is traced."""

    start: Int[Array, ""] | int
    width: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A head's columns in blocks of one width, in the products' dtype; what is left is the last block, a narrower one.

    Attributes:
      head: as given; in the products' dtype and padded, if one block is all.
      dtype: the products'.
      alignment: what sides of products are padded to.
      vocab: columns in all.
      width: columns a block; of several blocks a multiple of 128.
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
        # So a block of a vector starts on a multiple of 512 bytes, of which kernels count on 16: XLA may give them a
        # pointer into the whole vector, rather than to a copy.
        assert width % 128 == 0
        return cls(config, head, dtype, alignment, vocab, width)

    @property
    def num_blocks(self) -> int:
        return -(-self.vocab // self.width)

    @property
    def full_span(self) -> Span:
        return Span(0, self.vocab)

    def sweep(self, step: Callable[[Span, Any], Any], carry: Any) -> Any:
        """`carry = step(span, carry)` from the last block to the first.

        The last one stands outside the loop: it may be narrower, and sums can start with it.
        """
        last = (self.num_blocks - 1) * self.width
        carry = step(Span(last, self.vocab - last), carry)
        if self.num_blocks == 1:
            return carry

        def whole_step(done: Int[Array, ""], carry: Any) -> Any:
            return step(Span(last - done * self.width, self.width), carry)

        return jax.lax.fori_loop(1, self.num_blocks, whole_step, carry)

    def block(self, span: Span, chunk: Chunk) -> tuple[Head, Block]:
        """A block of the head, and what row functions want of it and of a chunk's tokens."""
        head = self.head
        if self.num_blocks > 1:

            def part(array: Array | None, dim: int) -> Any:
                return None if array is None else jax.lax.dynamic_slice_in_dim(array, *span, axis=dim)

            kernel = part(head.kernel, self.config.vocab_dim)
            parts = Head(kernel, part(head.bias, 0), part(head.class_weights, 0), part(head.adapter, 1))
            head = _prepared(parts, self.dtype, self.alignment)
        return head, Block(head.bias, head.class_weights, chunk.labels - span.start, chunk.inverse_temperature)

    def write(self, full: Array, part: Array, span: Span, vocab_dim: int, *, add: bool) -> Array:
        """`full` with a block's part of it, without its padding, written or added."""
        sizes = [span.width if dim == vocab_dim else size for dim, size in enumerate(full.shape)]
        offsets = tuple(span.start if dim == vocab_dim else 0 for dim in range(full.ndim))
        return write_block(full, part[tuple(map(slice, sizes))], offsets, add=add)


def _prepared(head: Head, dtype: jax.typing.DTypeLike, alignment: int) -> Head:
    """As products and row functions take them."""

    def vector(array: Array | None) -> Array | None:
        return None if array is None else pad(array.astype(accumulator_dtype(dtype)), (0,), alignment)

    def matrix(array: Array) -> Array:
        return materialize(pad(array.astype(dtype), (0, 1), alignment))

    adapter = None if head.adapter is None else matrix(head.adapter)
    return Head(matrix(head.kernel), vector(head.bias), vector(head.class_weights), adapter)
