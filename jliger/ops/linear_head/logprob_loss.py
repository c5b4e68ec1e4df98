"""logprob_loss: `fused_linear_loss`, any loss of log-probabilities at the cost of the cross entropy."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Required, Unpack, overload

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jaxtyping import Array, Bool, Float, Integer

from jliger.core import checks, jaxprs
from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import as_varying, varying_axes
from jliger.ops.linear_head import gradients, sharding
from jliger.ops.linear_head.adapter import LinearAdapter, with_adapter
from jliger.ops.linear_head.arguments import (
    Arguments,
    HeadOptions,
    column_validity,
    head_arguments,
    with_products,
    with_tokens,
)
from jliger.ops.linear_head.types import HeadConfig, Operands, Products
from jliger.ops.logits import StatsWanted
from jliger.ops.logits.objectives import LossArrays
from jliger.ops.logits.unit_loss import LinearLogprobs, UnitLoss

Units = Literal["tokens", "rows"]
LossFn = Callable[..., Any]


class LossHeadOptions(HeadOptions, total=False):
    """The options of a head that losses of log-probabilities take."""

    products: Products | None


class LossOptions(LossHeadOptions, total=False):
    """The options of `fused_linear_loss`."""

    units: Required[Units]
    has_aux: bool


_ENTROPY = LinearLogprobs._fields.index("entropy")


@overload
def fused_linear_loss(
    loss_fn: LossFn,
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    args: tuple[Any, ...] = (),
    *,
    units: Units,
    has_aux: Literal[False] = False,
    products: Products | None = None,
    **options: Unpack[HeadOptions],
) -> Float[Array, ""]: ...


@overload
def fused_linear_loss(
    loss_fn: LossFn,
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    args: tuple[Any, ...] = (),
    *,
    units: Units,
    has_aux: Literal[True],
    products: Products | None = None,
    **options: Unpack[HeadOptions],
) -> tuple[Float[Array, ""], Any]: ...


@overload
def fused_linear_loss(
    loss_fn: LossFn,
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    args: tuple[Any, ...] = (),
    *,
    units: Units,
    has_aux: bool,
    products: Products | None = None,
    **options: Unpack[HeadOptions],
) -> Float[Array, ""] | tuple[Float[Array, ""], Any]: ...


def fused_linear_loss(
    loss_fn: LossFn,
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    args: tuple[Any, ...] = (),
    *,
    units: Units,
    has_aux: bool = False,
    products: Products | None = None,
    **options: Unpack[HeadOptions],
) -> Any:
    r"""The sum of any loss of log-probabilities under a linear head, without the logits `[tokens, V]`.

    $$\sum_i \mathrm{loss\_fn}(\mathrm{result}_i,\ \mathrm{args}_i)$$

    A unit $i$ is a token, or a row of tokens such as a sequence or a pair of sequences. `loss_fn` is the loss of one
    unit, as a function of the unit's log-probabilities, log-sum-exps and entropies. It is differentiated where the
    unit's logits are, so gradients are computed together with the loss, with three matrix products.
    `jliger.linear_logprobs` with a loss on top computes the same with four, but gives the log-probabilities of all
    tokens before any loss. Memory is that of `jliger.fused_linear_cross_entropy`.

    Gradients flow to `hidden`, `kernel`, the bias and the adapter, and nowhere else. Nothing is computed for arguments
    that are not differentiated, for tokens that do not count, or for an entropy that `loss_fn` does not read.

    `loss_fn` is traced once, and becomes part of the compiled program: define it once, not in every call. Arrays that
    it closes over are passed to all devices.

    With rows, a chunk has as many whole rows as fit into the tokens of a chunk (`chunk_size`), and at least one: the
    memory for the logits of a row that is longer grows with it. Only tokens that count take a place in a chunk, and the
    places computed are one, two, three or four quarters of a chunk.

    On a mesh, all tokens of a unit must be on one device. Explicit axes that shard a row raise. On Auto axes, XLA
    gathers each row. Inside a `jax.shard_map`, rows must be whole, which is not checked, and the result is the sum over
    this device's units. Under `jax.vmap` each example has a kernel gradient of its own.

    Args:
      loss_fn: a function `loss_fn(result, *args)` of one unit's `jliger.LinearLogprobs` and arguments. With
        `units="tokens"` the fields of `result` are scalars. With `units="rows"` they have the shape of `labels` without
        its first axis; tokens that do not count have log-probability 0 and prediction −1, so that
        `result.predictions >= 0` is their mask. Returns the loss, a floating-point scalar; with `has_aux`, a tuple of
        the loss and a tree of arrays.
      hidden: the model's last hidden states, `[*B, H]`: float32, bfloat16, float16, or float64 (XLA only).
      kernel: the head's weights, `[H, V]`, or `[V, H]` with `kernel_layout="vh"`: hidden's dtype or float32.
      labels: the tokens whose log-probabilities are asked for, `[*B]`, integers. They are not shifted here.
      args: a tuple of trees of arrays, one tree for each further argument of `loss_fn`. Arrays have the dimensions of
        `labels` first (tokens), or its first dimension (rows), and `loss_fn` gets them without these. No gradient.
      units: `"tokens"`, or `"rows"` of the first axis of `labels`.
      has_aux: whether `loss_fn` returns auxiliary arrays. They carry no gradient.
      products: as in `jliger.linear_logprobs`, which says how large the errors of 8-bit products are.
      **options: those of `jliger.linear_logprobs` without `keep_logits`. `chunk_size` is that of
        `jliger.fused_linear_cross_entropy`.

    Returns:
      The sum over the units that have a token that counts, `[]`, float32 (float64 for float64 hidden states); 0 if
      there are none. It is not divided by anything. With `has_aux`, that and the auxiliary arrays stacked over the
      units, with zeros for units without a token that counts.

    Raises:
      ValueError: a shape does not match, an option is out of its range, or `"triton"` without a GPU.
      TypeError: `loss_fn` is no function, or does not return a floating-point scalar; something is no array, or of an
        unsupported dtype.
      NotImplementedError: `args` or arrays that `loss_fn` closes over are differentiated; Explicit axes shard a row; or
        `loss_fn` closes over arrays on Explicit axes and has control flow.

    Examples:
      A policy gradient, one token at a time:

      >>> import jax, jax.numpy as jnp, jliger
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 5, 8))
      >>> kernel = jax.random.normal(jax.random.key(1), (8, 32))
      >>> labels = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, -100, -100]])
      >>> advantages = jnp.broadcast_to(jnp.array([[1.0], [-0.5]]), labels.shape)
      >>> def token_loss(result, advantage):
      ...     return -advantage * result.logprobs - 0.01 * result.entropy
      >>> def loss(hidden, kernel):
      ...     return jliger.fused_linear_loss(token_loss, hidden, kernel, labels, (advantages,), units="tokens") / 8
      >>> value, grads = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
      >>> result = jliger.linear_logprobs(hidden, kernel, labels)
      >>> print(bool(jnp.allclose(value, (-advantages * result.logprobs - 0.01 * result.entropy).sum() / 8)))
      True

      Pairs of sequences, `[pairs, 2, length]`, chosen before rejected:

      >>> def pair_loss(result):
      ...     logprobs = result.logprobs.sum(-1)
      ...     return jax.nn.softplus(logprobs[1] - logprobs[0]), logprobs
      >>> total, logprobs = jliger.fused_linear_loss(
      ...     pair_loss, hidden[None], kernel, labels[None], units="rows", has_aux=True
      ... )
      >>> print(total.shape, logprobs.shape)
      () (1, 2)
    """
    return summed_losses(
        loss_fn, hidden, kernel, labels, args, units=units, has_aux=has_aux, products=products, **options
    )


def summed_losses(
    loss_fn: LossFn,
    hidden: Any,
    kernel: Any,
    labels: Any,
    args: tuple[Any, ...],
    shared: tuple[Any, ...] = (),
    *,
    units: Units,
    has_aux: bool,
    products: Products | None = None,
    **options: Unpack[HeadOptions],
) -> Any:
    """`fused_linear_loss`, with arrays `shared` that `loss_fn` gets after those of the unit, the same for all units."""
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn got a {type(loss_fn).__name__}; pass the function first: fused_linear_loss(loss_fn, hidden, "
            "kernel, labels, ...)."
        )
    checks.check_choice("units", units, ("tokens", "rows"))
    arguments = head_arguments(hidden, kernel, labels, stats_wanted=StatsWanted(), **options)
    arguments = with_products(arguments, products)
    if units == "rows" and not arguments.labels.ndim:
        raise ValueError("labels got a scalar with units='rows'; pass an array whose first axis is that of the rows.")
    unit_ndim = 1 if units == "rows" else arguments.labels.ndim
    args, shared = _as_arrays(args, arguments.labels.shape[:unit_ndim]), jax.tree.map(jnp.asarray, shared)
    call, shared = _traced_call(loss_fn, arguments, args, shared, unit_ndim, has_aux)
    total, aux = _summed_losses(
        call,
        arguments.operands,
        arguments.adapter,
        arguments.labels,
        arguments.where,
        tuple(jax.tree.leaves(args)),
        shared,
    )
    return (total, jax.tree.unflatten(call.aux_tree, aux)) if has_aux else total


@dataclasses.dataclass(frozen=True)
class _Call:
    """Everything about a call that is not an array."""

    config: HeadConfig
    loss: UnitLoss
    aux_tree: Any
    ignore_index: int | None


def _as_arrays(args: Any, units: tuple[int, ...]) -> tuple[Any, ...]:
    """Trees of arrays with one element per unit."""
    if not isinstance(args, tuple):
        raise TypeError(f"args got a {type(args).__name__}; pass a tuple, with one tree of arrays per argument.")

    def as_array(path: Any, leaf: Any) -> Array:
        name = f"args{jax.tree_util.keystr(path)}"
        array = checks.as_array(name, leaf)
        if array.shape[: len(units)] != units:
            raise ValueError(
                f"{name} got shape {array.shape}; pass one element per unit: the first dimensions must be {units}. "
                "Arrays that all units share can be closed over by loss_fn."
            )
        return array

    return jax.tree_util.tree_map_with_path(as_array, args)


def _traced_call(
    loss_fn: LossFn, arguments: Arguments, args: Any, shared: Any, unit_ndim: int, has_aux: bool
) -> tuple[_Call, tuple[Any, ...]]:
    """The call with the program of `loss_fn`; and the arrays that all units share, those closed over first."""
    config, operands, row_shape = arguments.config, arguments.operands, arguments.labels.shape[unit_ndim:]
    dtype = accumulator_dtype(operands.hidden.dtype)
    number: Any = jax.ShapeDtypeStruct(row_shape, dtype)
    column: Any = jax.ShapeDtypeStruct(row_shape, jnp.int32)
    unit = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[unit_ndim:], leaf.dtype), args)
    for_all = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shared)
    arrays = (operands, arguments.labels, arguments.where, arguments.adapter, args, shared)
    varying = frozenset().union(*map(varying_axes, jax.tree.leaves(arrays)))
    types = (LinearLogprobs(number, number, number, column), *unit, *for_all)
    program, consts, out, varying = jaxprs.trace(loss_fn, types, varying)
    _check_results(out, has_aux)
    _check_closure(program, consts)
    of_loss = [index == 0 for index in range(len(program.outvars))]
    in_loss, in_any = (jaxprs.inputs_read(program, outputs)[_ENTROPY] for outputs in (of_loss, [True] * len(of_loss)))
    differentiated = tuple(range(_ENTROPY + in_loss))
    loss = UnitLoss(program, jaxprs.gradient(program, differentiated), row_shape, in_loss)
    config = dataclasses.replace(config, stats_wanted=StatsWanted(mean_logit=in_any))
    return _Call(config, loss, jax.tree.structure(out[1] if has_aux else None), arguments.ignore_index), (
        *consts,
        *(as_varying(leaf, varying) for leaf in jax.tree.leaves(shared)),
    )


def _check_closure(program: Jaxpr, consts: list[Any]) -> None:
    on_explicit_axes = any(jax.typeof(array).sharding.mesh.explicit_axes for array in consts)
    if on_explicit_axes and jaxprs.has_control_flow(program):
        raise NotImplementedError(
            "loss_fn closes over arrays on a mesh with Explicit axes and has control flow, such as jax.lax.cond, whose "
            "types are those of that mesh; pass these arrays in args, or select with jnp.where."
        )


def _check_results(out: Any, has_aux: bool) -> None:
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"loss_fn returned a {type(out).__name__} with has_aux=True; return a tuple (loss, aux).")
    loss = out[0] if has_aux else out
    if not isinstance(loss, jax.ShapeDtypeStruct):
        raise TypeError(f"loss_fn returned a {type(loss).__name__}; return one number, or pass has_aux=True.")
    if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"loss_fn returned shape {loss.shape} and dtype {loss.dtype}; return the loss of one unit, a "
            "floating-point scalar."
        )


@functools.partial(jax.jit, static_argnums=0)
def _summed_losses(
    call: _Call,
    operands: Operands,
    adapter: LinearAdapter | None,
    labels: Integer[Array, "*B"],
    where: Bool[Array, "*B"] | None,
    args: tuple[Array, ...],
    shared: tuple[Array, ...],
) -> tuple[Float[Array, ""], list[Array]]:
    dtype = accumulator_dtype(operands.hidden.dtype)
    operands = with_adapter(call.config, operands, adapter)
    vocab_size = sharding.vocab_size(call.config, operands.kernel)
    operands = with_tokens(operands, labels, where, ignore_index=call.ignore_index, vocab_size=vocab_size)
    counted = jnp.ones_like(operands.labels, bool) if operands.counted is None else operands.counted
    per_token = (column_validity(operands.labels, dtype), counted)
    total, aux = gradients.unit_loss(call.config, call.loss, operands, LossArrays(per_token, args, shared))
    return total.astype(dtype), jax.lax.stop_gradient(aux)
