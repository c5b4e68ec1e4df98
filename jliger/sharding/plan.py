"""Which mesh axes do what: the one place that decides who gathers, and who sums what with whom."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jliger.sharding.form import Role

Axes = tuple[str, ...]


class Plan(NamedTuple):
    """The roles of mesh axes.

    Attributes:
      batch: for each leading dimension of hidden, the axes that shard it.
      vocab: axes that shard the vocabulary and no tokens: each device has some columns for all its tokens.
      scattered: for each dimension of the kernel, token axes that shard its gradient too (FSDP): the kernel is gathered
        over them, and its gradient's sum scattered.
      vocab_dim: which dimension of the kernel is the vocabulary.
      single: axes of one device, which are in specs, and over which nothing is moved.
    """

    batch: tuple[Axes, ...]
    vocab: Axes
    scattered: tuple[Axes, Axes]
    vocab_dim: int
    single: frozenset[str] = frozenset()

    @classmethod
    def make(
        cls,
        sizes: Mapping[str, int],
        hidden: tuple[tuple[int, ...], P],
        kernel: tuple[tuple[int, ...], P],
        vocab_dim: int,
    ) -> "Plan":
        """From the shapes and specs of hidden and of the kernel (or its gradient).

        An axis that doesn't divide its dimension is left out: what it would shard is replicated.
        """
        batch = tuple(_axes_of(*hidden, sizes)[:-1])
        tokens = {axis for axes in batch for axis in axes}
        by_dim = _axes_of(*kernel, sizes)
        vocab = tuple(axis for axis in by_dim[vocab_dim] if axis not in tokens)
        first, second = (tuple(axis for axis in axes if axis in tokens) for axes in by_dim)
        single = frozenset(axis for axis, size in sizes.items() if size == 1)
        return cls(batch, vocab, (first, second), vocab_dim, single)

    def spec(self, role: Role, *, result: bool = False) -> P:
        """How an array of this role is sharded as operand, or as result."""
        batch = [_entry(axes) for axes in self.batch]
        if role in ("hidden", "adapted", "teacher"):
            return P(*batch, None)
        if role == "token":
            return P(*batch)
        if role == "logits":
            return P(*batch, _entry(self.vocab))
        if role == "vocab":
            return P(_entry(self.vocab))
        if role in ("adapter", "teacher kernel hv"):
            return P(None, _entry(self.vocab))
        if role == "teacher kernel vh":
            return P(_entry(self.vocab), None)
        vocab = [self.vocab if dim == self.vocab_dim else () for dim in range(2)]
        return P(*(_entry(axes + self.scattered[dim] if result else axes) for dim, axes in enumerate(vocab)))

    @property
    def columns(self) -> Axes:
        """Axes over which devices' columns come together."""
        return self._moving(self.vocab)

    @property
    def tokens(self) -> Axes:
        """Axes over which devices' tokens come together."""
        return self._moving(tuple(axis for axes in self.batch for axis in axes))

    @property
    def summed(self) -> Axes:
        """Token axes over which the kernel's gradient is summed and stays whole."""
        return tuple(axis for axis in self.tokens if all(axis not in axes for axes in self.scattered))

    def _moving(self, axes: Axes) -> Axes:
        return tuple(axis for axis in axes if axis not in self.single)

    def sum_kernel_grad(self, grad: Array) -> Array:
        if self.summed:
            grad = jax.lax.psum(grad, self.summed)
        for dim, axes in enumerate(map(self._moving, self.scattered)):
            if axes:
                grad = jax.lax.psum_scatter(grad, axes, scatter_dimension=dim, tiled=True)
        return grad

    def sum_over_tokens(self, grad: Array) -> Array:
        return jax.lax.psum(grad, self.tokens) if self.tokens else grad


def local_plan(vocab: Axes, vocab_dim: int) -> Plan:
    """For one device's share as all there is, but for the vocabulary."""
    return Plan((), vocab, ((), ()), vocab_dim)


def first_column(vocab: Axes, width: int) -> Int[Array, ""] | int:
    """The first column of this device's share of the vocabulary."""
    if not vocab:
        return 0
    # Of several axes the first is the slowest, as in a PartitionSpec.
    return jax.lax.axis_index(vocab) * width


def _axes_of(shape: tuple[int, ...], spec: Any, sizes: Mapping[str, int]) -> list[Axes]:
    entries = tuple(spec) + (None,) * (len(shape) - len(spec))
    found = []
    for size, entry in zip(shape, entries, strict=True):
        axes: Axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        parts = 1
        for axis in axes:
            parts *= sizes[axis]
        found.append(axes if size % parts == 0 else ())
    return found


def _entry(axes: Axes) -> Any:
    return None if not axes else axes[0] if len(axes) == 1 else axes
