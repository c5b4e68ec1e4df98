"""The loop over chunks that leaves segments out of products, if few enough matter for that to be faster.

The first chunk decides for all: a choice at run time makes the host wait, and one for each chunk would cost more than
it saves. If a later chunk has more segments than there is room for, all is computed again, with whole products.

Segments of columns are multiplied chunk by chunk. Those of tokens are kept, and multiplied once after all chunks: a
kernel whose output is not its operand cannot add to a sum in place, and most segments' columns are in every chunk.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jliger.ops.linear_head.chunks import segments
from jliger.ops.linear_head.chunks.arrays import materialize, pad
from jliger.ops.linear_head.chunks.grad_accumulators import add_chunk
from jliger.ops.linear_head.chunks.packed_tokens import PackedTokens
from jliger.ops.linear_head.chunks.segments import SEGMENT, Counts, Segments
from jliger.ops.linear_head.chunks.skipping import Carry, Evaluated, add_rest, write
from jliger.ops.linear_head.types import GradientDtypes, HeadConfig, Operands

# The share of a chunk's segments that there is room for, and the most bytes for all tokens' segments.
_ROOM, _MOST_BYTES = 1 / 4, 2**30
# The share of the room that the first chunk may take.
_ROOM_OF_FIRST = 7 / 8


class _Kept(NamedTuple):
    """What the loop carries beside `Carry`.

    Attributes:
      of_tokens: the segments of tokens, `[chunks, ...]`; None if the kernel's gradient is not wanted.
      fits: whether there was room for all segments so far.
    """

    of_tokens: Segments | None
    fits: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class SegmentsPass:
    """The arguments of `skipping.skipping_pass`, and how it evaluates a chunk.

    Attributes:
      config, wanted, operands: as there.
      packed: the tokens.
      evaluate: computes a chunk up to its logit gradients.
      initial: the carry before the first chunk.
      vocab: number of columns, with padding.
    """

    config: HeadConfig
    wanted: GradientDtypes
    operands: Operands
    packed: PackedTokens
    evaluate: Callable[[Int[Array, ""] | int], Evaluated]
    initial: Carry
    vocab: int

    def run(self) -> Carry:
        first = self.evaluate(0)
        counts = self._count(first)
        return jax.lax.cond(
            self._fits(counts, _ROOM_OF_FIRST),
            lambda: self._with_segments(first, counts),
            lambda: self.packed.after_first(self._add_whole, self._add(self.initial, first)),
        )

    @property
    def _token_room(self) -> int:
        """The number of tokens' segments that there is room for in each chunk; 0 if none are needed."""
        most = _MOST_BYTES // (self.packed.num_chunks * SEGMENT * self.operands.hidden.dtype.itemsize)
        return min(int(_ROOM * self.packed.chunk * -(-self.vocab // SEGMENT)), most) if self.wanted.kernel is not None else 0

    @property
    def _column_room(self) -> int:
        """The same for columns' segments."""
        return int(_ROOM * self.vocab * -(-self.packed.chunk // SEGMENT)) if self.wanted.hidden is not None else 0

    def _count(self, evaluated: Evaluated) -> Counts:
        return segments.count(_chunk(evaluated), self.config.compute_capability)

    def _fits(self, counts: Counts, share: float) -> Bool[Array, ""]:
        """Whether a chunk's segments fit in a share of the room."""
        fits = jnp.bool(True)
        for of_tiles, room in ((counts.of_tokens, self._token_room), (counts.of_columns, self._column_room)):
            if room:
                fits &= of_tiles.sum() <= int(share * room)
        return fits

    def _add(self, carry: Carry, evaluated: Evaluated) -> Carry:
        """Adds a chunk with whole products."""
        grads = add_chunk(
            self.config, self.wanted, carry.grads, evaluated.chunk, evaluated.columns, evaluated.logit_grads
        )
        return write(carry, evaluated, grads, jnp.zeros_like(evaluated.weights))

    def _add_whole(self, index: Int[Array, ""] | int, carry: Carry) -> Carry:
        return self._add(carry, self.evaluate(index))

    def _with_segments(self, first: Evaluated, counts: Counts) -> Carry:
        kernel = first.columns.kernel
        # A row for each column of the vocabulary.
        by_column = kernel if self.config.kernel_layout == "vh" else materialize(kernel.T)

        def step(index: Int[Array, ""] | int, carries: tuple[Carry, _Kept]) -> tuple[Carry, _Kept]:
            evaluated = self.evaluate(index)
            return self._add_segments(index, *carries, evaluated, self._count(evaluated), by_column)

        kept = _Kept(self._no_segments(), jnp.bool(True))
        carries = self._add_segments(0, self.initial, kept, first, counts, by_column)
        carry, kept = self.packed.after_first(step, carries)
        if not self.packed.has_several_chunks:
            return self._multiplied(carry, kept, kernel)
        return jax.lax.cond(
            kept.fits,
            lambda: self._multiplied(carry, kept, kernel),
            lambda: self.packed.loop(lambda size, *args: self._add_whole(*args), self.initial, (self.packed.chunk,)),
        )

    def _no_segments(self) -> Segments | None:
        if not self._token_room:
            return None
        hidden, num_chunks, room = self.operands.hidden, self.packed.num_chunks, self._token_room
        return Segments(
            jnp.zeros_like(hidden, shape=(num_chunks, room, SEGMENT)),
            jnp.zeros_like(hidden, jnp.int32, shape=(num_chunks, room)),
            jnp.zeros_like(hidden, jnp.int32, shape=(num_chunks, -(-self.vocab // SEGMENT) + 1)),
        )

    def _add_segments(
        self,
        index: Int[Array, ""] | int,
        carry: Carry,
        kept: _Kept,
        evaluated: Evaluated,
        counts: Counts,
        by_column: Array,
    ) -> tuple[Carry, _Kept]:
        """Adds a chunk but for the kernel's gradient, and keeps its tokens' segments."""
        chunk, capability = evaluated.chunk, self.config.compute_capability
        rooms = self._token_room, self._column_room
        of_tokens, of_columns = segments.copy(_chunk(evaluated), counts, chunk.slots, *rooms, capability)
        grads = add_rest(self.config, self.wanted, carry.grads, evaluated)
        if of_columns is not None and carry.grads.hidden is not None:
            part = self._product(of_columns, by_column, chunk.slots.size, carry.grads.hidden.dtype)
            grads = grads._replace(hidden=chunk.put(carry.grads.hidden, part))
        if of_tokens is not None:
            of_tokens = jax.tree.map(
                lambda full, part: jax.lax.dynamic_update_index_in_dim(full, part, index, 0), kept.of_tokens, of_tokens
            )
        kept = _Kept(of_tokens, kept.fits & self._fits(counts, 1))
        return write(carry, evaluated, grads, counts.skipped), kept

    def _multiplied(self, carry: Carry, kept: _Kept, kernel: Array) -> Carry:
        """The carry with the kernel's gradient, padded like the kernel."""
        if kept.of_tokens is None:
            return carry
        rows = pad(self.operands.hidden, (1,), 8)
        transposed = self.config.kernel_layout == "hv"
        grad = self._product(kept.of_tokens, rows, self.vocab, self.wanted.kernel, transposed=transposed)
        return carry._replace(grads=carry.grads._replace(kernel=grad))

    def _product(self, of_what: Segments, rows: Array, size: int, dtype: Any, *, transposed: bool = False) -> Array:
        return segments.product(
            of_what,
            rows,
            size,
            dtype,
            transposed=transposed,
            precision="tf32" if self.config.precision in (None, "default", "fastest") else "ieee",
            compute_capability=self.config.compute_capability,
        )


def _chunk(evaluated: Evaluated) -> segments.Chunk:
    return segments.Chunk(evaluated.logit_grads, evaluated.chunk.labels, evaluated.limits)
