"""The roles of mesh axes: decides which axes each array is gathered, summed or scattered over.

All three ways to distribute a pass (Manual, Explicit, Auto) take their specs and their reductions from a `Plan`.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jliger.core.meshes import Axes
from jliger.ops.linear_head.sharding.passes import LossPass
from jliger.ops.linear_head.types import DIMS, operand_dims


class Plan(NamedTuple):
    """The roles of mesh axes.

    Attributes:
      batch: for each leading dimension of hidden, without those of `jax.vmap`, the axes that shard it.
      vocab: axes that shard the vocabulary but not the tokens: each device has some of the columns.
      scattered: for each dimension of the kernel, the axes that shard both it and the tokens (FSDP). The kernel is
        gathered over them, and the sum of its gradient scattered.
      single: axes of size 1. Specs keep them, but there is no communication over them.
      examples: for each dimension of `jax.vmap`, the axes that shard it. Nothing is summed over them, because each
        example has its own results.
      row_ndim: how many of the last dimensions of tokens make a unit of the loss, which is whole on one device.
    """

    batch: tuple[Axes, ...]
    vocab: Axes
    scattered: tuple[Axes, Axes]
    single: frozenset[str] = frozenset()
    examples: tuple[Axes, ...] = ()
    row_ndim: int = 0

    @classmethod
    def make(
        cls,
        sizes: Mapping[str, int],
        hidden: tuple[tuple[int, ...], P],
        kernel: tuple[tuple[int, ...], P],
        vocab_dim: int,
        examples: tuple[Axes, ...] = (),
        row_ndim: int = 0,
    ) -> "Plan":
        """Makes a plan from the shapes and specs, without vmap dimensions, of hidden and the kernel (or its gradient).

        An axis that does not divide its dimension is ignored: the dimension is replicated. An axis that shards examples
        is ignored in all other dimensions.
        """
        used = {axis for axes in examples for axis in axes}
        batch = tuple(_without(axes, used) for axes in _axes_of(*hidden, sizes)[:-1])
        batch = batch[: len(batch) - row_ndim] + ((),) * row_ndim
        tokens = {axis for axes in batch for axis in axes}
        # An axis of the kernel that also shards tokens cannot keep the columns apart: its devices have different
        # tokens, which need all columns. The kernel is then gathered over the axis, as in FSDP.
        by_dim = [_without(axes, used) for axes in _axes_of(*kernel, sizes)]
        vocab = _without(by_dim[vocab_dim], tokens)
        first, second = (tuple(axis for axis in axes if axis in tokens) for axes in by_dim)
        single = frozenset(axis for axis, size in sizes.items() if size == 1)
        return cls(batch, vocab, (first, second), single, examples, row_ndim)

    @classmethod
    def of_operands(
        cls,
        loss_pass: LossPass,
        sizes: Mapping[str, int],
        dims: Sequence[str],
        operands: Sequence[tuple[tuple[int, ...], Any]],
        kernel_grad: tuple[tuple[int, ...], Any] | None = None,
    ) -> "Plan":
        """Makes a plan from the dimensions, shapes and specs of all operands.

        `kernel_grad` is the shape and spec of the kernel's gradient, if its sharding is already chosen (by XLA).
        """
        examples: list[Axes] = []
        for level, flags in enumerate(loss_pass.examples):
            # The first operand whose examples are sharded decides. Replicated operands have all examples everywhere.
            level_axes: Axes = ()
            for index, (shape, spec) in enumerate(operands):
                if flags[index] and not level_axes:
                    level_axes = _axes_of(shape, spec, sizes)[sum(loss_pass.examples_of(index)[:level])]
            examples.append(_without(level_axes, {axis for axes in examples for axis in axes}))

        def without_examples(shape: tuple[int, ...], spec: Any, levels: int) -> tuple[tuple[int, ...], P]:
            return shape[levels:], P(*_entries(shape, spec)[levels:])

        def operand(its_dims: str) -> tuple[tuple[int, ...], P]:
            index = dims.index(its_dims)
            return without_examples(*operands[index], sum(loss_pass.examples_of(index)))

        kernel_dims = operand_dims(loss_pass.config)["kernel"]
        kernel = operand(kernel_dims) if kernel_grad is None else without_examples(*kernel_grad, len(examples))
        hidden, vocab_dim = operand(DIMS["hidden"]), loss_pass.config.vocab_dim
        return cls.make(sizes, hidden, kernel, vocab_dim, tuple(examples), loss_pass.row_ndim)

    def spec(self, dims: str, examples: Sequence[bool] = (), *, is_result: bool = False) -> P:
        """The PartitionSpec of an operand or a result with these dimensions (`types.DIMS`).

        `examples` says which dimensions of `jax.vmap` an operand has; a result has all of them.
        """
        has = [True] * len(self.examples) if is_result else examples
        entries = [_entry(axes) for axes, flag in zip(self.examples, has, strict=True) if flag]
        is_kernel_gradient = is_result and set(dims) == {"h", "v"}
        for index, dim in enumerate(dims):
            if dim in "tu":
                entries += map(_entry, self.batch if dim == "t" else self.batch[: len(self.batch) - self.row_ndim])
                continue
            if dim == "k":
                entries += [*map(_entry, self.batch), None]
                continue
            # As an operand the kernel is whole but for the vocabulary axes; its gradient is also scattered.
            axes = self.vocab if dim == "v" else ()
            entries.append(_entry(axes + self.scattered[index] if is_kernel_gradient else axes))
        return P(*entries)

    def spec_like(self, spec: P, ndim: int) -> P:
        """The spec of a gradient: that of examples, then `spec` for the last `ndim` dimensions of the operand."""
        used = {axis for axes in self.examples for axis in axes}
        own = [_entry(_without(as_axes(entry), used)) for entry in spec[len(spec) - ndim :]]
        return P(*map(_entry, self.examples), *own)

    @property
    def columns(self) -> Axes:
        """Axes that shard the columns; statistics are merged over them."""
        return self._moving(self.vocab)

    @property
    def tokens(self) -> Axes:
        """Axes that shard the tokens; gradients of the head are summed over them."""
        return self._moving(tuple(axis for axes in self.batch for axis in axes))

    @property
    def summed(self) -> Axes:
        """Token axes over which the kernel's gradient is summed but not scattered."""
        return tuple(axis for axis in self.tokens if all(axis not in axes for axes in self.scattered))

    def _moving(self, axes: Axes) -> Axes:
        return tuple(axis for axis in axes if axis not in self.single)

    def reduction_axes(self, dims: str) -> Axes:
        """The axes over which a gradient of these dimensions is a sum."""
        return (() if "v" in dims else self.columns) + (() if "t" in dims else self.tokens)

    def reduce(self, grad: Array, dims: str) -> Array:
        """Sums one device's part of a gradient over `reduction_axes`; the kernel's is also scattered (FSDP)."""
        if set(dims) == {"h", "v"}:
            grad = jax.lax.psum(grad, self.summed) if self.summed else grad
            for dim, axes in enumerate(map(self._moving, self.scattered)):
                if axes:
                    grad = jax.lax.psum_scatter(grad, axes, scatter_dimension=dim, tiled=True)
            return grad
        axes = self.reduction_axes(dims)
        return jax.lax.psum(grad, axes) if axes else grad


def local_plan(vocab: Axes) -> Plan:
    """The plan if all tokens are on this device; `vocab` are the axes that shard the columns."""
    return Plan((), vocab, ((), ()))


def first_column(vocab: Axes, width: int) -> Int[Array, ""] | int:
    """The first column of this device's share of the vocabulary."""
    if not vocab:
        return 0
    # Of several axes the first is the major one, as in a PartitionSpec.
    return jax.lax.axis_index(vocab) * width


def _entries(shape: tuple[int, ...], spec: Any) -> tuple[Any, ...]:
    """The spec's entries, one for each dimension."""
    return tuple(spec) + (None,) * (len(shape) - len(spec))


def _without(axes: Axes, others: Set[str]) -> Axes:
    return tuple(axis for axis in axes if axis not in others)


def _axes_of(shape: tuple[int, ...], spec: Any, sizes: Mapping[str, int]) -> list[Axes]:
    result = []
    for size, entry in zip(shape, _entries(shape, spec), strict=True):
        axes = as_axes(entry)
        parts = 1
        for axis in axes:
            parts *= sizes[axis]
        result.append(axes if size % parts == 0 else ())
    return result


def as_axes(entry: Any) -> Axes:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _entry(axes: Axes) -> Any:
    return None if not axes else axes[0] if len(axes) == 1 else axes
