"""Runs an operation on local arrays of each device of a mesh: what is sharded, what is gathered, what is summed.

An operation names the dimensions of its operands and results, as `einsum` does. There are three kinds:

* `t` stands for all leading dimensions of tokens. They may be sharded over any axes.
* Dimensions in `Operation.whole` are never sharded: an operand that is sharded there is gathered.
* All others may be sharded. A result that lacks a dimension is a sum over it, and devices add their parts.

An axis that shards several dimensions shards the first of `t` and the others in the order in which they appear; in the
other dimensions it is gathered, as in FSDP.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning  # experimental; as of jax 0.12
from jax.sharding import AbstractMesh, NamedSharding, reshard, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import Axes, as_varying, is_explicit, mesh_of, varying_axes
from jliger.core.vmap import vmappable

# Otherwise the callback's address is part of the program's key in the persistent compilation cache.
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)

Results = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation on one device's arrays, and the dimensions of its operands and results.

    Attributes:
      function: called as `function(config, dtypes, *operands)`; returns one array for each result. It is a function of
        a module, so that equal operations are equal keys in caches.
      config: what else it depends on.
      operands: the dimensions of each operand, such as `"th"`. The first operand has tokens.
      results: the dimensions of each result.
      dtypes: the dtype of each result. `function` gets wider ones for the results that devices have to add up.
      whole: dimensions that are never sharded.
    """

    function: Callable[..., Results]
    config: Hashable
    operands: tuple[str, ...]
    results: tuple[str, ...]
    dtypes: tuple[Any, ...]
    whole: str

    def summed(self, result: int) -> list[str]:
        """The dimensions that a result is a sum over."""
        return [dim for dim in dict.fromkeys("".join(self.operands)) if dim not in self.results[result]]


class _Call:
    """An operation on operands with given dimensions of `jax.vmap`.

    Attributes:
      operation: the operation.
      batched: for each `vmap`, from the outermost, which operands it batches.
      token_ndim: the number of leading dimensions of tokens.
    """

    def __init__(self, operation: Operation, batched: tuple[tuple[bool, ...], ...], token_ndim: int):
        self.operation, self.batched, self.token_ndim = operation, batched, token_ndim

    def names(self, dims: str, has: Sequence[bool]) -> list[str]:
        """One name for each dimension of an array: e0, e1, ... for examples, t0, t1, ... for tokens."""
        examples = [f"e{level}" for level, flag in enumerate(has) if flag]
        tokens = [f"t{dim}" for dim in range(self.token_ndim)]
        return [*examples, *(name for dim in dims for name in (tokens if dim == "t" else [dim]))]

    @property
    def operand_names(self) -> list[list[str]]:
        has = zip(*self.batched, strict=True) if self.batched else [()] * len(self.operation.operands)
        return [self.names(dims, flags) for dims, flags in zip(self.operation.operands, has, strict=True)]

    @property
    def result_names(self) -> list[list[str]]:
        return [self.names(dims, [True] * len(self.batched)) for dims in self.operation.results]

    def run_here(self, axes: Mapping[str, Axes], *operands: Array) -> Results:
        """Runs the operation on one device's operands. `axes` shard the dimensions of these names."""
        operation = self.operation

        def over(result: int) -> Axes:
            dims = operation.summed(result)
            return tuple(axis for name, own in axes.items() if name[0] in dims for axis in own)

        sums = [over(result) for result in range(len(operation.results))]
        dtypes = tuple(
            accumulator_dtype(dtype) if own else dtype for own, dtype in zip(sums, operation.dtypes, strict=True)
        )
        run = functools.partial(operation.function, operation.config, dtypes)
        parts = _examples(run, operation, self.batched, operands)
        return tuple(
            (jax.lax.psum(part, own) if own else part).astype(dtype)
            for part, own, dtype in zip(parts, sums, operation.dtypes, strict=True)
        )

    def axes(self, sizes: Mapping[str, int], sharded: Sequence[tuple[tuple[int, ...], Any]]) -> dict[str, Axes]:
        """The axes that shard each dimension, from the shapes and specs of the operands."""
        result: dict[str, Axes] = {}
        found = [entry for names, array in zip(self.operand_names, sharded, strict=True) for entry in
                 zip(names, _entries(*array), array[0], strict=True)]  # fmt: skip
        # Examples first, then tokens, then the rest.
        for name, entry, size in sorted(found, key=lambda one: {"e": 0, "t": 1}.get(one[0][0], 2)):
            used = {axis for axes in result.values() for axis in axes}
            own = tuple(axis for axis in entry if axis not in used and axis in sizes)
            count = 1
            for axis in own:
                count *= sizes[axis]
            if name not in self.operation.whole and own and not result.get(name) and size % count == 0:
                result[name] = own
        return result


def run(operation: Operation, *operands: Array) -> Results:
    """Runs the operation on arrays of any sharding, in a `shard_map` or not, under `jax.vmap` or not."""

    def run_batched(batched: tuple[tuple[bool, ...], ...], *operands: Array) -> Results:
        first = sum(level[0] for level in batched)
        call = _Call(operation, batched, operands[0].ndim - first - (len(operation.operands[0]) - 1))
        return _run_call(call, operands)

    return vmappable(run_batched)(*operands)


def _run_call(call: _Call, operands: tuple[Array, ...]) -> Results:
    mesh = mesh_of(*operands)
    if mesh.manual_axes:
        # With `check_vma=True`, loops and kernels need operands that vary over the same axes.
        axes = frozenset().union(*map(varying_axes, operands))
        operands = tuple(as_varying(operand, axes) for operand in operands)
    if is_explicit(mesh) and (not mesh.manual_axes or any(map(_is_spread, operands))):
        return _run_explicit(call, mesh, operands)
    if not mesh.manual_axes and jax.device_count() > 1 and call.token_ndim:
        operation = call.operation
        return _partitioned(operation, call.batched, call.token_ndim)(*operands)
    return call.run_here({}, *operands)


def _run_explicit(call: _Call, mesh: AbstractMesh, operands: tuple[Array, ...]) -> Results:
    """Runs the operation in a `shard_map` whose specs follow from the shardings in the operands' types."""
    sizes = {axis: mesh.shape[axis] for axis in mesh.explicit_axes}
    axes = call.axes(sizes, [(operand.shape, jax.typeof(operand).sharding.spec) for operand in operands])
    in_specs = tuple(_spec(axes, names) for names in call.operand_names)
    operands = tuple(
        reshard(operand, NamedSharding(mesh, spec)) for operand, spec in zip(operands, in_specs, strict=True)
    )
    mapped = jax.shard_map(
        functools.partial(call.run_here, axes),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=tuple(_spec(axes, names) for names in call.result_names),
        # Inside another `shard_map` its manual axes must not be named again.
        axis_names={axis for own in axes.values() for axis in own} if mesh.manual_axes else set(),
        check_vma=False,  # `run_here` does every reduction itself
    )
    results = mapped(*operands)
    varying = frozenset().union(*map(varying_axes, operands))
    return tuple(as_varying(result, varying) for result in results)


@functools.cache
def _partitioned(
    operation: Operation, batched: tuple[tuple[bool, ...], ...], token_ndim: int
) -> Callable[..., Results]:
    """The operation as one that XLA partitions: it chooses shardings and calls `partition`.

    Cached, so that equal operations are the same operation to JAX's caches.
    """
    call = _Call(operation, batched, token_ndim)

    @custom_partitioning
    def whole(*operands: Any) -> Results:
        return call.run_here({}, *operands)

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        del results
        # A single-device sharding has no spec.
        sharded = [(operand.shape, getattr(operand.sharding, "spec", ())) for operand in operands]
        axes = call.axes(dict(mesh.shape), sharded)
        return (
            mesh,
            _without_mesh(functools.partial(call.run_here, axes)),
            tuple(NamedSharding(mesh, _spec(axes, names)) for names in call.result_names),
            tuple(NamedSharding(mesh, _spec(axes, names)) for names in call.operand_names),
        )

    rule = ", ".join(map(" ".join, call.operand_names)) + " -> " + ", ".join(map(" ".join, call.result_names))
    special = {"need_replication_factors": tuple(operation.whole)}
    whole.def_partition(partition=partition, sharding_rule=lambda *_: (rule, special))
    return whole


def _without_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces without the caller's mesh: its Explicit axes would put shardings into reductions (jax#34811, jax 0.12)."""

    def traced(*operands: Any) -> Any:
        with use_abstract_mesh(AbstractMesh((), ())):
            return function(*operands)

    return traced


def _examples(
    function: Callable[..., Results],
    operation: Operation,
    batched: tuple[tuple[bool, ...], ...],
    operands: Sequence[Array],
) -> Results:
    """Runs `function` for each example of the enclosing `jax.vmap`s. Every result has their dimensions first.

    A `vmap` over tokens alone becomes one more dimension of tokens, if no result is a sum over tokens. Otherwise it
    becomes a loop: each example then has its own parameters, or its own gradients of them.
    """
    if not batched:
        return function(*operands)
    flags, rest = batched[0], batched[1:]
    has_tokens = ["t" in dims for dims in operation.operands]
    is_loop = not all("t" in dims for dims in operation.results) or any(
        flag and not tokens for flag, tokens in zip(flags, has_tokens, strict=True)
    )
    if not is_loop and not rest:
        (size,) = {operand.shape[0] for operand, flag in zip(operands, flags, strict=True) if flag}
        return function(
            *(
                operand if flag or not tokens else jnp.broadcast_to(operand[None], (size, *operand.shape))
                for operand, flag, tokens in zip(operands, flags, has_tokens, strict=True)
            )
        )

    def run_member(mapped: list[Array]) -> Results:
        members: Iterator[Array] = iter(mapped)
        own = [next(members) if flag else operand for operand, flag in zip(operands, flags, strict=True)]
        return _examples(function, operation, rest, own)

    return jax.lax.map(run_member, [operand for operand, flag in zip(operands, flags, strict=True) if flag])


def _entries(shape: tuple[int, ...], spec: Any) -> list[Axes]:
    """The axes of each dimension."""
    entries = [*spec, *(None,) * (len(shape) - len(spec))]
    return [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in entries]


def _spec(axes: Mapping[str, Axes], names: Sequence[str]) -> P:
    return P(*(axes.get(name) or None for name in names))


def _is_spread(array: Array) -> bool:
    """Whether Explicit axes shard the array."""
    return any(entry is not None for entry in jax.typeof(array).sharding.spec)
