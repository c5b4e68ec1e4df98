"""Gradient accumulation on several devices: each sums its own microbatches; one reduction follows after the last.

`jax.shard_map`, `jax.lax.pcast` and `manual_axis_type` are those of jax 0.12.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jliger.core.dtypes import accumulator_dtype

Axes = tuple[str, ...]
Tree = Any


class Placement(NamedTuple):
    """How the gradient of one differentiated array is reduced over the devices that shard the batch.

    Attributes:
      scattered: for each dimension, the batch axes that shard it (FSDP); the gradient is scattered over them.
      summed: the other batch axes; the gradient is summed over them.
      by_slices: whether to sum and then slice, which XLA may fuse into a reduce-scatter. An explicit reduce-scatter
        would first gather the dimensions that other axes shard.
      others: the sharding over Auto axes that don't shard the batch; None if there is none.
    """

    scattered: tuple[Axes, ...]
    summed: Axes
    by_slices: bool = False
    others: P | None = None

    def spread(self, gradient: Array) -> Array:
        """Constrains a gradient, or a partial sum of it, to the sharding over other axes: XLA might replicate it."""
        return gradient if self.others is None else jax.lax.with_sharding_constraint(gradient, self.others)

    def total(self, gradient: Array) -> Array:
        """The sum of all devices' gradients, sharded like the array."""
        spread = [(dim, axes) for dim, axes in enumerate(self.scattered) if axes]
        if not self.by_slices:
            for dim, axes in spread:
                gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True)
            return self.spread(jax.lax.psum(gradient, self.summed) if self.summed else gradient)
        gradient = jax.lax.psum(gradient, self.summed + tuple(axis for _, axes in spread for axis in axes))
        for dim, axes in spread:
            size = gradient.shape[dim] // math.prod(map(jax.lax.axis_size, axes))
            gradient = jax.lax.dynamic_slice_in_dim(gradient, jax.lax.axis_index(axes) * size, size, dim)
        return self.spread(gradient)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that shard the batch, for use inside a `shard_map`.

    Attributes:
      axes: the manual mesh axes that shard the batch; empty on one device, and if XLA shards the batch.
      placements: one for each differentiated array.
    """

    axes: Axes
    placements: tuple[Placement, ...]

    def own(self, tree: Tree) -> Tree:
        """Casts differentiated arrays to vary over the batch axes, so that their gradients stay per device."""
        # Otherwise the transpose of the cast would psum the gradient in every microbatch.
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(
            _as_varying(leaf, place.summed) for place, leaf in zip(self.placements, leaves, strict=True)
        )

    def no_gradients(self, tree: Tree) -> Tree:
        """Zeros with the shapes of the gradients, in the accumulator dtype."""
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(
            place.spread(jnp.zeros_like(leaf, accumulator_dtype(leaf.dtype)))
            for place, leaf in zip(self.placements, leaves, strict=True)
        )

    def total_gradients(self, tree: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(place.total(leaf) for place, leaf in zip(self.placements, leaves, strict=True))

    def total(self, array: Array) -> Array:
        """The sum over devices. An array whose type says that it is replicated is left as it is."""
        axes = tuple(axis for axis in self.axes if axis in _varying(array) or not _is_typed(axis))
        return jax.lax.psum(array, axes) if axes else array


def here(batch_axes: Axes, differentiated: Tree, batch: Tree) -> Devices:
    """The devices inside a user's `shard_map`, or on one device: over `batch_axes`, and axes the batch varies over."""
    varying = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(batch)))
    axes = (*batch_axes, *sorted(varying - set(batch_axes)))
    placements = tuple(
        Placement((), tuple(axis for axis in axes if axis not in _varying(leaf)))
        for leaf in jax.tree.leaves(differentiated)
    )
    return Devices(axes, placements)


def is_manual(axes: Axes) -> bool:
    """Whether the call is inside a `shard_map` over these axes.

    Raises:
      ValueError: some of the axes are manual and some are not.
    """
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    if manual & set(axes) and not manual >= set(axes):
        raise ValueError(
            f"batch_axes got {axes}, of which only {tuple(sorted(manual & set(axes)))} are manual here; name axes of "
            "one kind."
        )
    return manual >= set(axes)


# ---- our own shard_map -----------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A mesh, the axes that shard the batch, and the specs of the differentiated arrays."""

    mesh: Mesh | AbstractMesh
    axes: Axes
    specs: tuple[P, ...]

    @classmethod
    def make(cls, axes: Axes, differentiated: Tree, specs: Tree, batch: Tree) -> "Layout":
        """Makes a layout. If `specs` is None, the specs are those in the arrays' types.

        Raises:
          ValueError: the mesh has no such axis, or `specs` does not match.
        """
        mesh = _mesh_of((batch, differentiated))
        for axis in axes:
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"batch_axes got {axis!r}, which is no axis of the mesh ({mesh.axis_names}); set a mesh with "
                    "jax.set_mesh, or pass arrays that are on one."
                )
        leaves, structure = jax.tree.flatten(differentiated)
        if specs is None:
            result = [_typed_spec(leaf) for leaf in leaves]
        else:
            try:
                full = jax.tree.broadcast(specs, differentiated, is_leaf=lambda spec: spec is None)
            except ValueError as error:
                raise ValueError(f"specs got a tree that is no prefix of what is differentiated: {error}") from error
            result = [P() if spec is None else spec for spec in structure.flatten_up_to(full)]
        return cls(mesh, axes, tuple(result))

    @property
    def shares(self) -> int:
        """The number of devices that the batch's rows are sharded over."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def rows(self) -> P:
        """The spec of an array of rows."""
        return P(self.axes)

    @property
    def gradients(self) -> list[P]:
        """The spec of each gradient."""
        return [_only(spec, self.axes) for spec in self.specs]

    def devices(self) -> Devices:
        """The devices, for use inside `run`."""
        placements = []
        for spec in self.specs:
            used = {axis for entry in spec for axis in _axes_of(entry)}
            scattered = tuple(_axes_of(entry) for entry in _only(spec, self.axes))
            summed = tuple(axis for axis in self.axes if axis not in used)
            # jax 0.12 has no reduce-scatter of an array that Explicit axes shard further.
            by_slices = not used <= set(self.axes) or bool(set(self.mesh.explicit_axes) - set(self.axes))
            others = tuple(axis for axis in self.mesh.auto_axes if axis in used and axis not in self.axes)
            placements.append(Placement(scattered, summed, by_slices, _only(spec, others) if others else None))
        return Devices(self.axes, tuple(placements))

    def run(self, function: Callable[..., Any], operands: Tree, in_specs: Tree, out_specs: Tree) -> Any:
        """Runs `function` on each device's rows. Axes that are not batch axes keep their type."""
        # With `check_vma=True` the loop carries in the user's loss would need matching varying-axis types.
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.axes),
            check_vma=False,
        )
        operands = jax.tree.map(self._placed, in_specs, operands, is_leaf=lambda leaf: isinstance(leaf, P))
        # Without jit, a shard_map over only some of the mesh's axes raises (jax 0.12).
        return jax.jit(mapped)(*operands)

    def _placed(self, spec: P, tree: Tree) -> Tree:
        def placed(array: Array) -> Array:
            """Reshards over Explicit axes to match the spec, as shard_map requires; XLA handles Auto axes."""
            types = jax.typeof(array).sharding
            if not types.mesh.explicit_axes or jnp.issubdtype(array.dtype, jax.dtypes.extended):
                return array
            left = _only(types.spec, tuple(axis for axis in self.mesh.axis_names if axis not in self.axes))
            named = _only(spec, types.mesh.explicit_axes)
            entries = [_axes_of(a) + _axes_of(b) for a, b in zip(_full(named, array), _full(left, array), strict=True)]
            return jax.sharding.reshard(array, NamedSharding(types.mesh, P(*(entry or None for entry in entries))))

        return jax.tree.map(placed, tree)


def device_keys(axes: Axes, keys: Tree) -> Tree:
    """Different keys on each device, derived from keys that are the same on all."""
    return jax.tree.map(lambda key: jax.random.fold_in(key, jax.lax.axis_index(axes)), keys)


def device_state(axes: Axes, state: list[Array]) -> list[Array]:
    """State with different keys on each device."""
    return [device_keys(axes, leaf) if is_key(leaf) else leaf for leaf in state]


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is a typed PRNG key."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _mesh_of(tree: Tree) -> AbstractMesh:
    """The mesh in scope; if there is none, the mesh of the arrays' types."""
    mesh = jax.sharding.get_abstract_mesh()
    for leaf in jax.tree.leaves(tree):
        if mesh.empty:
            mesh = jax.typeof(leaf).sharding.mesh
    return mesh


def _typed_spec(array: Array) -> P:
    """The spec in an array's type, which only records Explicit axes; empty for other axes."""
    sharding = jax.typeof(array).sharding
    return sharding.spec if sharding.mesh.explicit_axes else P()


def _only(spec: P, axes: Axes) -> P:
    return P(*(tuple(axis for axis in _axes_of(entry) if axis in axes) or None for entry in spec))


def _full(spec: P, array: Array) -> tuple[Any, ...]:
    return (*spec, *(None,) * (array.ndim - len(spec)))


def _axes_of(entry: Any) -> Axes:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _varying(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _is_typed(axis: str) -> bool:
    """Whether types record which arrays vary over a manual axis. With `shard_map(check_vma=False)` they do not."""
    return axis in _varying(jax.lax.axis_index(axis))


def _as_varying(array: Array, axes: Axes) -> Array:
    missing = tuple(axis for axis in axes if _is_typed(axis) and axis not in _varying(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def zeros_of_type(like: Any) -> Array:
    """Zeros of the type of a `jax.ShapeDtypeStruct`, including its varying axes, to initialise a loop carry."""
    if like.manual_axis_type is None or not like.manual_axis_type.varying:
        return jnp.zeros_like(like)
    return jax.lax.pcast(jnp.zeros(like.shape, like.dtype), tuple(like.manual_axis_type.varying), to="varying")


def typed_like(array: Array, like: Array) -> Array:
    """Casts an array to vary over the axes that `like` varies over.

    Raises:
      ValueError: it varies over an axis that `like` does not vary over.
    """
    if extra := _varying(array) - _varying(like):
        raise ValueError(
            f"loss_fn returned a sum that is replicated over {tuple(sorted(extra))}, and a weight that varies over it; "
            "sum both over devices, or neither."
        )
    return _as_varying(array, tuple(_varying(like)))


def shared_state(axes: Axes, before: list[Array], written: list[Array | None]) -> list[Array | None]:
    """Makes state equal on all devices: means of floating-point arrays, and the original keys."""

    def shared(old: Array, new: Array | None) -> Array | None:
        if new is None or not jnp.issubdtype(new.dtype, jnp.floating):
            return old if new is not None and is_key(new) else new
        return jax.lax.pmean(new, axes)

    return [shared(old, new) for old, new in zip(before, written, strict=True)]
