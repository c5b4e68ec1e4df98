"""Chooses how to distribute a pass, by the type of the mesh axes: Manual, Explicit or Auto."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, get_abstract_mesh, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jliger.core.meshes import Axes, as_replicated, as_varying, is_explicit, mesh_of, replicated, varying_axes
from jliger.ops.linear_head.sharding.passes import LossPass, Result, dims_of_operands, dims_of_results
from jliger.ops.linear_head.sharding.plan import Plan, as_axes, first_column, local_plan
from jliger.ops.linear_head.sharding.shard import run_on_shard
from jliger.ops.linear_head.types import DIMS, Differentiable, Gradients, HeadConfig, Operands
from jliger.ops.logits.objectives import LossArrays


def run(loss_pass: LossPass, operands: Operands, arrays: LossArrays, *, partition: bool = True) -> Result:
    """Runs the pass on tokens with any leading dimensions and operands of any sharding.

    `custom_partitioning` has no derivative. Without `partition`, XLA partitions the loops over Auto axes itself. That
    has derivatives, but may gather operands.
    """
    mesh = mesh_of(operands.hidden, operands.kernel, operands.labels)
    if mesh.manual_axes:
        return _run_manual(loss_pass, mesh, operands, arrays)
    if is_explicit(mesh):
        return _run_explicit(loss_pass, mesh, operands, arrays)
    if partition and jax.device_count() > 1 and operands.labels.ndim:
        from jliger.ops.linear_head.sharding.auto import run_partitioned

        return run_partitioned(loss_pass, operands, arrays)
    return run_on_shard(loss_pass, local_plan(()), operands, arrays)


def vocab_size(config: HeadConfig, kernel: Array) -> int:
    """The size of the whole vocabulary. Inside a user's `shard_map` the kernel may have only this device's columns."""
    _check_vocab_axes(config, kernel)
    size = kernel.shape[config.vocab_dim]
    for axis in config.vocab_axes:
        size *= jax.lax.axis_size(axis)
    if config.vocab_size is None:
        return size
    if config.vocab_size > size:
        raise ValueError(
            f"vocab_size got {config.vocab_size}; pass at most {size}, the number of the kernel's columns."
        )
    return config.vocab_size


def label_weights(
    config: HeadConfig, class_weights: Float[Array, " V"], labels: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """`w_y` per token; arbitrary for an invalid label."""
    if config.vocab_axes:
        columns = labels - first_column(config.vocab_axes, class_weights.size)
        here = (columns >= 0) & (columns < class_weights.size)
        return jax.lax.psum(jnp.where(here, class_weights.at[columns].get(mode="clip"), 0), config.vocab_axes)
    mesh = mesh_of(labels, class_weights)
    if is_explicit(mesh):
        whole = reshard(class_weights, NamedSharding(mesh, P(None)))
        spec = NamedSharding(mesh, jax.typeof(labels).sharding.spec)
        return whole.at[labels].get(mode="clip", out_sharding=spec)
    return class_weights.at[labels].get(mode="clip")


def total_class_weight(config: HeadConfig, class_weights: Float[Array, " V"]) -> Float[Array, ""]:
    """`Σ_v w_v` over all columns that exist."""
    if config.vocab_size is not None:
        column = first_column(config.vocab_axes, class_weights.size) + jnp.arange(class_weights.size)
        class_weights = jnp.where(column < config.vocab_size, replicated(class_weights), 0)
    total = class_weights.sum()
    return jax.lax.psum(total, config.vocab_axes) if config.vocab_axes else total


def undo_cotangent_split(config: HeadConfig, cotangent: Array) -> Array:
    """Undoes `check_vma=False`'s division of a replicated output's cotangent, by psum."""
    axes = _untyped_vocab_axes(config)
    return jax.lax.psum(cotangent, axes) if axes else cotangent


def pre_divide_cotangent(config: HeadConfig, cotangent: Array) -> Array:
    """Divides by the axis sizes, since `check_vma=False` will sum this cotangent over devices."""
    return functools.reduce(lambda ct, axis: ct / jax.lax.axis_size(axis), _untyped_vocab_axes(config), cotangent)


def _run_manual(loss_pass: LossPass, mesh: AbstractMesh, operands: Operands, arrays: LossArrays) -> Result:
    """Runs the pass inside a user's `shard_map`.

    Explicit axes that the `shard_map` does not use may shard the operands further.
    """
    # With `check_vma=True`, the carry of a loop must have the same varying axes before and after each step. So all
    # operands are cast to vary over every axis that any of them varies over.
    leaves = jax.tree.leaves((operands, arrays))
    axes = frozenset().union(*map(varying_axes, leaves))
    # Arrays that a loss closes over are no carry, and its program has operations on them alone.
    own = (operands, arrays._replace(shared=()))
    operands, cast = jax.tree.map(lambda leaf: as_varying(leaf, axes), own)
    arrays = cast._replace(shared=arrays.shared)
    vocab_axes = loss_pass.config.vocab_axes
    if any(map(_is_spread, leaves)):
        _check_vocab_axes(loss_pass.config, *leaves)
        result = _run_explicit(loss_pass, mesh, operands, arrays)
        return jax.tree.map(lambda leaf: as_varying(leaf, axes), result)
    result = run_on_shard(loss_pass, local_plan(vocab_axes), operands, arrays)
    # Statistics are merged over the vocabulary axes, but the loop carry made their types vary.
    stats, losses = jax.tree.map(functools.partial(as_replicated, vocab_axes), (result.stats, result.losses))
    return result._replace(stats=stats, losses=losses)


def _run_explicit(loss_pass: LossPass, mesh: AbstractMesh, operands: Operands, arrays: LossArrays) -> Result:
    """Runs the pass in a `shard_map` whose specs follow from the shardings in the operands' types."""

    def sharded(array: Array) -> tuple[tuple[int, ...], P]:
        return array.shape, jax.typeof(array).sharding.spec

    leaves, tree = jax.tree.flatten((operands, arrays))
    dims = jax.tree.leaves(dims_of_operands(loss_pass, operands, arrays))
    sizes = {axis: mesh.shape[axis] for axis in mesh.explicit_axes}
    plan = Plan.of_operands(loss_pass, sizes, dims, [*map(sharded, leaves)])
    hidden_index = dims.index(DIMS["hidden"])
    _check_whole_rows(loss_pass, plan, leaves[hidden_index], sum(loss_pass.examples_of(hidden_index)))
    in_specs = tuple(plan.spec(its_dims, loss_pass.examples_of(index)) for index, its_dims in enumerate(dims))
    out_specs = jax.tree.map(functools.partial(plan.spec, is_result=True), dims_of_results(loss_pass))
    leaves = [reshard(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, in_specs, strict=True)]

    def run_here(*leaves: Array) -> Result:
        return run_on_shard(loss_pass, plan, *tree.unflatten(leaves))

    # An empty set means all axes except those of an enclosing `jax.vmap`. Inside another
    # `shard_map` its manual axes must not be named again, so the axes that are used are named.
    axes = {axis for spec in in_specs for entry in spec for axis in as_axes(entry)}
    # `run_on_shard` does every reduction itself, so `check_vma` is off and `out_specs` declare the results' shardings.
    mapped = jax.shard_map(
        run_here,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=axes if mesh.manual_axes else set(),
        check_vma=False,
    )
    result = mapped(*leaves)
    return result if result.grads is None else result._replace(grads=_sharded_like(mesh, plan, result.grads, operands))


def _check_whole_rows(loss_pass: LossPass, plan: Plan, hidden: Array, num_examples: int) -> None:
    """Raises if an axis shards the tokens of a row; the first dimensions of `hidden` are those of `jax.vmap`."""
    spec = jax.typeof(hidden).sharding.spec[num_examples:]
    of_rows = spec[len(plan.batch) - loss_pass.row_ndim : len(plan.batch)]
    axes = tuple(axis for entry in of_rows for axis in as_axes(entry) if axis not in plan.single)
    if axes:
        raise NotImplementedError(
            f"hidden got rows (units='rows', pairs, or ratios of sequences) sharded over {', '.join(map(repr, axes))}; "
            "all tokens of a row must be on one device: jax.sharding.reshard hidden, so that only its first axis is "
            "sharded."
        )


def _sharded_like(mesh: AbstractMesh, plan: Plan, grads: Gradients, operands: Operands) -> Gradients:
    """Gives the gradients the shardings of their operands. They differ where the plan leaves out an axis."""

    def like(grad: Array | None, primal: Array | None) -> Array | None:
        if grad is None or primal is None:
            return None
        spec = plan.spec_like(jax.typeof(primal).sharding.spec, grad.ndim - len(plan.examples))
        return reshard(grad, NamedSharding(mesh, spec))

    return Differentiable(*map(like, grads, operands.differentiable))


def _untyped_vocab_axes(config: HeadConfig) -> Axes:
    """The vocabulary axes of a `shard_map` with `check_vma=False`, in which types do not record varying axes."""
    return tuple(axis for axis in config.vocab_axes if axis not in varying_axes(jax.lax.axis_index(axis)))


def _check_vocab_axes(config: HeadConfig, *arrays: Array) -> None:
    if config.vocab_axes and any(map(_is_spread, arrays)):
        raise NotImplementedError(
            f"vocab_axis_name got {config.vocab_axes} with arrays that are sharded over Explicit axes, among "
            f"{get_abstract_mesh().explicit_axes}; make the shard_map manual over these axes too."
        )


def _is_spread(array: Array) -> bool:
    """Whether Explicit axes shard the array."""
    return any(entry is not None for entry in jax.typeof(array).sharding.spec)
