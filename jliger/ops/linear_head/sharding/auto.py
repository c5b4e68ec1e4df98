"""Auto axes: XLA chooses the shardings and calls `partition`, which returns the program of one device."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning  # experimental; as of jax 0.12
from jax.sharding import AbstractMesh, NamedSharding, use_abstract_mesh

from jliger.core.meshes import mesh_of
from jliger.ops.linear_head.sharding.examples import shape_to_save
from jliger.ops.linear_head.sharding.passes import LossPass, Result, dims_of_operands, dims_of_results
from jliger.ops.linear_head.sharding.plan import Plan, local_plan
from jliger.ops.linear_head.sharding.shard import run_on_shard
from jliger.ops.linear_head.types import DIMS, Operands, operand_dims
from jliger.ops.logits.objectives import LossArrays

# Otherwise the callback's address is part of the program's key in the persistent compilation cache, and no process
# would find what another one compiled.
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)


_DIMS = frozenset("tu").union(*DIMS.values())


def run_partitioned(loss_pass: LossPass, operands: Operands, arrays: LossArrays) -> Result:
    """Runs `run_on_shard` on each device, with the shardings that XLA chooses."""
    if loss_pass.saves_some:
        # Without a mesh in scope or in the types, tokens may be on one device, or on all: the budget is shared out.
        mesh = mesh_of(operands.hidden, operands.kernel, operands.labels)
        num_devices, shares = (jax.device_count(), jax.device_count()) if mesh.empty else (mesh.size, 1)
        shape = shape_to_save(loss_pass, operands, arrays, num_devices, shares)
        loss_pass = dataclasses.replace(loss_pass, saved_shape=shape)
    leaves, tree = jax.tree.flatten((operands, arrays))
    dims = tuple(jax.tree.leaves(dims_of_operands(loss_pass, operands, arrays)))
    labels = dims.index(DIMS["labels"])
    token_shape = leaves[labels].shape[sum(loss_pass.examples_of(labels)) :]
    parts = loss_pass.saved_shape
    if operands.logit_rows is not None:
        parts = operands.logit_rows.shape[-1 - len(token_shape) :]
    # `zip` leaves out the last dimension of logits that are kept, which is not one of tokens.
    saved = tuple((part, size // part) for size, part in zip(token_shape, parts or (), strict=False))
    results = _partitioned(loss_pass, tree, dims, len(token_shape), saved)(*leaves)
    return jax.tree.unflatten(jax.tree.structure(dims_of_results(loss_pass)), results)


@functools.cache
def _partitioned(
    loss_pass: LossPass, tree: Any, dims: tuple[str, ...], token_ndim: int, saved: tuple[tuple[int, int], ...]
) -> Callable[..., Any]:
    """The pass as one operation that XLA partitions; tokens have `token_ndim` leading dimensions.

    If logits are kept within a budget, their first dimensions are parts of the tokens' dimensions, sharded like them:
    `saved` has the size of each part, and by what it is to be multiplied for that of the whole dimension.

    Cached, so that equal passes are the same operation to JAX's caches.
    """
    result_dims = tuple(jax.tree.leaves(dims_of_results(loss_pass)))
    kernel_dims = operand_dims(loss_pass.config)["kernel"]
    examples = [loss_pass.examples_of(index) for index in range(len(dims))]

    def run_on(plan: Plan, sizes: Mapping[str, int], *leaves: Any) -> tuple[Any, ...]:
        local_pass = loss_pass
        if loss_pass.saved_shape is not None:
            *parts, rest = loss_pass.saved_shape
            shares = [math.prod(sizes[axis] for axis in axes) for axes in plan.batch or [()] * token_ndim]
            local_shape = (*(part // share for part, share in zip(parts, shares, strict=True)), rest)
            local_pass = dataclasses.replace(loss_pass, saved_shape=local_shape)
        return tuple(jax.tree.leaves(run_on_shard(local_pass, plan, *tree.unflatten(leaves))))

    @custom_partitioning
    def whole(*leaves: Any) -> tuple[Any, ...]:
        return run_on(local_plan(()), {}, *leaves)

    def partition(mesh: Any, leaves: Any, results: Any) -> Any:
        # XLA has also chosen the sharding of the kernel's gradient: its axes decide what the sum is scattered over.
        kernel_grad = _sharded(results[result_dims.index(kernel_dims)]) if kernel_dims in result_dims else None
        plan = Plan.of_operands(loss_pass, dict(mesh.shape), dims, [*map(_sharded, leaves)], kernel_grad)
        return (
            mesh,
            _without_mesh(functools.partial(run_on, plan, dict(mesh.shape))),
            tuple(NamedSharding(mesh, plan.spec(its_dims, is_result=True)) for its_dims in result_dims),
            tuple(NamedSharding(mesh, spec) for spec in map(plan.spec, dims, examples)),
        )

    tokens = [f"t{dim}" for dim in range(token_ndim)]
    for dim, (part, rest) in enumerate(saved):
        # A factor of size 1 must not be one of several.
        tokens[dim] = f"k{dim}" if rest == 1 else f"t{dim}" if part == 1 else f"(k{dim} t{dim})"

    def factors(its_dims: str, has: Sequence[bool]) -> str:
        """The dimensions in a Shardy rule: e0, e1, ... for examples; t0, t1, ... for leading dimensions of tokens."""
        lead = [f"e{level}" for level, flag in enumerate(has) if flag]
        return " ".join([*lead, *(name for dim in its_dims for name in _factors_of(dim, tokens, loss_pass.row_ndim))])

    rule = ", ".join(map(factors, dims, examples)) + " -> "
    rule += ", ".join(factors(its_dims, [True] * len(loss_pass.examples)) for its_dims in result_dims)
    # Contracted dimensions are replicated: every device computes whole dot products. So are the tokens of a row, and
    # dimensions that only the arrays of a loss have. Columns, if no result has them, are a reduction, which
    # `run_on_shard` does itself.
    whole_tokens = tokens[token_ndim - loss_pass.row_ndim :]
    names = dict.fromkeys(re.findall("[a-z0-9]+", rule))  # in the order that Shardy wants
    inner = tuple(name for name in names if name in {*"hrgkn", *whole_tokens} or name.startswith("x"))
    special: dict[str, Any] = {"need_replication_factors": inner}
    special |= {f"t{dim}": rest for dim, (part, rest) in enumerate(saved) if part > 1 and rest > 1}
    if not any("v" in its_dims for its_dims in result_dims):
        special["reduction_factors"] = ("v",)
    whole.def_partition(partition=partition, sharding_rule=lambda *_: (rule, special))
    return whole


def _factors_of(dim: str, tokens: Sequence[str], row_ndim: int) -> Sequence[str]:
    """The names of a dimension in a Shardy rule, which are made of ASCII letters and numbers."""
    if dim in "tu":
        return tokens if dim == "t" else tokens[: len(tokens) - row_ndim]
    if dim == "k":
        return [*(f"k{index}" for index in range(len(tokens))), "k"]
    return [dim if dim in _DIMS else f"x{ord(dim)}"]


def _sharded(array: Any) -> tuple[tuple[int, ...], Any]:
    """The shape and the PartitionSpec of an array."""
    # A single-device sharding has no spec.
    return array.shape, getattr(array.sharding, "spec", ())


def _without_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces without the caller's mesh: its Explicit axes would put shardings into reductions (jax#34811, jax 0.12)."""

    def traced(*operands: Any) -> Any:
        with use_abstract_mesh(AbstractMesh((), ())):
            return function(*operands)

    return traced
