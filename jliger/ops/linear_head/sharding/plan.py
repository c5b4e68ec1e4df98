"""Which mesh axes do what: the one place that decides who gathers, and who sums what with whom."""

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jliger.core.meshes import Axes
from jliger.ops.linear_head.sharding.passes import Form, Role


class Plan(NamedTuple):
    """The roles of mesh axes.

    Attributes:
      batch: for each leading dimension of hidden, the axes that shard it; dimensions of `jax.vmap` aside.
      vocab: axes that shard the vocabulary and no tokens: each device has some columns for all its tokens.
      scattered: for each dimension of the kernel, token axes that shard its gradient too (FSDP): the kernel is gathered
        over them, and its gradient's sum scattered.
      vocab_dim: which dimension of the kernel is the vocabulary.
      single: axes of one device, which are in specs, and over which nothing is moved.
      examples: for each dimension of `jax.vmap`, the axes that shard it. Devices sum nothing over them: each example
        has results of its own.
    """

    batch: tuple[Axes, ...]
    vocab: Axes
    scattered: tuple[Axes, Axes]
    vocab_dim: int
    single: frozenset[str] = frozenset()
    examples: tuple[Axes, ...] = ()

    @classmethod
    def make(
        cls,
        sizes: Mapping[str, int],
        hidden: tuple[tuple[int, ...], P],
        kernel: tuple[tuple[int, ...], P],
        vocab_dim: int,
        examples: tuple[Axes, ...] = (),
    ) -> "Plan":
        """From the shapes and specs of hidden and of the kernel (or its gradient), without dimensions of examples.

        An axis that doesn't divide its dimension is left out: what it would shard is replicated. So is one that shards
        examples, from all other dimensions.
        """
        used = {axis for axes in examples for axis in axes}
        batch = tuple(_without(axes, used) for axes in _axes_of(*hidden, sizes)[:-1])
        tokens = {axis for axes in batch for axis in axes}
        by_dim = [_without(axes, used) for axes in _axes_of(*kernel, sizes)]
        vocab = _without(by_dim[vocab_dim], tokens)
        first, second = (tuple(axis for axis in axes if axis in tokens) for axes in by_dim)
        single = frozenset(axis for axis, size in sizes.items() if size == 1)
        return cls(batch, vocab, (first, second), vocab_dim, single, examples)

    @classmethod
    def of_operands(
        cls,
        form: Form,
        sizes: Mapping[str, int],
        roles: Sequence[Role],
        operands: Sequence[tuple[tuple[int, ...], Any]],
        kernel_grad: tuple[tuple[int, ...], Any] | None = None,
    ) -> "Plan":
        """From the shapes and specs of all operands, and perhaps of a result: the kernel's gradient."""
        examples: list[Axes] = []
        for level, flags in enumerate(form.examples):
            # Whichever operand is spread: one that is whole has each device's examples already.
            found: Axes = ()
            for index, (shape, spec) in enumerate(operands):
                if flags[index] and not found:
                    found = _axes_of(shape, spec, sizes)[sum(outer[index] for outer in form.examples[:level])]
            examples.append(_without(found, {axis for axes in examples for axis in axes}))

        def inner(shape: tuple[int, ...], spec: Any, levels: int) -> tuple[tuple[int, ...], P]:
            return shape[levels:], P(*_entries(shape, spec)[levels:])

        def operand(role: Role) -> tuple[tuple[int, ...], P]:
            index = roles.index(role)
            return inner(*operands[index], sum(flags[index] for flags in form.examples))

        kernel = operand("kernel") if kernel_grad is None else inner(*kernel_grad, len(examples))
        return cls.make(sizes, operand("hidden"), kernel, form.config.vocab_dim, tuple(examples))

    def spec(self, role: Role, examples: Sequence[bool] = (), *, result: bool = False) -> P:
        """How an array of this role is sharded as operand, or as result.

        Args:
          role: the array's.
          examples: which dimensions of examples it has; a result has them all.
          result: whether it is one.
        """
        has = [True] * len(self.examples) if result else examples
        lead = [_entry(axes) for axes, flag in zip(self.examples, has, strict=True) if flag]
        return P(*lead, *self._spec(role, result=result))

    def spec_like(self, spec: P, ndim: int) -> P:
        """That of a gradient of each example, spread as `spec` spreads the last `ndim` dimensions of its input."""
        used = {axis for axes in self.examples for axis in axes}
        own = [_entry(_without(as_axes(entry), used)) for entry in spec[len(spec) - ndim :]]
        return P(*map(_entry, self.examples), *own)

    def _spec(self, role: Role, *, result: bool) -> P:
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


def _entries(shape: tuple[int, ...], spec: Any) -> tuple[Any, ...]:
    """An entry for each dimension."""
    return tuple(spec) + (None,) * (len(shape) - len(spec))


def _without(axes: Axes, others: Set[str]) -> Axes:
    return tuple(axis for axis in axes if axis not in others)


def _axes_of(shape: tuple[int, ...], spec: Any, sizes: Mapping[str, int]) -> list[Axes]:
    found = []
    for size, entry in zip(shape, _entries(shape, spec), strict=True):
        axes = as_axes(entry)
        parts = 1
        for axis in axes:
            parts *= sizes[axis]
        found.append(axes if size % parts == 0 else ())
    return found


def as_axes(entry: Any) -> Axes:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _entry(axes: Axes) -> Any:
    return None if not axes else axes[0] if len(axes) == 1 else axes
