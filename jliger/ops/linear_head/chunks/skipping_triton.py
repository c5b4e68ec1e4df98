"""The loop over chunks that leaves segments out of products, if few enough matter for that to be faster.

The first chunk decides for all: a choice at run time makes the host wait, and one for each chunk would cost more than
it saves. If a later chunk has more segments than there is room for, all is computed again, with whole products.

Segments of columns are multiplied chunk by chunk. Those of tokens are kept, and multiplied once after all chunks: a
kernel whose output is not its operand cannot add to a sum in place, and each chunk has segments in most columns.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.ops.linear_head.chunks import segments
from jliger.ops.linear_head.chunks.arrays import pad
from jliger.ops.linear_head.chunks.segments import SEGMENT, Counts, Segments
from jliger.ops.linear_head.chunks.skipping import Carry, Evaluated, SkippingPass

# The share of a chunk's segments that there is room for, and the most bytes for all tokens' segments.
_ROOM, _MOST_BYTES = 1 / 4, 2**30
# The share of the room that the first chunk may take.
_ROOM_OF_FIRST = 7 / 8


class _OfHidden(NamedTuple):
    """What is left to add to gradients of hidden states: `factors[t] · Σ_v shares[block, v] · kernel[v]`."""

    factors: Float[Array, "N C"]
    shares: Float[Array, "N B V"]


class _OfKernel(NamedTuple):
    """The kernel's gradient: a product of segments, and `factors[v] · means[block]`."""

    segments: Segments
    factors: Float[Array, "N V"]
    means: Float[Array, "N J H"]


class _Left(NamedTuple):
    """What is left to do after the loop, of all chunks or of one; None for a gradient that is not wanted."""

    of_hidden: _OfHidden | None = None
    of_kernel: _OfKernel | None = None


def run(skipping: SkippingPass) -> Carry:
    return _SegmentsPass(skipping, skipping.blocks.head.kernel.shape[0]).run()


@dataclasses.dataclass(frozen=True)
class _SegmentsPass:
    """The pass, and the number of columns with padding."""

    skipping: SkippingPass
    vocab: int

    def run(self) -> Carry:
        skipping = self.skipping
        first = skipping.evaluate(0)
        counts = self._count(first)
        return jax.lax.cond(
            self._fits(counts, _ROOM_OF_FIRST),
            lambda: self._with_segments(first, counts),
            lambda: skipping.packed.after_first(self._add_whole, self._whole(skipping.initial(), first)),
        )

    @property
    def _token_room(self) -> int:
        """The number of tokens' segments that there is room for in each chunk; 0 if none are needed."""
        packed = self.skipping.packed
        most = _MOST_BYTES // (packed.num_chunks * SEGMENT * self.skipping.operands.hidden.dtype.itemsize)
        room = min(int(_ROOM * packed.chunk * -(-self.vocab // SEGMENT)), most)
        return max(1, room) if self.skipping.wanted.kernel is not None else 0

    @property
    def _column_room(self) -> int:
        """The same for columns' segments."""
        room = int(_ROOM * self.vocab * -(-self.skipping.packed.chunk // SEGMENT))
        return max(1, room) if self.skipping.wanted.hidden is not None else 0

    def _count(self, evaluated: Evaluated) -> Counts:
        return segments.count(_chunk(evaluated), self.skipping.config.compute_capability)

    def _fits(self, counts: Counts, share: float) -> Bool[Array, ""]:
        """Whether a chunk's segments fit in a share of the room."""
        fits = jnp.bool(True)
        for of_tiles, room in ((counts.of_tokens, self._token_room), (counts.of_columns, self._column_room)):
            if room:
                fits &= of_tiles.sum() <= int(share * room)
        return fits

    def _whole(self, carry: Carry, evaluated: Evaluated) -> Carry:
        """Adds a chunk with whole products."""
        grads = evaluated.logit_grads
        return self.skipping.add(carry, evaluated, grads, grads, jnp.zeros_like(evaluated.weights))

    def _add_whole(self, index: Int[Array, ""] | int, carry: Carry) -> Carry:
        return self._whole(carry, self.skipping.evaluate(index))

    def _with_segments(self, first: Evaluated, counts: Counts) -> Carry:
        packed, initial = self.skipping.packed, self.skipping.initial()

        def step(index: Int[Array, ""] | int, carries: tuple[Carry, _Left, Any]) -> tuple[Carry, _Left, Any]:
            carry, left, fits = carries
            evaluated = self.skipping.evaluate(index)
            counts = self._count(evaluated)
            carry, of_chunk = self._add_segments(carry, evaluated, counts)
            return carry, _written(left, of_chunk, index), fits & self._fits(counts, 1)

        carry, of_first = self._add_segments(initial, first, counts)
        left = jax.tree.map(lambda part: jnp.zeros_like(part, shape=(packed.num_chunks, *part.shape)), of_first)
        carries = carry, _written(left, of_first, 0), self._fits(counts, 1)
        carry, left, fits = packed.after_first(step, carries)
        if not packed.has_several_chunks:
            return self._finished(carry, left)
        return jax.lax.cond(
            fits,
            lambda: self._finished(carry, left),
            lambda: packed.loop(lambda size, *args: self._add_whole(*args), initial, (packed.chunk,)),
        )

    def _add_segments(self, carry: Carry, evaluated: Evaluated, counts: Counts) -> tuple[Carry, _Left]:
        """Adds a chunk, and returns what it leaves to do after the loop."""
        chunk, left = evaluated.chunk, _Left()
        of_tokens, of_columns = segments.copy(
            _chunk(evaluated),
            counts,
            chunk.slots,
            self._token_room,
            self._column_room,
            self.skipping.config.compute_capability,
        )
        skipped = jnp.maximum(*jnp.abs(counts.by_token.sum(axis=1)))
        result = self.skipping.add(carry, evaluated, None, None, skipped)
        if of_columns is not None and carry.grads.hidden is not None:
            part = self._product(of_columns, evaluated.columns.kernel, chunk.slots.size, carry.grads.hidden.dtype)
            grads = result.grads._replace(hidden=chunk.put(carry.grads.hidden, part))
            result = result._replace(grads=grads)
            shares = _shares(counts.by_column[1])
            of_hidden = _OfHidden(counts.by_token[1].sum(axis=0), shares.astype(chunk.hidden.dtype))
            left = left._replace(of_hidden=of_hidden)
        if of_tokens is not None:
            shares = _shares(counts.by_token[0]).astype(chunk.hidden.dtype)
            means = self._means(shares, chunk.hidden)
            left = left._replace(of_kernel=_OfKernel(of_tokens, counts.by_column[0].sum(axis=0), means))
        return result, left

    def _finished(self, carry: Carry, left: _Left) -> Carry:
        """Gradients with what the loop left to do. The kernel's is padded like the kernel."""
        skipping, grads = self.skipping, carry.grads
        if left.of_hidden is not None and grads.hidden is not None:
            factors, shares = left.of_hidden
            kernel, packed = skipping.blocks.head.kernel, skipping.packed
            means = self._means(shares, kernel)
            means = means.repeat(SEGMENT, axis=1)[:, : packed.chunk, : grads.hidden.shape[1]]
            rest = (factors[:, :, None] * means).reshape(-1, grads.hidden.shape[1]).astype(grads.hidden.dtype)
            hidden = grads.hidden.at[packed.token_of].add(
                rest, mode="drop", unique_indices=True, indices_are_sorted=True
            )
            grads = grads._replace(hidden=hidden)
        if left.of_kernel is not None:
            of_tokens, factors, means = left.of_kernel
            grad = self._product(
                of_tokens,
                pad(skipping.operands.hidden, (1,), skipping.blocks.alignment),
                self.vocab,
                skipping.wanted.kernel,
                factors=factors,
                means=means,
                transposed=skipping.config.kernel_layout == "hv",
            )
            grads = grads._replace(kernel=grad)
        return carry._replace(grads=grads)

    def _means(self, shares: Float[Array, "*B R"], rows: Float[Array, "R H"]) -> Float[Array, "*B H"]:
        return jnp.matmul(shares, rows, precision=self.skipping.config.precision, preferred_element_type=jnp.float32)

    def _product(self, of_what: Segments, rows: Array, size: int, dtype: Any, **options: Any) -> Array:
        config = self.skipping.config
        return segments.product(
            of_what,
            rows,
            size,
            dtype,
            precision="tf32" if config.precision in (None, "default", "fastest") else "ieee",
            compute_capability=config.compute_capability,
            **options,
        )


def _chunk(evaluated: Evaluated) -> segments.Chunk:
    return segments.Chunk(evaluated.logit_grads, evaluated.chunk.labels, evaluated.limits)


def _written(full: Any, part: Any, index: Int[Array, ""] | int) -> Any:
    return jax.tree.map(lambda full, part: jax.lax.dynamic_update_index_in_dim(full, part, index, 0), full, part)


def _shares(sums: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
    """Each number's share of the sum of sizes over the last dimension."""
    total = jnp.abs(sums).sum(axis=-1, keepdims=True)
    return sums / jnp.where(total == 0, 1, total)
