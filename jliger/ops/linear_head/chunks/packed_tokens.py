"""Packs the counted tokens, in order, into chunks of one size.

How many tokens count is only known at run time, while shapes are static. So the arrays have room for all tokens, and
the loop's trip count depends on the number of counted ones. Where all tokens are known to count, nothing is packed, and
the trip count is static.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.ops.linear_head.chunks.arrays import materialize, pad
from jliger.ops.linear_head.chunks.sizes import is_symbolic
from jliger.ops.linear_head.chunks.types import empty_stats
from jliger.ops.linear_head.types import HeadConfig, Operands


class PackedTokens(NamedTuple):
    """The counted tokens, in order, in chunks.

    Attributes:
      token_of: the token index at each place. Places after the last counted token have indices out of range.
      count: the number of counted tokens, a Python integer if all are known to count.
      num_tokens: the number of all tokens.
      chunk: places per chunk.
    """

    token_of: Int[Array, " places"]
    count: Int[Array, ""] | int
    num_tokens: int
    chunk: int

    @classmethod
    def of(cls, operands: Operands, chunk: int) -> "PackedTokens":
        """Packs the tokens of `operands` that count; if all are known to, each is at its own place."""
        if operands.counted is not None:
            return cls.make(operands.counted, chunk)
        num_tokens = operands.labels.shape[0]
        places = jnp.arange(-(-num_tokens // chunk) * chunk, dtype=jnp.int32)
        return cls(places, jnp.asarray(num_tokens) if is_symbolic(num_tokens) else num_tokens, num_tokens, chunk)

    @classmethod
    def make(cls, counted: Bool[Array, " T"], chunk: int, *, at_any_place: bool = False) -> "PackedTokens":
        """Packs the counted tokens. With `at_any_place`, a chunk may begin at any place, not only at multiples."""
        num_tokens = counted.shape[0]
        room = num_tokens + chunk if at_any_place else -(-num_tokens // chunk) * chunk
        places = jnp.arange(room, dtype=jnp.int32)
        count = counted.sum(dtype=jnp.int32)
        # A stable sort by "uncounted" puts the counted tokens first and keeps their order, so that gathers and scatters
        # have sorted indices.
        order = jnp.argsort(~counted, stable=True).astype(jnp.int32)
        order = jnp.pad(order, (0, places.shape[0] - num_tokens))
        # The out-of-range indices differ from each other, because gathers and scatters promise XLA unique indices. They
        # read a fill value and write nothing.
        return cls(jnp.where(places < count, order, num_tokens + places), count, num_tokens, chunk)

    @property
    def num_chunks(self) -> int:
        return self.token_of.shape[0] // self.chunk

    @property
    def has_several_chunks(self) -> bool:
        """Whether there may be more than one chunk. With a symbolic number of tokens there may be."""
        return is_symbolic(self.num_chunks) or self.num_chunks > 1

    @property
    def all_count(self) -> bool:
        """Whether all tokens are known to count when the program is traced."""
        return isinstance(self.count, int)

    def loop(
        self,
        step: Callable[[int, Any, Any], Any],
        initial: Any,
        sizes: tuple[int, ...],
        *,
        skip_empty: bool = False,
    ) -> Any:
        """`carry = step(size, index, carry)` for every chunk that has tokens.

        `size` is the smallest of `sizes` that holds the chunk's tokens. With a single size, or if all tokens count, the
        first chunk runs before the loop, even without tokens: its results initialise sums, so that no zeros are needed.
        With `skip_empty`, no chunk runs if there are no tokens, and `initial` needs every array.
        """
        if (len(sizes) == 1 or self.all_count) and not skip_empty:
            sized_step = functools.partial(step, sizes[-1])
            return self._repeat(sized_step, 1, sized_step(0, initial))

        def fitting_step(index: Int[Array, ""] | int, carry: Any) -> Any:
            if len(sizes) == 1:
                return step(sizes[0], index, carry)
            return run_with_fitting_size(sizes, jnp.asarray(self.count) - index * self.chunk, step, index, carry)

        if not (self.has_several_chunks or skip_empty):
            return fitting_step(0, initial)
        return self._repeat(fitting_step, 0, initial)

    def after_first(self, step: Callable[[Any, Any], Any], carry: Any) -> Any:
        """`carry = step(index, carry)` for every chunk but the first that has tokens."""
        return self._repeat(step, 1, carry)

    def _repeat(self, step: Callable[[Any, Any], Any], first: int, carry: Any) -> Any:
        if first and not self.has_several_chunks:
            return carry
        return jax.lax.fori_loop(first, (self.count + self.chunk - 1) // self.chunk, step, carry)

    def slots(self, start: Int[Array, ""] | int, size: int) -> Int[Array, " size"]:
        """The token indices of `size` places from `start` on."""
        return jax.lax.dynamic_slice(self.token_of, (start,), (size,))

    def part(self, index: Int[Array, ""] | int, size: int) -> "Part":
        """The first `size` places of a chunk, for a loss of tokens."""
        start = index * self.chunk
        slots = self.slots(start, size)
        return Part(start, slots, functools.partial(take, slots), lambda tree: tree)

    def empty_stats(self, config: HeadConfig, hidden: Float[Array, "T H"]) -> Any:
        """Statistics of 0 and predictions of −1 for all places, varying over the same mesh axes as `hidden`."""
        return empty_stats(config, hidden, self.token_of.shape)

    def restore(self, stats: Any) -> Any:
        """Statistics in the order of the tokens; uncounted tokens get 0, and −1 as columns."""

        def restored(field: Array) -> Array:
            if self.all_count:
                return field[: self.num_tokens]
            # Columns are the only integers.
            otherwise = -1 if jnp.issubdtype(field.dtype, jnp.integer) else 0
            full = jnp.full_like(field, otherwise, shape=(self.num_tokens, *field.shape[1:]))
            return full.at[self.token_of].set(field, mode="drop", unique_indices=True)

        return jax.tree.map(restored, stats)


def run_with_fitting_size(
    sizes: tuple[int, ...], count: Int[Array, ""], step: Callable[..., Any], *operands: Any
) -> Any:
    """`step(size, *operands)` with the smallest size that holds `count` tokens, or with the largest.

    Sizes are static, so each is a branch of its own; the count chooses at run time.
    """
    fitting = sum(((count > size).astype(jnp.int32) for size in sizes[:-1]), jnp.int32(0))
    return jax.lax.switch(fitting, [functools.partial(step, size) for size in sizes], *operands)


class Part(NamedTuple):
    """Which tokens a chunk has, and the units of a loss that they belong to.

    Attributes:
      start: the first place.
      slots: the token indices.
      take_units: the chunk's units of arrays per unit; zeros in place of units that are in other chunks.
      in_units: arranges a `LinearLogprobs` of the chunk's tokens in these units.
    """

    start: Int[Array, ""] | int
    slots: Int[Array, " C"]
    take_units: Callable[[Any], Any]
    in_units: Callable[[Any], Any]


class Chunk(NamedTuple):
    """The tokens of one chunk. Places after the last counted token have zeros, and columns of −1."""

    slots: Int[Array, " C"]
    hidden: Float[Array, "C H"]
    labels: Int[Array, " C"]
    adapted: Float[Array, "C R"] | None
    teacher: Float[Array, "C G"] | None
    inverse_temperature: Float[Array, " C"] | None = None
    teacher_ids: Int[Array, "C K"] | None = None

    @classmethod
    def make(cls, slots: Int[Array, " C"], operands: Operands, alignment: int) -> "Chunk":
        # The forward and the kernel-gradient product both read the gathered rows: without `materialize`, XLA may gather
        # them twice.
        def rows(array: Array) -> Array:
            return materialize(pad(_take(array, slots, 0), (1,), alignment))

        adapted, teacher = (
            None if array is None else rows(array) for array in (operands.adapted, operands.teacher_hidden)
        )
        inverse_temperature, teacher_ids = operands.inverse_temperature, operands.teacher_ids
        return cls(
            slots=slots,
            hidden=rows(operands.hidden),
            labels=_take(operands.labels, slots, -1),
            adapted=adapted,
            teacher=teacher,
            # Not 0 in empty slots: times the bias of a column that does not exist, −∞, it would be NaN.
            inverse_temperature=None if inverse_temperature is None else _take(inverse_temperature, slots, 1),
            teacher_ids=None if teacher_ids is None else _take(teacher_ids, slots, -1),
        )

    def take(self, tree: Any) -> Any:
        """The chunk's rows of per-token arrays."""
        return take(self.slots, tree)

    def put(self, full: Float[Array, "T H"], part: Float[Array, "C P"]) -> Float[Array, "T H"]:
        """`full` with the chunk's rows written; rows and columns of padding are dropped."""
        part = part[:, : full.shape[1]].astype(full.dtype)
        return full.at[self.slots].set(part, mode="drop", unique_indices=True, indices_are_sorted=True)


def write_stats(stats: Any, part: Any, start: Int[Array, ""] | int) -> Any:
    """`stats` in packed order, with the statistics `part` of a chunk written at `start`."""
    return jax.tree.map(lambda full, new: jax.lax.dynamic_update_slice_in_dim(full, new, start, 0), stats, part)


def take(slots: Int[Array, " C"], tree: Any) -> Any:
    """The elements of arrays at the slots; 0 for a slot out of range."""
    return jax.tree.map(lambda array: _take(array, slots, 0), tree)


def _take(array: Array, slots: Int[Array, " C"], fill: int) -> Array:
    return array.at[slots].get(mode="fill", fill_value=fill, unique_indices=True, indices_are_sorted=True)
