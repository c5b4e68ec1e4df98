"""Meshes: which axes there are, of which kind, and what varies over them."""

import jax
from jax.sharding import AbstractMesh, NamedSharding, get_abstract_mesh, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

Axes = tuple[str, ...]


def replicated(array: Array) -> Array:
    """A small array, whole on every device, where shardings are in types and a product would ask for it."""
    mesh = mesh_of(array)
    if not is_explicit(mesh):
        return array
    return reshard(array, NamedSharding(mesh, P(*(None,) * array.ndim)))


def sum_to_type(cotangent: Array, primal: Array) -> Array:
    """A cotangent as its primal's type wants it: summed over manual axes that the primal does not vary over."""
    axes = tuple(sorted(varying_axes(cotangent) - varying_axes(primal)))
    cotangent = jax.lax.psum(cotangent, axes) if axes else cotangent
    return as_varying(cotangent, varying_axes(primal))


def mesh_of(*arrays: Array) -> AbstractMesh:
    """The mesh in scope; without one, that of the arrays' types."""
    mesh = get_abstract_mesh()
    for array in arrays:
        if mesh.empty:
            mesh = jax.typeof(array).sharding.mesh
    return mesh


def is_explicit(mesh: AbstractMesh) -> bool:
    if mesh.explicit_axes and mesh.auto_axes:
        raise NotImplementedError(
            f"the mesh got Explicit axes {mesh.explicit_axes} and Auto axes {mesh.auto_axes}; make all of them of one "
            "type, or call from inside a jax.shard_map."
        )
    return bool(mesh.explicit_axes)


def as_replicated(axes: Axes, array: Array) -> Array:
    """Typed as equal on devices along these axes, as it is: a loop's carry, which varies, may have hidden that."""
    axes = tuple(axis for axis in axes if axis in varying_axes(array))
    return jax.lax.pmax(array, axes) if axes else array


def varying_axes(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def as_varying(array: Array, axes: frozenset[str]) -> Array:
    missing: Axes = tuple(axes - varying_axes(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
