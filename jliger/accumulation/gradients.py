"""The loss and gradients of a batch, computed microbatch by microbatch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jliger.accumulation import devices
from jliger.accumulation.call import Call, Operands, Roles, take_apart
from jliger.accumulation.devices import Axes, Devices, Layout
from jliger.accumulation.microbatches import check_rows, merge_rows, microbatch, shares_of_rows, split_rows
from jliger.core.dtypes import accumulator_dtype
from jliger.core.reduction import weight_divisor

AuxReduction = Literal["sum", "mean", "concatenate"]
Tree = Any


class AccumulatedLoss(NamedTuple):
    """The loss of a batch, with its weight and auxiliary outputs.

    Attributes:
      loss: `Σ sum / Σ weight` over all microbatches and devices.
      weight: `Σ weight`.
      aux: the reduced third result of `loss_fn`; None if it returns two.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    aux: Any = None


def accumulate_gradients(
    loss_fn: Callable[..., tuple[Any, ...]],
    num_microbatches: int,
    *,
    argnums: Any = 0,
    batch_argnums: int | Sequence[int] = 1,
    key_argnums: int | Sequence[int] = (),
    aux_reduction: Any = "sum",
    batch_axes: str | Sequence[str] = (),
    specs: Any = None,
) -> Callable[..., tuple[AccumulatedLoss, Any]]:
    r"""`jax.value_and_grad` of a batch's mean loss, computed in a loop over microbatches.

    `loss_fn` returns the sum of a microbatch's token losses and the sum of their weights (usually the number of counted
    tokens). The result is

    $$\mathrm{loss} = \frac{\sum_i \mathrm{sum}_i}{\sum_i \mathrm{weight}_i}, \qquad
      \mathrm{gradient} = \frac{\sum_i \nabla \mathrm{sum}_i}{\sum_i \mathrm{weight}_i}$$

    which equals the whole batch's loss and gradient up to rounding, for any distribution of tokens. The mean of the
    microbatches' means does not: it gives tokens of a microbatch with few tokens more weight.

    Sums over microbatches are float32 (float64 for float64). The returned gradients have the dtype of their argument.
    In addition to the memory of one microbatch, only these sums are needed, whatever `num_microbatches` is. Each
    microbatch differentiates its mean, and the result is then multiplied by the weight, so that float16 gradients do
    not overflow earlier than those of the whole batch. A total weight of 0 gives loss 0 and gradient 0, if the sums are
    0. The weight has no gradient.

    The i-th of n microbatches has the rows i, i + n, i + 2n, …. A device with consecutive rows of the batch then has
    equally many rows of each microbatch, and no rows move between devices.

    **Several devices.** If mesh axes are Auto or Explicit, name those that shard the batch's rows in `batch_axes`. Each
    device then sums the gradients of its own microbatches, and each gradient is reduced over devices once, after the
    last microbatch. The reduction is an all-reduce, or a reduce-scatter if these axes also shard the argument (FSDP).
    Such an argument is gathered once, before the first microbatch, and each device holds the sum of its whole gradient:
    one reduce-scatter per step costs this memory. To trade memory for communication, leave FSDP axes out of
    `batch_axes`; XLA then reduces over them in every microbatch. `loss_fn` gets the rows of one device. It runs in a
    `jax.shard_map` over the batch axes, and cannot use these in sharding constraints. Inside the caller's own
    `jax.shard_map`, types record the axes that the batch varies over, so `batch_axes` is only needed with
    `check_vma=False`. Arguments that are neither split nor differentiated are replicated on each device.

    **Modules.** A `flax.nnx.Module` among `argnums` is differentiated with respect to its `nnx.Param`, as in
    `nnx.value_and_grad`; `nnx.DiffState(argnum, filter)` selects other variables. All other variables, such as batch
    statistics and counts of random numbers, pass from one microbatch to the next, so that dropout differs between
    microbatches. The module keeps their last values. With `batch_axes`, its keys differ between devices, and its
    floating-point state is averaged over devices. Parameters of `flax.linen` are a tree like any other.

    Args:
      loss_fn: returns `(sum, weight)` or `(sum, weight, aux)`: two scalars, and a tree of arrays.
      num_microbatches: the number of microbatches, which must divide the rows of each device.
      argnums: positions of the arguments to differentiate, as in `jax.value_and_grad`: an integer, or several.
      batch_argnums: positions of the arguments to split: trees of arrays `[rows, ...]`.
      key_argnums: positions of PRNG keys, or of trees of keys. Each microbatch gets different keys.
      aux_reduction: how `aux` is reduced: `"sum"`; `"mean"`, weighted like the loss; or `"concatenate"`, for arrays
        `[rows, ...]`, whose rows are returned in the batch's order. One of these, or a tree of them that is a prefix of
        `aux`. Sums and means of floating-point numbers are float32.
      batch_axes: the mesh axes that shard the batch's rows, the major axis first. Gradients are reduced over them once.
      specs: with `batch_axes`, the shardings of the differentiated arguments: a tree of `PartitionSpec`, or a prefix of
        one (for several `argnums`, a tuple of these). None if no batch axis shards them, or if axes are Explicit.

    Returns:
      A function of `loss_fn`'s arguments that returns an `AccumulatedLoss` and the gradients: a tree like the argument,
      or a tuple of trees for several `argnums`; an `nnx.State` for a module.

    Raises:
      ValueError: the number of microbatches does not divide the rows, an argument has two roles, or an axis is unknown.
      TypeError: `loss_fn` does not return two or three results, or an argument cannot be differentiated.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> def loss_fn(params, batch):
      ...     hidden = jnp.tanh(batch["x"] @ params["body"])
      ...     loss, metrics = jliger.fused_linear_cross_entropy(
      ...         hidden, params["head"], batch["labels"], reduction="sum", return_metrics=True
      ...     )
      ...     return loss, metrics.weight, {"accuracy": metrics.accuracy}
      >>> params = {"body": jnp.eye(4), "head": jax.random.normal(jax.random.key(0), (4, 9))}
      >>> labels = jnp.array([[1, 2, 3], [4, -100, -100], [5, 6, 7], [8, 0, -100]])
      >>> batch = {"x": jax.random.normal(jax.random.key(1), (4, 3, 4)), "labels": labels}
      >>> step = jax.jit(jliger.accumulate_gradients(loss_fn, num_microbatches=2, aux_reduction="mean"))
      >>> (loss, weight, aux), grads = step(params, batch)
      >>> (whole, _, _), whole_grads = jliger.accumulate_gradients(loss_fn, 1)(params, batch)
      >>> print(weight, bool(jnp.allclose(loss, whole)), bool(jnp.allclose(grads["head"], whole_grads["head"])))
      9.0 True True
    """
    roles = Roles.make(argnums, batch_argnums, key_argnums)
    is_single = not isinstance(argnums, Sequence)
    _check_count(num_microbatches)
    _check_reduction(aux_reduction)
    axes = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    if specs is not None and not axes:
        raise ValueError("specs got a value without batch_axes, and is only used with them; leave it out.")
    plan = _Plan(num_microbatches, aux_reduction, axes, (specs,) if is_single and specs is not None else specs)

    def value_and_gradients(*args: Any, **kwargs: Any) -> tuple[AccumulatedLoss, Any]:
        call, operands = take_apart(loss_fn, roles, args, kwargs)
        if axes and not devices.is_manual(axes):
            loss, gradients, written = _on_mesh(plan, call, operands)
        else:
            check_rows(operands.batch, num_microbatches, shares_of_rows(operands.batch))
            group = devices.here(axes, operands.differentiated, operands.batch)
            loss, gradients, written = _accumulate(plan, call, group, operands)
        call.write_state(args, _latest(operands.state, written))
        return loss, gradients[0] if is_single else gradients

    return value_and_gradients


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The options of `accumulate_gradients`, apart from the roles of arguments."""

    num_microbatches: int
    aux_reduction: Any
    axes: Axes
    specs: Any


State = list[Array | None]
"""The modules' state after a call; None for variables that the call did not change."""


class _Sums(NamedTuple):
    """The sums over the tokens of one or several microbatches.

    Attributes:
      loss: the sum of losses.
      weight: the sum of weights.
      aux: the leaves of aux that are summed; None for others.
      weighted: the leaves of aux that are averaged, multiplied by the weight; None for others.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    aux: Tree
    weighted: Tree


class _Found(NamedTuple):
    """The results of a microbatch's forward pass.

    Attributes:
      sums: the results that are summed over microbatches.
      rows: the leaves of aux that are concatenated; None for others.
      state: the modules' state after the pass.
    """

    sums: _Sums
    rows: Tree
    state: State


def _on_mesh(plan: _Plan, call: Call, operands: Operands) -> tuple[AccumulatedLoss, Tree, State]:
    """Runs `_accumulate` on each device's rows of the batch."""
    layout = Layout.make(plan.axes, operands.differentiated, plan.specs, operands.batch)
    check_rows(operands.batch, plan.num_microbatches, layout.shares)

    def share(operands: Operands) -> tuple[AccumulatedLoss, Tree, State]:
        own = operands._replace(
            keys=devices.device_keys(plan.axes, operands.keys), state=devices.device_state(plan.axes, operands.state)
        )
        loss, gradients, written = _accumulate(plan, call, layout.devices(), own)
        return loss, gradients, devices.shared_state(plan.axes, operands.state, written)

    # A spec of P() for the differentiated arrays: XLA gathers those that the batch axes shard, once, before the loop.
    in_specs = Operands._make((P(), layout.rows, P(), P(), P()))
    gradient_specs = jax.tree.structure(operands.differentiated).unflatten(layout.gradients)
    aux_specs = jax.tree.map(lambda kind: layout.rows if kind == "concatenate" else P(), plan.aux_reduction)
    out_specs = (AccumulatedLoss._make((P(), P(), aux_specs)), gradient_specs, P())
    return layout.run(share, (operands,), (in_specs,), out_specs)


def _accumulate(plan: _Plan, call: Call, group: Devices, operands: Operands) -> tuple[AccumulatedLoss, Tree, State]:
    """Loops over one device's microbatches, then reduces over all devices."""
    count = plan.num_microbatches
    operands = operands._replace(differentiated=group.own(operands.differentiated))
    batch = split_rows(operands.batch, count)
    keys = jax.tree.map(lambda key: jax.random.split(key, count), operands.keys)

    def of_microbatch(index: Int[Array, ""], state: Sequence[Array | None]) -> Operands:
        return operands._replace(
            batch=microbatch(batch, index),
            keys=jax.tree.map(lambda each: each[index], keys),
            state=_latest(operands.state, state),
        )

    # A single microbatch needs no loop, and no accumulators of its own.
    if count == 1:
        microbatch_result, gradients = _forward_and_backward(plan, call, of_microbatch(jnp.int32(0), operands.state))
        sums, state = microbatch_result.sums, microbatch_result.state
        rows = jax.tree.map(lambda array: array[None], microbatch_result.rows)
    else:
        sums, gradients, state, rows = _loop(plan, call, group, operands, of_microbatch)

    sums = jax.tree.map(group.total, sums)
    divide_by = weight_divisor(sums.weight)
    gradients = jax.tree.map(
        lambda total, like: (total / divide_by).astype(like.dtype),
        group.total_gradients(gradients),
        operands.differentiated,
    )
    aux = jax.tree.map(
        lambda total, weighted, rows: _aux(total, weighted, rows, divide_by),
        sums.aux,
        sums.weighted,
        rows,
        is_leaf=lambda leaf: leaf is None,
    )
    return AccumulatedLoss(sums.loss / divide_by, sums.weight, aux), gradients, state


def _loop(
    plan: _Plan,
    call: Call,
    group: Devices,
    operands: Operands,
    of_microbatch: Callable[[Int[Array, ""], Sequence[Array | None]], Operands],
) -> tuple[_Sums, Tree, State, Tree]:
    """Loops over microbatches; returns sums, gradients, the state after the last one, and the rows of aux of all."""

    def add(carry: tuple[_Sums, Tree, State], index: Int[Array, ""]) -> tuple[tuple[_Sums, Tree, State], Tree]:
        sums, gradients, state = carry
        microbatch_result, more = _forward_and_backward(plan, call, of_microbatch(index, state))
        sums, gradients = jax.tree.map(jnp.add, (sums, gradients), (microbatch_result.sums, more))
        return (sums, gradients, microbatch_result.state), microbatch_result.rows

    # The carry only has the state that the call changes; the rest is loop-invariant.
    types = jax.eval_shape(lambda: _forward(plan, call, of_microbatch(jnp.int32(0), operands.state)))
    start = (
        jax.tree.map(devices.zeros_of_type, types.sums),
        group.no_gradients(operands.differentiated),
        [None if after is None else before for before, after in zip(operands.state, types.state, strict=True)],
    )
    (sums, gradients, state), rows = jax.lax.scan(add, start, jnp.arange(plan.num_microbatches))
    return sums, gradients, state, rows


def _forward_and_backward(plan: _Plan, call: Call, operands: Operands) -> tuple[_Found, Tree]:
    """The results of a microbatch's forward pass, and the gradients of its sum of losses."""

    def loss_of(differentiated: Tree) -> tuple[Float[Array, ""], _Found]:
        microbatch_result = _forward(plan, call, operands._replace(differentiated=differentiated))
        return microbatch_result.sums.loss, microbatch_result

    loss, pull_back, microbatch_result = jax.vjp(loss_of, operands.differentiated, has_aux=True)
    # The gradients of its mean, multiplied by its weight in float32: those of the sum might overflow float16.
    scale = weight_divisor(microbatch_result.sums.weight)
    (gradients,) = pull_back(devices.typed_like(1 / scale, loss))
    return microbatch_result, jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype(leaf.dtype)) * scale, gradients)


def _forward(plan: _Plan, call: Call, operands: Operands) -> _Found:
    result, state = call(operands)
    loss, weight, aux = _checked(result)
    try:
        kinds = jax.tree.broadcast(plan.aux_reduction, aux)
    except ValueError as error:
        raise ValueError(f"aux_reduction got a tree that is no prefix of what loss_fn returns: {error}") from error

    def of_kind(kind: AuxReduction, value: Callable[[Array], Array]) -> Tree:
        return jax.tree.map(
            lambda microbatch_result, leaf: value(jnp.asarray(leaf)) if microbatch_result == kind else None, kinds, aux
        )

    def weighted(leaf: Array) -> Array:
        # With a weight of 0 the mean may be 0 / 0 = NaN.
        return jnp.where(weight == 0, 0, weight * leaf)

    return _Found(
        sums=_Sums(loss, weight, of_kind("sum", _wide), of_kind("mean", weighted)),
        rows=of_kind("concatenate", _of_rows),
        state=[None if after is before else after for before, after in zip(operands.state, state, strict=True)],
    )


def _latest(before: Sequence[Array], written: Sequence[Array | None]) -> list[Array]:
    return [old if new is None else new for old, new in zip(before, written, strict=True)]


def _wide(array: Array) -> Array:
    """Casts to the dtype of a sum: the accumulator dtype, or int32 for bools and small integers."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(accumulator_dtype(array.dtype))
    return jnp.sum(array[None], axis=0)


def _of_rows(array: Array) -> Array:
    if array.ndim < 1:
        raise ValueError("aux_reduction got 'concatenate' for a scalar; it is for arrays with one row per example.")
    return array


def _aux(total: Array | None, weighted: Array | None, rows: Array | None, weight: Float[Array, ""]) -> Array | None:
    """A leaf of aux, from the one of its three reductions that is not None; None if all are."""
    if total is not None:
        return total
    if weighted is not None:
        return weighted / weight
    return None if rows is None else merge_rows(rows)


def _checked(result: Any) -> tuple[Float[Array, ""], Float[Array, ""], Tree]:
    """Checks the result of `loss_fn`; returns the sum and the weight in the accumulator dtype, and aux."""
    if type(result) is not tuple or len(result) not in (2, 3):
        returned = type(result).__name__
        if type(result) is tuple:
            returned = f"{len(result)} results"
        elif isinstance(result, jax.Array):
            returned = "a single array"
        raise TypeError(f"loss_fn returned {returned}; return (sum, weight) or (sum, weight, aux).")
    scalars = []
    for name, value in zip(("sum of losses", "weight"), result, strict=False):
        if not isinstance(value, jax.Array | np.ndarray | np.generic | int | float):
            raise TypeError(f"loss_fn returned {type(value).__name__} as its {name}; return a scalar.")
        if jnp.shape(value) != ():
            raise ValueError(
                f"loss_fn returned a {name} of shape {jnp.shape(value)}; return a scalar: the sum of them."
            )
        scalars.append(jnp.asarray(value))
    loss, weight = scalars
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"loss_fn returned a sum of losses of dtype {loss.dtype}; return a floating-point number.")
    dtype = accumulator_dtype(loss.dtype)
    return loss.astype(dtype), jax.lax.stop_gradient(weight).astype(dtype), result[2] if len(result) == 3 else None


def _check_count(num_microbatches: Any) -> None:
    if isinstance(num_microbatches, bool) or not isinstance(num_microbatches, int | np.integer):
        raise TypeError(f"num_microbatches got {num_microbatches!r}; pass a Python integer.")
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches got {num_microbatches}; pass 1 or more.")


def _check_reduction(aux_reduction: Any) -> None:
    kinds = ("sum", "mean", "concatenate")
    for path, kind in jax.tree.leaves_with_path(aux_reduction):
        if kind not in kinds:
            raise ValueError(
                f"aux_reduction got {kind!r} at {jax.tree_util.keystr(path) or 'its root'}; pass one of "
                f"{', '.join(map(repr, kinds))}."
            )
