"""Which mesh axes do what: the one place that decides who gathers, and who sums what with whom."""

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
      batch: for each leading dimension of hidden, the axes that shard it; dimensions of `jax.vmap` aside.
      vocab: axes that shard the vocabulary and no tokens: each device has some columns for all its tokens.
      scattered: for each dimension of the kernel, token axes that shard its gradient too (FSDP): the kernel is gathered
        over them, and its gradient's sum scattered.
      single: axes of one device, which are in specs, and over which nothing is moved.
      examples: for each dimension of `jax.vmap`, the axes that shard it. Devices sum nothing over them: each example
        has results of its own.
    """

    batch: tuple[Axes, ...]
    vocab: Axes
    scattered: tuple[Axes, Axes]
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
        return cls(batch, vocab, (first, second), single, examples)

    @classmethod
    def of_operands(
        cls,
        loss_pass: LossPass,
        sizes: Mapping[str, int],
        dims: Sequence[str],
        operands: Sequence[tuple[tuple[int, ...], Any]],
        kernel_grad: tuple[tuple[int, ...], Any] | None = None,
    ) -> "Plan":
        """From the dimensions, and the shapes and specs, of all operands.

        `kernel_grad` is the shape and spec of a result, the kernel's gradient, to shard that as XLA wants it.
        """
        examples: list[Axes] = []
        for level, flags in enumerate(loss_pass.examples):
            # Any operand that is sharded tells: one that is not has each device's examples already.
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
        return cls.make(sizes, operand(DIMS["hidden"]), kernel, loss_pass.config.vocab_dim, tuple(examples))

    def spec(self, dims: str, examples: Sequence[bool] = (), *, is_result: bool = False) -> P:
        """How an array of these dimensions (`types.DIMS`) is sharded, as an operand or as a result.

        `examples` says which dimensions of examples an operand has; a result has them all.
        """
        has = [True] * len(self.examples) if is_result else examples
        entries = [_entry(axes) for axes, flag in zip(self.examples, has, strict=True) if flag]
        is_kernel_gradient = is_result and set(dims) == {"h", "v"}
        for index, dim in enumerate(dims):
            if dim == "t":
                entries += [_entry(axes) for axes in self.batch]
                continue
            axes = self.vocab if dim == "v" else ()
            entries.append(_entry(axes + self.scattered[index] if is_kernel_gradient else axes))
        return P(*entries)

    def spec_like(self, spec: P, ndim: int) -> P:
        """Of each example's gradient, sharded as `spec` shards the last `ndim` dimensions of its operand."""
        used = {axis for axes in self.examples for axis in axes}
        own = [_entry(_without(as_axes(entry), used)) for entry in spec[len(spec) - ndim :]]
        return P(*map(_entry, self.examples), *own)

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

    def reduction_axes(self, dims: str) -> Axes:
        """The axes over which a gradient of these dimensions is a sum."""
        return (() if "v" in dims else self.columns) + (() if "t" in dims else self.tokens)

    def reduce(self, grad: Array, dims: str) -> Array:
        """Sums one device's part of a gradient over `reduction_axes`; the kernel's is scattered where it can be."""
        if set(dims) == {"h", "v"}:
            grad = jax.lax.psum(grad, self.summed) if self.summed else grad
            for dim, axes in enumerate(map(self._moving, self.scattered)):
                if axes:
                    grad = jax.lax.psum_scatter(grad, axes, scatter_dimension=dim, tiled=True)
            return grad
        axes = self.reduction_axes(dims)
        return jax.lax.psum(grad, axes) if axes else grad


def local_plan(vocab: Axes) -> Plan:
    """For tokens that are all on this device; `vocab` names the axes that shard the columns."""
    return Plan((), vocab, ((), ()))


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
