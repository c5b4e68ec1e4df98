"""Packs whole rows of tokens into chunks, for losses that are a sum over rows.

Only the counted tokens of a row take a place. A chunk begins with the first row that is not yet computed, and takes as
many rows as its places can hold. How many depends on the number of counted tokens in each row, so it is only known at
run time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.ops.linear_head.chunks.packed_tokens import PackedTokens, Part, run_with_fitting_size, take
from jliger.ops.linear_head.chunks.sizes import forward_chunk, is_symbolic, part_sizes, round_up, rows_of_chunk
from jliger.ops.linear_head.types import HeadConfig, Operands


def pack_units(
    config: HeadConfig, operands: Operands, vocab: int, row_length: int | None, alignment: int = 1
) -> tuple["PackedTokens | PackedRows", Callable[..., Any]]:
    """The counted tokens in chunks of whole units, and the loop over the chunks.

    A unit is a row of `row_length` tokens, or a token if that is None. Chunks have places for a multiple of `alignment`
    tokens.
    """
    if row_length is not None:
        rows = PackedRows.make(config, operands, vocab, row_length, alignment)
        return rows, rows.loop
    chunk = round_up(forward_chunk(config, operands.labels.shape[0], vocab), alignment)
    tokens = PackedTokens.of(operands, chunk)
    return tokens, functools.partial(tokens.loop, sizes=(tokens.chunk,))


class PackedRows(NamedTuple):
    """The counted tokens of the rows, in order.

    Attributes:
      tokens: the counted tokens; a chunk has `tokens.chunk` places.
      row_of: the rows that have a counted token, in order. Entries after the last of them are out of range.
      rank: the position of each row in `row_of`.
      ends: at each position in `row_of`, the number of counted tokens in all rows up to this one.
      count: the number of rows that have a counted token.
      length: tokens per row.
      window: the most rows per chunk.
    """

    tokens: PackedTokens
    row_of: Int[Array, " places"]
    rank: Int[Array, " R"]
    ends: Int[Array, " places"]
    count: Int[Array, ""]
    length: int
    window: int

    @classmethod
    def make(cls, config: HeadConfig, operands: Operands, vocab: int, length: int, alignment: int) -> "PackedRows":
        counted = operands.counted
        if counted is None:
            counted = jnp.ones_like(operands.labels, bool)
        num_rows = counted.shape[0] // length
        chunk, window = rows_of_chunk(config, num_rows, length, vocab)
        chunk = round_up(chunk, alignment)
        by_row = counted.reshape(num_rows, length).sum(axis=1, dtype=jnp.int32)
        # Rows are packed as tokens are: first those that count.
        rows = PackedTokens.make(by_row > 0, window, at_any_place=True)
        return cls(
            tokens=PackedTokens.make(counted, chunk, at_any_place=True),
            row_of=rows.token_of,
            rank=jnp.cumsum(by_row > 0, dtype=jnp.int32) - 1,
            ends=jnp.cumsum(take(rows.token_of, by_row), dtype=jnp.int32),
            count=jnp.asarray(rows.count),
            length=length,
            window=window,
        )

    def empty_stats(self, config: HeadConfig, hidden: Float[Array, "T H"]) -> Any:
        """As in `PackedTokens`."""
        return self.tokens.empty_stats(config, hidden)

    def restore(self, stats: Any) -> Any:
        """As in `PackedTokens`."""
        return self.tokens.restore(stats)

    def loop(self, step: Callable[[int, Any, Any], Any], initial: Any) -> Any:
        """`carry = step(size, first, carry)` for every chunk, which begins with the row at position `first`.

        `size` is the smallest size that holds the chunk's tokens. The first chunk always has the full size and runs
        before the loop: its results initialise sums.
        """
        chunk = self.tokens.chunk
        sizes = part_sizes(chunk)
        carry = step(chunk, 0, initial)
        if not is_symbolic(self.tokens.num_tokens) and self.tokens.num_tokens <= chunk:
            return carry

        def next_step(first_and_carry: tuple[Any, Any]) -> tuple[Any, Any]:
            first, carry = first_and_carry
            last = self._last(first)
            count = self.ends[last] - self._start(first)
            return last + 1, run_with_fitting_size(sizes, count, step, first, carry)

        return jax.lax.while_loop(lambda state: state[0] < self.count, next_step, (self._last(0) + 1, carry))[1]

    def part(self, first: Int[Array, ""] | int, size: int) -> Part:
        """The chunk that begins with the row at position `first`, in `size` places."""
        start, last = self._start(first), self._last(first)
        places = jnp.arange(size, dtype=jnp.int32)
        # Places of the next chunk's tokens get indices out of range, which differ from each other, because gathers and
        # scatters promise XLA unique indices.
        num_tokens = self.tokens.num_tokens
        outside = num_tokens + places
        slots = self.tokens.slots(start, size)
        slots = jnp.where((places < self.ends[last] - start) & (slots < num_tokens), slots, outside)
        rows = jax.lax.dynamic_slice(self.row_of, (first,), (self.window,))
        in_chunk = jnp.arange(self.window, dtype=jnp.int32) <= last - first
        rows = jnp.where(in_chunk, rows, num_tokens + jnp.arange(self.window, dtype=jnp.int32))
        rank = self.rank.at[slots // self.length].get(mode="fill", fill_value=0)
        offsets = (rank - first) * self.length + slots % self.length
        offsets = jnp.where(slots < num_tokens, offsets, self.window * self.length + places)
        return Part(start, slots, functools.partial(take, rows), functools.partial(self._in_rows, offsets))

    def _start(self, first: Int[Array, ""] | int) -> Int[Array, ""]:
        """The place of the first counted token of the row at position `first`."""
        return jnp.where(first == 0, 0, self.ends[first - 1])

    def _last(self, first: Int[Array, ""] | int) -> Int[Array, ""]:
        """The position of the last row that fits into the chunk."""
        fits = (self.ends <= self._start(first) + self.tokens.chunk).sum(dtype=jnp.int32)
        return jnp.minimum(jnp.minimum(fits, first + self.window), jnp.maximum(self.count, 1)) - 1

    def _in_rows(self, offsets: Int[Array, " C"], result: Any) -> Any:
        """Rows `[window, *row]` of the chunk's tokens; 0, and −1 as prediction, for all other tokens."""

        def rows(field: Array) -> Array:
            fill = -1 if jnp.issubdtype(field.dtype, jnp.integer) else 0
            full = jnp.full_like(field, fill, shape=(self.window * self.length,))
            full = full.at[offsets].set(field, mode="drop", unique_indices=True, indices_are_sorted=True)
            return full.reshape(self.window, self.length)

        return jax.tree.map(rows, result)
