"""Mesh helpers: the types of axes, and which axes an array varies over.

`manual_axis_type` and `jax.lax.pcast` are those of jax 0.12.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, get_abstract_mesh, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

Axes = tuple[str, ...]


def replicated(array: Array) -> Array:
    """Replicates a small array on an Explicit mesh, where a product requires it; unchanged on other meshes."""
    mesh = mesh_of(array)
    if not is_explicit(mesh):
        return array
    return reshard(array, NamedSharding(mesh, P(*(None,) * array.ndim)))


def with_features_of(rows: Array, parameter: Array) -> Array:
    """Gives a parameter `[H]` the sharding of the rows' last dimension on an Explicit mesh, where types must fit."""
    mesh = mesh_of(rows, parameter)
    if not is_explicit(mesh):
        return parameter
    return reshard(parameter, NamedSharding(mesh, P(jax.typeof(rows).sharding.spec[-1])))


def with_tokens_of(rows: Array, per_token: Array) -> Array:
    """Gives an array `[*B]` the sharding of the rows' leading dimensions on an Explicit mesh."""
    mesh = mesh_of(rows, per_token)
    if not is_explicit(mesh):
        return per_token
    return reshard(per_token, NamedSharding(mesh, P(*jax.typeof(rows).sharding.spec[:-1])))


def sharded_like(array: Array, other: Array) -> Array:
    """Gives an array the sharding of another on an Explicit mesh, where a cotangent must have its primal's type."""
    sharding = jax.typeof(other).sharding
    if not sharding.mesh.explicit_axes or jax.typeof(array).sharding == sharding:
        return array
    return reshard(array, sharding)


def sum_to_type(cotangent: Array, primal: Array) -> Array:
    """A cotangent of its primal's type: summed over the manual axes that it varies over and the primal does not."""
    axes = tuple(sorted(varying_axes(cotangent) - varying_axes(primal)))
    cotangent = jax.lax.psum(cotangent, axes) if axes else cotangent
    return as_varying(cotangent, varying_axes(primal))


def mesh_of(*arrays: Array) -> AbstractMesh:
    """The mesh in scope; if there is none, the mesh of the arrays' types."""
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
    """Marks an array as replicated over `axes`; its value is, but a loop carry hides that."""
    axes = tuple(axis for axis in axes if axis in varying_axes(array))
    if not axes:
        return array
    # There is no maximum of bools.
    number = array.astype(jnp.int32) if array.dtype == jnp.bool else array
    return jax.lax.pmax(number, axes).astype(array.dtype)


def varying_axes(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def as_varying(array: Array, axes: frozenset[str]) -> Array:
    missing: Axes = tuple(axes - varying_axes(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
