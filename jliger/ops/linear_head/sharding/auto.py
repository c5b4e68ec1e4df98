"""Auto axes: XLA chooses shardings, and asks here what follows from its choice."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, use_abstract_mesh

from jliger.ops.linear_head.chunks import Head, Tokens
from jliger.ops.linear_head.sharding.passes import Form, Result, Role, operand_roles, result_roles
from jliger.ops.linear_head.sharding.plan import Plan, local_plan
from jliger.ops.linear_head.sharding.shard import run_share

# The callback's address would otherwise be part of every program's key in the persistent compilation cache.
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)

_FACTORS: dict[str, dict[Role, str]] = {
    layout: {
        "hidden": "... h",
        "token": "...",
        "kernel": kernel,
        "vocab": "v",
        "adapted": "... r",
        "adapter": "r v",
        "teacher": "... g",
        "teacher kernel hv": "g v",
        "teacher kernel vh": "v g",
        "logits": "... v",
    }
    for layout, kernel in (("hv", "h v"), ("vh", "v h"))
}


def run_partitioned(form: Form, tokens: Tokens, head: Head, per_token: Any) -> Result:
    """`run_share` on each device's share, as XLA chose it."""
    operands, tree = jax.tree.flatten((tokens, head, per_token))
    roles = tuple(jax.tree.leaves(operand_roles(form.config, tokens, head, per_token)))
    leading = tokens.labels.ndim - sum(flags[roles.index("token")] for flags in form.examples)
    results = _partitioned(form, tree, roles, leading)(*operands)
    return jax.tree.unflatten(jax.tree.structure(result_roles(form)), results)


@functools.cache
def _partitioned(form: Form, tree: Any, roles: tuple[Role, ...], leading: int) -> Callable[..., Any]:
    results = tuple(jax.tree.leaves(result_roles(form)))
    vocab_dim = form.config.vocab_dim
    # Of each operand, which dimensions of examples it has.
    examples = [[flags[index] for flags in form.examples] for index in range(len(roles))]

    def share(plan: Plan, *operands: Any) -> tuple[Any, ...]:
        tokens, head, per_token = tree.unflatten(operands)
        return tuple(jax.tree.leaves(run_share(form, plan, tokens, head, per_token)))

    @custom_partitioning
    def whole(*operands: Any) -> tuple[Any, ...]:
        return share(local_plan((), vocab_dim), *operands)

    def partition(mesh: Any, operands: Any, found: Any) -> Any:
        # Where the kernel's gradient is wanted, its sharding says over which axes its sum is to be scattered.
        kernel_grad = _sharded(found[results.index("kernel")]) if "kernel" in results else None
        plan = Plan.of_operands(form, dict(mesh.shape), roles, [*map(_sharded, operands)], kernel_grad)
        return (
            mesh,
            _without_mesh(functools.partial(share, plan)),
            tuple(NamedSharding(mesh, plan.spec(role, result=True)) for role in results),
            tuple(NamedSharding(mesh, plan.spec(role, flags)) for role, flags in zip(roles, examples, strict=True)),
        )

    def factors(role: Role, flags: Sequence[bool]) -> str:
        lead = [f"e{level}" for level, flag in enumerate(flags) if flag]
        tokens = " ".join(f"t{dim}" for dim in range(leading))
        return " ".join([*lead, _FACTORS[form.config.kernel_layout][role].replace("...", tokens)])

    rule = ", ".join(map(factors, roles, examples)) + " -> "
    rule += ", ".join(factors(role, [True] * len(form.examples)) for role in results)
    inner = [factor for factor, role in (("h", "hidden"), ("r", "adapter"), ("g", "teacher")) if role in roles]
    special: dict[str, Any] = {"need_replication_factors": tuple(inner)}
    if not {"kernel", "vocab", "adapter", "logits"} & set(results):
        special["reduction_factors"] = ("v",)
    whole.def_partition(partition=partition, sharding_rule=lambda *_: (rule, special))
    return whole


def _sharded(array: Any) -> tuple[tuple[int, ...], Any]:
    """An array's shape and spec."""
    # Arrays of one device come with a sharding that has no spec.
    return array.shape, getattr(array.sharding, "spec", ())


def _without_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces without the caller's mesh: Explicit axes of it would put shardings into reductions (jax#34811)."""

    def traced(*operands: Any) -> Any:
        with use_abstract_mesh(AbstractMesh((), ())):
            return function(*operands)

    return traced
