"""Loss and gradients of a batch that is gone through in microbatches."""

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
    """A batch's loss, and what came with it.

    Attributes:
      loss: `Σ sum / Σ weight` over all microbatches and devices.
      weight: `Σ weight`.
      aux: the third result of `loss_fn`, reduced; None if it has none.
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
    r"""`jax.value_and_grad` of a batch's mean loss, over microbatches of the batch in a loop.

    `loss_fn` returns the sum of its microbatch's token losses and the sum of their weights (their number, mostly), and
    the result is

    $$\mathrm{loss} = \frac{\sum_i \mathrm{sum}_i}{\sum_i \mathrm{weight}_i}, \qquad
      \mathrm{gradient} = \frac{\sum_i \nabla \mathrm{sum}_i}{\sum_i \mathrm{weight}_i}$$

    which is the whole batch's to rounding, however tokens fall. The mean of microbatches' means isn't: there, a token
    in a microbatch of few counts for more than one in a microbatch of many.

    Sums over microbatches are float32 (float64 for float64), and gradients then have their argument's dtype. Memory
    beside one microbatch's is those float32 sums, whatever `num_microbatches`. Each microbatch's gradients are taken
    as those of its mean, and weighed after, so that they fit float16 as well as a whole batch's would. A total weight
    of 0 gives loss 0 and gradient 0, if sums are 0. The weight carries no gradient.

    The i-th of n microbatches has the rows i, i + n, i + 2n, …: a device that holds some consecutive rows of the batch
    holds as many rows of each microbatch, and no row moves.

    **Several devices.** Where mesh axes are Auto or Explicit, name those that spread the batch's rows in `batch_axes`.
    Each device then adds up its own microbatches' gradients, and each gradient is summed over devices once, after the
    last microbatch: by an all-reduce, or where the argument itself is spread over these axes (FSDP) by a
    reduce-scatter. Such an argument is gathered once, before the first microbatch, and its sums are whole on each
    device: that is the price of one reduce-scatter a step. To pay in collectives instead, name only other axes: what an
    axis that isn't named has to say, XLA says in each microbatch. `loss_fn` sees the rows of one device, runs under a
    `jax.shard_map` over the named axes, and can't name these in sharding constraints. Inside a `jax.shard_map` of the
    caller's own there is nothing to name: types say what the batch varies over (with `check_vma=False` they don't).
    Arguments that are neither split nor differentiated are whole on each device.

    **Modules.** A `flax.nnx.Module` among `argnums` is differentiated in its `nnx.Param`, as by `nnx.value_and_grad`;
    `nnx.DiffState(argnum, filter)` names other variables. Whatever else it holds goes from one microbatch to the next
    (batch statistics, counts of its random numbers, so that dropout differs), and the module is left with the last
    one's. With `batch_axes`, keys that it holds differ between devices, and floating-point state is averaged over them.
    Parameters of `flax.linen` are a tree as any other.

    Args:
      loss_fn: returns `(sum, weight)` or `(sum, weight, aux)`: scalars, and a tree of arrays.
      num_microbatches: how many there are; it divides the rows of each device.
      argnums: positions of the arguments to differentiate, as in `jax.value_and_grad`: an integer, or several.
      batch_argnums: positions of the arguments to split: trees of arrays `[rows, ...]`.
      key_argnums: positions of PRNG keys, or trees of them, of which each microbatch gets its own.
      aux_reduction: what becomes of `aux`: `"sum"`; `"mean"`, weighed as the loss is; or `"concatenate"`, for arrays
        `[rows, ...]`, which come back in the batch's order. One of these, or a tree of them that is a prefix of `aux`.
        Sums and means of floating-point numbers are float32.
      batch_axes: mesh axes that spread the batch's rows, the slowest first, over which to sum once.
      specs: with `batch_axes`, how the differentiated arguments are sharded: a tree of `PartitionSpec`, or a prefix of
        one (for several `argnums`, a tuple of these). None if no batch axis spreads them, or if axes are Explicit.

    Returns:
      A function of `loss_fn`'s arguments that returns an `AccumulatedLoss` and the gradients: a tree like the argument,
      or for several `argnums` a tuple of trees; for a module, an `nnx.State`.

    Raises:
      ValueError: a number of microbatches that doesn't divide the rows, roles that clash, an unknown axis.
      TypeError: a loss that isn't two or three results, or an argument that can't be differentiated.

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
        raise ValueError("specs got a value without batch_axes, beside which alone they say something; leave them out.")
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
    """What the user asked for, beside the roles of arguments."""

    num_microbatches: int
    aux_reduction: Any
    axes: Axes
    specs: Any


State = list[Array | None]
"""A module's state after a call; None for what the call has left alone."""


class _Sums(NamedTuple):
    """Of one microbatch, or of several, all that is added up.

    Attributes:
      loss: the sum of losses.
      weight: the sum of weights.
      aux: leaves of aux that are summed, None for others.
      weighted: leaves of aux that are averaged, times the weight, None for others.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    aux: Tree
    weighted: Tree


class _Found(NamedTuple):
    """What a microbatch's forward pass finds.

    Attributes:
      sums: what is added up.
      rows: leaves of aux that are concatenated, None for others.
      state: the modules' state after it.
    """

    sums: _Sums
    rows: Tree
    state: State


def _on_mesh(plan: _Plan, call: Call, operands: Operands) -> tuple[AccumulatedLoss, Tree, State]:
    """`_accumulate` on each device's share of the batch."""
    layout = Layout.make(plan.axes, operands.differentiated, plan.specs, operands.batch)
    check_rows(operands.batch, plan.num_microbatches, layout.shares)

    def share(operands: Operands) -> tuple[AccumulatedLoss, Tree, State]:
        own = operands._replace(
            keys=devices.device_keys(plan.axes, operands.keys), state=devices.device_state(plan.axes, operands.state)
        )
        loss, gradients, written = _accumulate(plan, call, layout.devices(), own)
        return loss, gradients, devices.shared_state(plan.axes, operands.state, written)

    # What is spread over the batch's axes is gathered here, by XLA.
    in_specs = Operands._make((P(), layout.rows, P(), P(), P()))
    gradient_specs = jax.tree.structure(operands.differentiated).unflatten(layout.gradients)
    aux_specs = jax.tree.map(lambda kind: layout.rows if kind == "concatenate" else P(), plan.aux_reduction)
    out_specs = (AccumulatedLoss._make((P(), P(), aux_specs)), gradient_specs, P())
    return layout.run(share, (operands,), (in_specs,), out_specs)


def _accumulate(plan: _Plan, call: Call, group: Devices, operands: Operands) -> tuple[AccumulatedLoss, Tree, State]:
    """One device's microbatches in a loop, and then what all devices found together."""
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
    """Microbatches one after the other: what is summed, gradients, state after the last one, and all rows of aux."""

    def add(carry: tuple[_Sums, Tree, State], index: Int[Array, ""]) -> tuple[tuple[_Sums, Tree, State], Tree]:
        sums, gradients, state = carry
        microbatch_result, more = _forward_and_backward(plan, call, of_microbatch(index, state))
        sums, gradients = jax.tree.map(jnp.add, (sums, gradients), (microbatch_result.sums, more))
        return (sums, gradients, microbatch_result.state), microbatch_result.rows

    types = jax.eval_shape(lambda: _forward(plan, call, of_microbatch(jnp.int32(0), operands.state)))
    start = (
        jax.tree.map(devices.zeros_of_type, types.sums),
        group.no_gradients(operands.differentiated),
        [None if after is None else before for before, after in zip(operands.state, types.state, strict=True)],
    )
    (sums, gradients, state), rows = jax.lax.scan(add, start, jnp.arange(plan.num_microbatches))
    return sums, gradients, state, rows


def _forward_and_backward(plan: _Plan, call: Call, operands: Operands) -> tuple[_Found, Tree]:
    """A microbatch's sums, and the gradients of its sum of losses."""

    def loss_of(differentiated: Tree) -> tuple[Float[Array, ""], _Found]:
        microbatch_result = _forward(plan, call, operands._replace(differentiated=differentiated))
        return microbatch_result.sums.loss, microbatch_result

    loss, pull_back, microbatch_result = jax.vjp(loss_of, operands.differentiated, has_aux=True)
    # Those of its mean, times its weight: in float16 a sum's might not fit.
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
        # The mean of nothing may be a NaN.
        return jnp.where(weight == 0, 0, weight * leaf)

    return _Found(
        sums=_Sums(loss, weight, of_kind("sum", _wide), of_kind("mean", weighted)),
        rows=of_kind("concatenate", _of_rows),
        state=[None if after is before else after for before, after in zip(operands.state, state, strict=True)],
    )


def _latest(before: Sequence[Array], written: Sequence[Array | None]) -> list[Array]:
    return [old if new is None else new for old, new in zip(before, written, strict=True)]


def _wide(array: Array) -> Array:
    """In the dtype of its sum: of bools and small integers, int32."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(accumulator_dtype(array.dtype))
    return jnp.sum(array[None], axis=0)


def _of_rows(array: Array) -> Array:
    if array.ndim < 1:
        raise ValueError("aux_reduction got 'concatenate' for a scalar; it is for arrays that have a row an example.")
    return array


def _aux(total: Array | None, weighted: Array | None, rows: Array | None, weight: Float[Array, ""]) -> Array | None:
    """A leaf of aux, from whichever of the three it has become; of a leaf that is None, none."""
    if total is not None:
        return total
    if weighted is not None:
        return weighted / weight
    return None if rows is None else merge_rows(rows)


def _checked(result: Any) -> tuple[Float[Array, ""], Float[Array, ""], Tree]:
    """The loss's sum, its weight and aux, the first two in the dtype of sums."""
    if type(result) is not tuple or len(result) not in (2, 3):
        microbatch_result = f"{len(result)} results" if type(result) is tuple else type(result).__name__
        raise TypeError(f"loss_fn returned {microbatch_result}; return (sum, weight) or (sum, weight, aux).")
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
