"""`softmax_cross_entropy`: the loss of logits that someone already has.

It imports from `jliger.ops.linear_head` what both losses need around the logits: which tokens count, and the metrics.
"""

import functools
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jliger.core import checks, partitioned
from jliger.core.backend import (
    Choice,
    Implementation,
    check_implementation,
    fitting_implementation,
    run_by_platform,
    target_compute_capability,
)
from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import is_explicit, mesh_of, replicated, sum_to_type, with_tokens_of
from jliger.core.partitioned import Operation
from jliger.core.reduction import Reduction, check_reduction, divided, weight_divisor
from jliger.ops.linear_head.arguments import (
    column_validity,
    counted_tokens,
    if_counted,
    inverse_temperature_of,
    label_columns,
)
from jliger.ops.linear_head.cross_entropy import CrossEntropyMetrics, Loss
from jliger.ops.logits import Block, Coefficients, LogitMap, RowStats, StatsWanted, get_rows
from jliger.ops.logits.objectives import CrossEntropy, LabelTerms, coefficients_of

_TRITON_DTYPES = ("float32", "bfloat16", "float16")


class _Config(NamedTuple):
    """What the statistics depend on beside arrays."""

    logit_map: LogitMap
    wanted: StatsWanted
    implementation: Choice
    compute_capability: int | None


class _Call(NamedTuple):
    """Everything about a call that is not an array."""

    config: _Config
    objective: CrossEntropy
    reduction: Reduction
    ignore_index: int | None


@overload
def softmax_cross_entropy(  # pyrefly: ignore[inconsistent-overload]
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], *, return_metrics: Literal[False] = False, **options: Any
) -> Loss: ...


@overload
def softmax_cross_entropy(  # pyrefly: ignore[inconsistent-overload]
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], *, return_metrics: bool, **options: Any
) -> Any: ...


def softmax_cross_entropy(
    logits: Float[Array, "*B V"],
    labels: Int[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    weights: Float[Array, "*B"] | None = None,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: Float[Array, "*B"] | Float[Array, ""] | float = 1.0,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: Float[Array, " V"] | None = None,
    reduction: Reduction = "mean",
    normalizer: Num[Array, ""] | float | None = None,
    return_metrics: bool = False,
    implementation: Implementation | None = None,
) -> Loss | tuple[Loss, CrossEntropyMetrics]:
    """Cross entropy of logits that exist already; `fused_linear_cross_entropy` never makes them, and needs less memory.

    The formula and the options are those of `jliger.fused_linear_cross_entropy`, with `logits` in the place of the
    product of hidden states and kernel, scaled and capped here. All arithmetic is in float32. For the backward pass,
    only the logits and two numbers per token are saved; their gradient is computed in one pass over them, as a new
    array in their dtype.

    On a mesh, tokens may be sharded over any axes. The vocabulary may be sharded too, with `implementation="xla"`;
    inside a `jax.shard_map`, each device must have whole rows.

    Args:
      logits: `[*B, V]`: float32, bfloat16, float16, or float64 (XLA only). Those of tokens that do not count must be
        finite too.
      labels: the label of each token, `[*B]`, integers.
      where: bools `[*B]`, the tokens that count.
      weights: a weight for each token, `[*B]`. It carries no gradient.
      ignore_index: a token with this label does not count; None if all labels count.
      logit_scale: multiplies the logits, a Python number.
      logit_softcap: `c` in `c · tanh(z / c)`, a Python number, or None for no cap.
      temperature: divides logits after scale and softcap: a Python number above 0, a scalar array, or `[*B]`. It
        carries no gradient.
      vocab_size: the number of columns that exist; those after them are padding. None for all.
      label_smoothing: in [0, 1].
      z_loss: the factor of the squared log-sum-exp, at least 0.
      class_weights: `[V]`. It carries no gradient.
      reduction: `"mean"`, `"sum"` or `"none"`, as in `jliger.fused_linear_cross_entropy`.
      normalizer: with `"mean"`, the divisor to use instead, such as the global token count when accumulating
        microbatches. It carries no gradient.
      return_metrics: also return `CrossEntropyMetrics`.
      implementation: `"triton"` for NVIDIA GPUs from sm_80 on, `"xla"` for any device. None chooses by the device that
        the arrays are on.

    Returns:
      The loss, float32 (float64 for float64 logits): `[]`, or `[*B]` with `"none"`. With `return_metrics`, that and the
      metrics.

    Raises:
      ValueError: a shape that does not fit, an option out of its range, or `"triton"` where there is no GPU.
      TypeError: something that is no array, a dtype that is not supported, or an option that is not a Python number.
      NotImplementedError: `"triton"` with a vocabulary that is sharded over Explicit axes.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> logits, labels = jnp.zeros((2, 3, 8)), jnp.array([[1, 2, 3], [4, -100, -100]])
      >>> loss, metrics = jliger.softmax_cross_entropy(logits, labels, return_metrics=True)
      >>> print(bool(jnp.allclose(loss, jnp.log(8.0))), metrics.weight)
      True 4.0
    """
    checks.check_number("label_smoothing", label_smoothing, least=0, most=1)
    checks.check_number("z_loss", z_loss, least=0)
    checks.check_number("logit_scale", logit_scale, instead=", or multiply the logits by it")
    if logit_softcap is not None:
        checks.check_number("logit_softcap", logit_softcap)
        if logit_softcap <= 0:
            raise ValueError(f"logit_softcap got {logit_softcap!r}; pass a number above 0, or None for no cap.")
    if ignore_index is not None:
        checks.check_integer("ignore_index", ignore_index)
    check_reduction(reduction, normalizer)
    logits, labels = checks.as_array("logits", logits), checks.as_array("labels", labels)
    checks.check_floating("logits", logits)
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits got shape {logits.shape}; pass [*B, V] with at least one column.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels got dtype {labels.dtype}; pass integers.")
    checks.check_shape("labels", labels, logits.shape[:-1], "the leading dimensions of logits")
    if vocab_size is not None:
        checks.check_integer("vocab_size", vocab_size)
        if not 1 <= vocab_size <= logits.shape[-1]:
            raise ValueError(f"vocab_size got {vocab_size}; pass 1 to {logits.shape[-1]}, the number of columns.")
    width = logits.shape[-1] if vocab_size is None else int(vocab_size)
    logit_map = LogitMap(float(logit_scale), None if logit_softcap is None else float(logit_softcap), width)
    config = _Config(
        logit_map,
        StatsWanted(weighted_sum=label_smoothing > 0),
        _choice(implementation, logits),
        target_compute_capability(),
    )
    call = _Call(
        config,
        CrossEntropy(float(label_smoothing), float(z_loss), width),
        reduction,
        None if ignore_index is None else int(ignore_index),
    )
    inverse_temperature = inverse_temperature_of(temperature, labels, accumulator_dtype(logits.dtype))
    arrays = _checked(logits, labels, where=where, weights=weights, class_weights=class_weights, normalizer=normalizer)
    loss, metrics = _softmax_cross_entropy(call, logits, labels, inverse_temperature, *arrays)
    return (loss, metrics) if return_metrics else loss


def _checked(logits: Array, labels: Array, **arrays: Any) -> list[Array | None]:
    """The optional arrays, checked, in the order of the arguments."""
    found = {name: None if value is None else checks.as_array(name, value) for name, value in arrays.items()}
    if found["where"] is not None:
        checks.check_where(found["where"], labels)
    if found["weights"] is not None:
        checks.check_weights(found["weights"], labels)
    if found["class_weights"] is not None:
        checks.check_floating("class_weights", found["class_weights"])
        checks.check_shape("class_weights", found["class_weights"], logits.shape[-1:], "one weight per column")
    if found["normalizer"] is not None:
        checks.check_normalizer(found["normalizer"])
    return list(found.values())


def _choice(implementation: Implementation | None, logits: Array) -> Choice:
    check_implementation(implementation)
    mesh_axes = jax.typeof(logits).sharding.spec[-1] if is_explicit(mesh_of(logits)) else None
    takes = str(logits.dtype) in _TRITON_DTYPES
    if implementation is None:
        return fitting_implementation(logits) if takes and mesh_axes is None else "xla"
    if implementation == "triton" and mesh_axes is not None:
        raise NotImplementedError(
            f"implementation got 'triton' for logits whose vocabulary is sharded over {mesh_axes}; pass 'xla', or "
            "shard the kernel and use jliger.fused_linear_cross_entropy."
        )
    if implementation == "triton" and not takes:
        raise TypeError(f"logits got dtype {logits.dtype}, which the Triton kernels do not take; pass 'xla'.")
    return implementation


@functools.partial(jax.jit, static_argnums=0)
def _softmax_cross_entropy(
    call: _Call,
    logits: Float[Array, "*B V"],
    labels: Int[Array, "*B"],
    inverse_temperature: Float[Array, "*B"] | None,
    where: Bool[Array, "*B"] | None,
    weights: Float[Array, "*B"] | None,
    class_weights: Float[Array, " V"] | None,
    normalizer: Num[Array, ""] | None,
) -> tuple[Loss, CrossEntropyMetrics]:
    dtype, objective = accumulator_dtype(logits.dtype), call.objective
    per_token = (labels, inverse_temperature, where, weights)
    labels, inverse_temperature, where, weights = jax.tree.map(functools.partial(with_tokens_of, logits), per_token)
    weights, class_weights, normalizer = jax.lax.stop_gradient((weights, class_weights, normalizer))
    counted = counted_tokens(labels, where, call.ignore_index)
    columns = label_columns(labels, counted, objective.vocab_size)
    weights = jnp.ones_like(columns, dtype) if weights is None else weights.astype(dtype)
    token_weights = if_counted(counted, weights, 0)
    if inverse_temperature is not None:
        inverse_temperature = if_counted(counted, inverse_temperature, 1)
    label_terms = LabelTerms(column_validity(columns, dtype), None, float(objective.vocab_size))
    if class_weights is not None:
        class_weights = replicated(class_weights.astype(dtype))
        total = class_weights[: objective.vocab_size].sum()
        label_terms = label_terms._replace(weights=_entries(class_weights, columns), total_weight=total)
    smoothing_weights = class_weights if call.config.wanted.weighted_sum else None
    stats = _stats(call.config, logits, Block(None, smoothing_weights, columns, inverse_temperature))
    # Uncounted logits may be anything: their losses are replaced and not multiplied by 0.
    parts = [if_counted(counted, part * weights, 0) for part in objective.token_losses(stats, label_terms)]
    weight = token_weights.sum()
    if call.reduction != "none":
        parts = [part.sum() for part in parts]
    if call.reduction == "mean":
        by_label = weight if label_terms.weights is None else (token_weights * label_terms.weights).sum()
        divisors = (by_label, weight) if normalizer is None else (normalizer, normalizer)
        parts = [divided(part, divisor) for part, divisor in zip(parts, divisors, strict=True)]
    cross_entropy, z_loss = parts
    right = jnp.where(stats.prediction == columns, token_weights, 0).sum()
    metrics = CrossEntropyMetrics(
        weight, cross_entropy, z_loss, right / weight_divisor(weight), if_counted(counted, stats.prediction, -1)
    )
    return cross_entropy + z_loss, jax.lax.stop_gradient(metrics)


def _entries(table: Float[Array, " V"], columns: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The entry of each column, arbitrary for an invalid one; sharded like the columns on an Explicit mesh."""
    sharding = jax.typeof(columns).sharding if is_explicit(mesh_of(columns)) else None
    return table.at[columns].get(mode="clip", out_sharding=sharding)


# ---- statistics of rows, and their gradients -------------------------------------------------------------------

_DIMS = {**dict.fromkeys(("logits", "grads"), "tv"), **dict.fromkeys(("bias", "class_weights"), "v")}
"""The dimensions of arrays, for `jliger.core.partitioned`: tokens and columns. All other arrays have tokens alone."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(config: _Config, logits: Float[Array, "*B V"], block: Block) -> RowStats:
    """The rows' statistics, differentiable in the logits and in all fields but `max` and `prediction`."""
    return _compute_stats(config, logits, block)


def _compute_stats(config: _Config, logits: Array, block: Block) -> RowStats:
    wide = accumulator_dtype(logits.dtype)
    results = {"max": wide, "log_sum": wide, "label_logit": wide, "prediction": jnp.dtype("int32")}
    results |= {"weighted_sum": wide} if config.wanted.weighted_sum else {}
    return RowStats(**_run(_stats_of_rows, config, {"logits": logits, **block._asdict()}, results))


def _stats_fwd(config: _Config, logits: Array, block: Block) -> tuple[RowStats, Any]:
    stats = _compute_stats(config, logits, block)
    return stats, (logits, block, stats.max, stats.log_sum)


def _stats_bwd(config: _Config, residuals: Any, cotangents: RowStats) -> tuple[Array, None]:
    logits, block, row_max, log_sum = residuals
    coefficients = coefficients_of(cotangents, None)
    arrays = {"logits": logits, **block._asdict(), "row_max": row_max, "log_sum": log_sum, **coefficients._asdict()}
    grads = _run(_grads_of_rows, config, arrays, {"grads": logits.dtype})["grads"]
    return sum_to_type(grads, logits), None


_stats.defvjp(_stats_fwd, _stats_bwd)


def _run(function: Any, config: _Config, arrays: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Runs a row function on rows with any leading dimensions. Arrays that are None are no operands.

    `results` has the dtype of each result.
    """
    operands = {name: array for name, array in arrays.items() if array is not None}
    context = (config, tuple(operands))
    if config.implementation == "xla":
        # One vmap per leading dimension, and not a reshape: XLA then keeps the sharding of every dimension.
        run = functools.partial(function, context, ())
        names = list(operands)
        for _ in range(arrays["logits"].ndim - 1):
            run = jax.vmap(run, [None if _DIMS.get(name) == "v" else 0 for name in names])
        found = run(*operands.values())
    else:
        operation = Operation(
            function,
            context,
            tuple(_DIMS.get(name, "t") for name in operands),
            tuple(_DIMS.get(name, "t") for name in results),
            tuple(results.values()),
            whole="v",
        )
        found = partitioned.run(operation, *operands.values())
    return dict(zip(results, found, strict=True))


def _stats_of_rows(context: Any, dtypes: Any, *operands: Array) -> tuple[Array, ...]:
    del dtypes

    def run(config: _Config, rows: Any, arrays: dict[str, Any]) -> RowStats:
        return rows.row_stats(arrays["logits"], _block(arrays), config.logit_map, config.wanted)

    return _on_rows(run, context, operands)


def _grads_of_rows(context: Any, dtypes: Any, *operands: Array) -> tuple[Array, ...]:
    del dtypes

    def run(config: _Config, rows: Any, arrays: dict[str, Any]) -> tuple[Array]:
        logits, coefficients = (
            arrays["logits"],
            Coefficients(*map(arrays.get, Coefficients._fields)),  # pyrefly: ignore[bad-argument-type]
        )
        statistics = arrays["row_max"], arrays["log_sum"]
        return (
            rows.row_grads(logits, _block(arrays), config.logit_map, *statistics, coefficients, dtype=logits.dtype),
        )

    return _on_rows(run, context, operands)


def _block(arrays: dict[str, Any]) -> Block:
    return Block(None, arrays.get("class_weights"), arrays["labels"], arrays.get("inverse_temperature"))


def _on_rows(run: Any, context: Any, operands: tuple[Array, ...]) -> tuple[Array, ...]:
    """Calls `run` with the leading dimensions as one dimension of rows."""
    config, names = context
    lead = operands[0].shape[:-1]
    flat = {
        name: array if _DIMS.get(name) == "v" else array.reshape(-1, *array.shape[len(lead) :])
        for name, array in zip(names, operands, strict=True)
    }

    def with_rows(implementation: Implementation, arrays: dict[str, Any]) -> tuple[Array, ...]:
        results = run(config, get_rows(implementation, config.compute_capability), arrays)
        return tuple(array for array in results if array is not None)

    # A grid without programs cannot be launched.
    choice = config.implementation if operands[0].size else "xla"
    return tuple(array.reshape(*lead, *array.shape[1:]) for array in run_by_platform(with_rows, choice, flat))
