"""Manual, Explicit or Auto: how a form is run where its inputs are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, get_abstract_mesh, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jliger.core.meshes import Axes, as_replicated, as_varying, is_explicit, mesh_of, varying_axes
from jliger.ops.linear_head.chunks import Grads, Head, Tokens
from jliger.ops.linear_head.sharding.passes import Form, Result, operand_roles, result_roles
from jliger.ops.linear_head.sharding.plan import Plan, as_axes, first_column, local_plan
from jliger.ops.linear_head.sharding.shard import run_share
from jliger.ops.linear_head.types import HeadConfig


def run(form: Form, tokens: Tokens, head: Head, per_token: Any) -> Result:
    """The form on tokens of any leading dimensions, wherever its operands are."""
    mesh = mesh_of(tokens.hidden, head.kernel, tokens.labels)
    if mesh.manual_axes:
        return _run_manual(form, mesh, tokens, head, per_token)
    if is_explicit(mesh):
        return _run_explicit(form, mesh, tokens, head, per_token)
    if jax.device_count() > 1 and tokens.labels.ndim:
        from jliger.ops.linear_head.sharding.auto import run_partitioned

        return run_partitioned(form, tokens, head, per_token)
    return run_share(form, local_plan((), form.config.vocab_dim), tokens, head, per_token)


def vocab_size(config: HeadConfig, kernel: Array) -> int:
    """Columns in all: a kernel inside a user's `shard_map` may have but a device's share of them."""
    _check_vocab_axes(config, kernel)
    size = kernel.shape[config.vocab_dim]
    for axis in config.vocab_axes:
        size *= jax.lax.axis_size(axis)
    return size


def label_weights(
    config: HeadConfig, class_weights: Float[Array, " V"], labels: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """`w_y` of each token; of whichever column for a label that is none."""
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
    """`Σ_v w_v` over all columns."""
    total = class_weights.sum()
    return jax.lax.psum(total, config.vocab_axes) if config.vocab_axes else total


def whole_cotangent(config: HeadConfig, cotangent: Array) -> Array:
    """The cotangent of a result that devices share, where `shard_map(check_vma=False)` has split it among them."""
    axes = _untyped_vocab_axes(config)
    return jax.lax.psum(cotangent, axes) if axes else cotangent


def split_cotangent(config: HeadConfig, cotangent: Array) -> Array:
    """What of a cotangent of hidden each device returns, where `shard_map(check_vma=False)` sums it over devices."""
    return functools.reduce(lambda ct, axis: ct / jax.lax.axis_size(axis), _untyped_vocab_axes(config), cotangent)


def _untyped_vocab_axes(config: HeadConfig) -> Axes:
    return tuple(axis for axis in config.vocab_axes if axis not in varying_axes(jax.lax.axis_index(axis)))


def _run_manual(form: Form, mesh: AbstractMesh, tokens: Tokens, head: Head, per_token: Any) -> Result:
    """Inside a user's `shard_map`: all loops carry what varies as the operands together do.

    Explicit axes that it leaves may spread operands further.
    """
    operands = (tokens, head, per_token)
    varying = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(operands)))
    tokens, head, per_token = jax.tree.map(lambda leaf: as_varying(leaf, varying), operands)
    if any(_is_spread(leaf) for leaf in jax.tree.leaves(operands)):
        _check_vocab_axes(form.config, *jax.tree.leaves(operands))
        result = _run_explicit(form, mesh, tokens, head, per_token)
        return jax.tree.map(lambda leaf: as_varying(leaf, varying), result)
    result = run_share(form, local_plan(form.config.vocab_axes, form.config.vocab_dim), tokens, head, per_token)
    return result._replace(stats=jax.tree.map(functools.partial(as_replicated, form.config.vocab_axes), result.stats))


def _run_explicit(form: Form, mesh: AbstractMesh, tokens: Tokens, head: Head, per_token: Any) -> Result:
    """Axes are in the types: a `shard_map` made from them."""

    def sharded(array: Array) -> tuple[tuple[int, ...], P]:
        return array.shape, jax.typeof(array).sharding.spec

    leaves, tree = jax.tree.flatten((tokens, head, per_token))
    roles = jax.tree.leaves(operand_roles(form.config, tokens, head, per_token))
    examples = [[flags[index] for flags in form.examples] for index in range(len(roles))]
    sizes = {axis: mesh.shape[axis] for axis in mesh.explicit_axes}
    plan = Plan.of_operands(form, sizes, roles, [*map(sharded, leaves)])
    in_specs = tree.unflatten(map(plan.spec, roles, examples))
    out_specs = jax.tree.map(lambda role: plan.spec(role, result=True), result_roles(form))
    operands = tree.unflatten(
        reshard(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, jax.tree.leaves(in_specs), strict=True)
    )

    def share(*operands: Any) -> Result:
        return run_share(form, plan, *operands)

    # Sums over devices are made, and stated, in `run_share`; what they are typed as is for `out_specs` to say.
    # All axes, but for those of a `jax.vmap` around; beside manual axes, which can't be named again, those it takes.
    axes = {axis for spec in jax.tree.leaves(in_specs) for entry in spec for axis in as_axes(entry)}
    mapped = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=axes if mesh.manual_axes else set(),
        check_vma=False,
    )
    result = mapped(*operands)
    return (
        result if result.grads is None else result._replace(grads=_like_inputs(mesh, plan, result.grads, tokens, head))
    )


def _like_inputs(mesh: AbstractMesh, plan: Plan, grads: Grads, tokens: Tokens, head: Head) -> Any:
    """Gradients sharded like their inputs, where the plan had left an axis out."""

    def like(grad: Array | None, primal: Array | None) -> Array | None:
        if grad is None or primal is None:
            return None
        spec = plan.spec_like(jax.typeof(primal).sharding.spec, grad.ndim - len(plan.examples))
        return reshard(grad, NamedSharding(mesh, spec))

    return Grads(*map(like, grads, Grads(tokens.hidden, head.kernel, head.bias, tokens.adapted, head.adapter)))


def _check_vocab_axes(config: HeadConfig, *arrays: Array) -> None:
    if config.vocab_axes and any(map(_is_spread, arrays)):
        raise NotImplementedError(
            f"vocab_axis_name got {config.vocab_axes} beside arrays that Explicit axes spread, which are among "
            f"{get_abstract_mesh().explicit_axes}; make the shard_map one over these axes too."
        )


def _is_spread(array: Array) -> bool:
    """Whether Explicit axes spread it."""
    return any(entry is not None for entry in jax.typeof(array).sharding.spec)
