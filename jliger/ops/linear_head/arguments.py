"""Arguments that all operations share: checks, defaults, and which tokens count."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jliger.core import checks
from jliger.core.backend import Choice, Implementation, fitting_implementation, target_compute_capability
from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head import checks as head_checks
from jliger.ops.linear_head.adapter import LinearAdapter
from jliger.ops.linear_head.types import HeadConfig, KernelLayout, Operands
from jliger.ops.logits import StatsWanted


class HeadOptions(TypedDict, total=False):
    """The options that every operation on a linear head takes; `jliger.linear_logprobs` documents them."""

    bias: Float[Array, " V"] | None
    where: Bool[Array, "*B"] | None
    ignore_index: int | None
    kernel_layout: KernelLayout
    logit_scale: float
    logit_softcap: float | None
    temperature: Float[Array, "*B"] | Float[Array, ""] | float
    vocab_size: int | None
    logits_dtype: jax.typing.DTypeLike | None
    precision: jax.lax.PrecisionLike
    chunk_size: int | None
    vocab_axis_name: str | tuple[str, ...] | None
    adapter: LinearAdapter | None
    implementation: Implementation | None


HEAD_DEFAULTS = HeadOptions(
    bias=None,
    where=None,
    ignore_index=-100,
    kernel_layout="hv",
    logit_scale=1.0,
    logit_softcap=None,
    temperature=1.0,
    vocab_size=None,
    logits_dtype=None,
    precision=None,
    chunk_size=None,
    vocab_axis_name=None,
    adapter=None,
    implementation=None,
)


class Arguments(NamedTuple):
    """Checked arguments: arrays, and the static configuration."""

    config: HeadConfig
    operands: Operands
    labels: Integer[Array, "*B"]
    where: Bool[Array, "*B"] | None
    adapter: LinearAdapter | None
    ignore_index: int | None


def head_arguments(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    *,
    stats_wanted: StatsWanted,
    whose: str = "",
    **options: Unpack[HeadOptions],
) -> Arguments:
    """Checks the arguments that every operation on a linear head takes; errors name the argument.

    `whose` is the prefix of the head's own arguments, if there are two heads.
    """
    check_names(options)
    given: HeadOptions = {**HEAD_DEFAULTS, **options}
    head_checks.check_logit_options(
        kernel_layout=given["kernel_layout"],
        logit_scale=given["logit_scale"],
        logit_softcap=given["logit_softcap"],
        ignore_index=given["ignore_index"],
        chunk_size=given["chunk_size"],
        implementation=given["implementation"],
        whose=whose,
    )
    checks.check_precision(given["precision"])
    hidden, kernel = checks.as_array(f"{whose}hidden", hidden), checks.as_array(f"{whose}kernel", kernel)
    labels = checks.as_array("labels", labels)
    bias = None if given["bias"] is None else checks.as_array(f"{whose}bias", given["bias"])
    where = None if given["where"] is None else checks.as_array("where", given["where"])
    head_checks.check_operands(
        hidden,
        kernel,
        labels,
        bias,
        kernel_layout=given["kernel_layout"],
        implementation=given["implementation"],
        whose=whose,
    )
    if where is not None:
        checks.check_where(where, labels)
    config = _config(given, (hidden, kernel, labels, bias, where), stats_wanted)
    adapter = _adapter(given["adapter"], hidden, kernel, config.vocab_dim, whose)
    inverse_temperature = inverse_temperature_of(given["temperature"], labels, accumulator_dtype(hidden.dtype))
    operands = Operands(hidden, kernel, bias, inverse_temperature=inverse_temperature)
    ignore_index = None if given["ignore_index"] is None else int(given["ignore_index"])
    return Arguments(config, operands, labels, where, adapter, ignore_index)


def check_names(options: Mapping[str, Any]) -> None:
    """Raises for an option that heads do not have."""
    for name in options:
        if name not in HEAD_DEFAULTS:
            raise TypeError(
                f"{name} is no option of this function, nor of a linear head, which are {', '.join(HEAD_DEFAULTS)}."
            )


def _config(options: HeadOptions, arrays: tuple[Any, ...], stats_wanted: StatsWanted) -> HeadConfig:
    """The static part of checked options; `arrays` are the operation's, hidden states first."""
    hidden, implementation = arrays[0], options["implementation"]
    logits_dtype = head_checks.as_logits_dtype(options["logits_dtype"], hidden, implementation)
    choice: Choice | None = implementation
    if choice is None:
        fitting = head_checks.triton_takes(hidden, logits_dtype)
        choice = fitting_implementation(*jax.tree.leaves(arrays)) if fitting else "xla"
    logit_softcap, precision, chunk_size = options["logit_softcap"], options["precision"], options["chunk_size"]
    return HeadConfig(
        kernel_layout=options["kernel_layout"],
        logit_scale=float(options["logit_scale"]),
        logit_softcap=None if logit_softcap is None else float(logit_softcap),
        logits_dtype=logits_dtype,
        precision=jax.config.jax_default_matmul_precision if precision is None else precision,
        chunk_size=None if chunk_size is None else int(chunk_size),
        implementation=choice,
        compute_capability=target_compute_capability(),
        stats_wanted=stats_wanted,
        vocab_axes=checks.check_axes("vocab_axis_name", options["vocab_axis_name"]),
        vocab_size=_vocab_size(options["vocab_size"]),
    )


def with_products(arguments: Arguments, products: Any) -> Arguments:
    """The arguments with the option for 8-bit products, if they fit it."""
    head_checks.check_products(products, arguments.config, arguments.operands.hidden)
    if products is not None and arguments.adapter is not None:
        raise NotImplementedError(f"products={products!r} got an adapter; pass products=None.")
    return arguments._replace(config=dataclasses.replace(arguments.config, products=products))


def _vocab_size(vocab_size: Any) -> int | None:
    """A number of columns; `sharding.vocab_size`, which knows the size of the whole kernel, checks that it has them."""
    if vocab_size is None:
        return None
    checks.check_integer("vocab_size", vocab_size)
    if vocab_size < 1:
        raise ValueError(f"vocab_size got {vocab_size}; pass at least 1, or None for all of the kernel's columns.")
    return int(vocab_size)


def _adapter(adapter: Any, hidden: Any, kernel: Any, vocab_dim: int, whose: str) -> LinearAdapter | None:
    """An adapter that fits the head, as arrays."""
    if adapter is None:
        return None
    if not isinstance(adapter, tuple) or len(adapter) not in (2, 3):
        raise TypeError(f"{whose}adapter got a {type(adapter).__name__}; pass a jliger.LinearAdapter.")
    named = LinearAdapter(*adapter)._asdict().items()
    adapter = LinearAdapter(*(checks.as_array(f"{whose}adapter.{name}", array) for name, array in named))
    head_checks.check_adapter(adapter, hidden, kernel, vocab_dim, whose)
    return adapter


def inverse_temperature_of(temperature: Any, labels: Any, dtype: Any) -> Float[Array, "*B"] | None:
    """`1 / T` of each token, NaN if an array has a `T` that is not above 0; None for 1."""
    if isinstance(temperature, int | float | np.number):
        if not np.isfinite(temperature) or temperature <= 0:
            raise ValueError(f"temperature got {temperature!r}; pass a finite number above 0.")
        if temperature == 1:
            return None
    temperature = jax.lax.stop_gradient(checks.as_array("temperature", temperature))
    if not (jnp.issubdtype(temperature.dtype, jnp.floating) or jnp.issubdtype(temperature.dtype, jnp.integer)):
        raise TypeError(f"temperature got dtype {temperature.dtype}; pass real numbers.")
    if temperature.shape not in ((), labels.shape):
        raise ValueError(
            f"temperature got shape {temperature.shape}; pass one number, or one for each token, {labels.shape}."
        )
    temperature = temperature.astype(dtype)
    inverse = one_or_nan(temperature > 0, dtype) / jnp.where(temperature > 0, temperature, 1)
    # Sharded like the labels.
    return inverse if inverse.shape == labels.shape else inverse * jnp.ones_like(labels, dtype)


def with_tokens(
    operands: Operands,
    labels: Integer[Array, "*B"],
    where: Bool[Array, "*B"] | None,
    *,
    ignore_index: int | None,
    vocab_size: int,
) -> Operands:
    """Adds each token's column, and whether it counts; tokens that don't count get neutral values."""
    # None: all tokens count, and the passes know it when they are traced.
    counted = None if where is None and ignore_index is None else counted_tokens(labels, where, ignore_index)
    inverse_temperature = operands.inverse_temperature
    if inverse_temperature is not None and counted is not None:
        inverse_temperature = jnp.where(counted, inverse_temperature, 1)
    columns = label_columns(labels, counted, vocab_size)
    return operands._replace(labels=columns, counted=counted, inverse_temperature=inverse_temperature)


def counted_tokens(
    labels: Integer[Array, "*B"], where: Bool[Array, "*B"] | None, ignore_index: int | None
) -> Bool[Array, "*B"]:
    """Tokens for which `where` is true and the label is not `ignore_index`."""
    limits = jnp.iinfo(labels.dtype)
    # A dtype that cannot hold ignore_index has no label equal to it; a comparison would wrap it around.
    can_occur = ignore_index is not None and limits.min <= ignore_index <= limits.max
    counted = labels != ignore_index if can_occur else jnp.full(labels.shape, True)
    return counted if where is None else counted & where


def label_columns(labels: Integer[Array, "*B"], counted: Bool[Array, "*B"] | None, vocab_size: int) -> Int[Array, "*B"]:
    """Labels as int32 columns: −1 if out of range, 0 if the token doesn't count."""
    inside = (labels >= 0) & (labels <= min(vocab_size - 1, jnp.iinfo(labels.dtype).max))
    return if_counted(counted, jnp.where(inside, labels.astype(jnp.int32), -1), 0)


def if_counted(counted: Bool[Array, "*B"] | None, values: Array, otherwise: float) -> Array:
    """The values of tokens that count, and `otherwise` for others."""
    return values if counted is None else jnp.where(counted, values, otherwise)


def column_validity(columns: Int[Array, "*B"], dtype: jax.typing.DTypeLike) -> Float[Array, "*B"]:
    """1 for a valid label, NaN for an invalid one; multiplying by it makes that token's loss and gradient NaN."""
    return one_or_nan(columns >= 0, dtype)


def one_or_nan(is_one: Bool[Array, "*B"], dtype: jax.typing.DTypeLike) -> Float[Array, "*B"]:
    """1 where true, and NaN elsewhere."""
    # The root of −1, because without jit a NaN constant would always trigger `jax_debug_nans`.
    return jnp.sqrt(jnp.where(is_one, 1, -1).astype(dtype))
