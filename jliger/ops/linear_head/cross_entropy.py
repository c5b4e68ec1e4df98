"""cross_entropy: `fused_linear_cross_entropy`, with its checks and defaults, in one jit."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from jliger.core import checks
from jliger.core.backend import Implementation
from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head import checks as head_checks
from jliger.ops.linear_head import gradients, sharding
from jliger.ops.linear_head.adapter import LinearAdapter, with_adapter
from jliger.ops.linear_head.arguments import (
    Arguments,
    HeadOptions,
    column_validity,
    head_arguments,
    if_counted,
    with_products,
    with_tokens,
)
from jliger.ops.linear_head.types import HeadConfig, KernelLayout, Operands, Products
from jliger.ops.logits import StatsWanted
from jliger.ops.logits.objectives import CrossEntropy, LabelTerms, LossWeights

Reduction = Literal["mean", "sum", "none"]


class CrossEntropyMetrics(NamedTuple):
    """Figures to log beside the loss. None of them carries a gradient.

    Attributes:
      weight: `[]`, the sum of the weights of the tokens that count; without `weights`, their number.
      cross_entropy: the loss without its z-loss, reduced like the loss.
      z_loss: the z-loss, reduced like the loss.
      accuracy: `[]`, the share of `weight` on tokens that are predicted correctly; 0 if nothing counts.
      predictions: int32 `[*B]`, the first column with the largest logit; −1 for a token that doesn't count.
      skipped_mass: `[]`, with `skip_gradients_below`: the sum of the sizes of each token's logit gradients that are
        approximated, divided by the token's weight, and averaged by weight. Without a z-loss it is a probability. 0 if
        no gradients are computed; None without the option.
    """

    weight: Float[Array, ""]
    cross_entropy: Float[Array, ""] | Float[Array, "*B"]
    z_loss: Float[Array, ""] | Float[Array, "*B"]
    accuracy: Float[Array, ""]
    predictions: Int[Array, "*B"]
    skipped_mass: Float[Array, ""] | None = None


Loss = Float[Array, ""] | Float[Array, "*B"]


class CrossEntropyOptions(HeadOptions, total=False):
    """The options of `fused_linear_cross_entropy` except `return_metrics`, which changes its result."""

    weights: Float[Array, "*B"] | None
    label_smoothing: float
    z_loss: float
    class_weights: Float[Array, " V"] | None
    reduction: Reduction
    normalizer: Num[Array, ""] | float | None
    products: Products | None
    skip_gradients_below: float | None


@overload
def fused_linear_cross_entropy(  # pyrefly: ignore[inconsistent-overload]
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[CrossEntropyOptions],
) -> Loss: ...


@overload
def fused_linear_cross_entropy(  # pyrefly: ignore[inconsistent-overload]
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    *,
    return_metrics: Literal[True],
    **options: Unpack[CrossEntropyOptions],
) -> tuple[Loss, CrossEntropyMetrics]: ...


@overload
def fused_linear_cross_entropy(  # pyrefly: ignore[inconsistent-overload]
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    *,
    return_metrics: bool,
    **options: Unpack[CrossEntropyOptions],
) -> Loss | tuple[Loss, CrossEntropyMetrics]: ...


def fused_linear_cross_entropy(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    *,
    bias: Float[Array, " V"] | None = None,
    where: Bool[Array, "*B"] | None = None,
    weights: Float[Array, "*B"] | None = None,
    ignore_index: int | None = -100,
    kernel_layout: KernelLayout = "hv",
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
    logits_dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    chunk_size: int | None = None,
    vocab_axis_name: str | tuple[str, ...] | None = None,
    adapter: LinearAdapter | None = None,
    implementation: Implementation | None = None,
    products: Products | None = None,
    skip_gradients_below: float | None = None,
) -> Loss | tuple[Loss, CrossEntropyMetrics]:
    r"""Cross entropy of a linear head, without storing the logits `[tokens, V]` whole.

    For each token, with logits
    $z = \mathrm{softcap}(s \cdot (\mathrm{hidden} \cdot \mathrm{kernel} + \mathrm{bias})) / T$,
    $\mathrm{softcap}(z) = c \tanh(z / c)$, $\mathrm{lse} = \log \sum_v e^{z_v}$ and label $y$,

    $$(1 - \alpha)\, w_y (\mathrm{lse} - z_y) + \frac{\alpha}{V} \sum_v w_v (\mathrm{lse} - z_v)
      + \lambda\, \mathrm{lse}^2$$

    with `logit_scale` $s$, `logit_softcap` $c$, `temperature` $T$, `label_smoothing` $\alpha$ (Szegedy et al., 2016,
    arXiv:1512.00567), `class_weights` $w$ and `z_loss` $\lambda$ (Chowdhery et al., 2022, arXiv:2204.02311).
    Differentiable once, in reverse mode, in `hidden`, `kernel` and `bias`; only the gradients that are needed are
    computed. Gradients have their argument's dtype and are summed in float32. With `implementation="xla"`, on one
    device, `jax.jvp` of `jax.grad` and `jax.hessian` work too.

    A token counts if `where` is true and its label is not `ignore_index`. The others cost no time and give loss 0,
    gradient 0 and prediction −1, whatever their hidden states are. A label outside `[0, V)` that counts makes the loss
    and the gradients NaN.

    With `"mean"` and `"sum"`, gradients are computed together with the loss, over chunks of tokens, with three matrix
    products (Hsu et al., 2024, arXiv:2410.10989). With `"none"`, logits are recomputed in the backward pass, over
    blocks of the vocabulary, with four products.

    Memory beside arguments, results and their gradients, with `b` bytes a value of `hidden`, `C` tokens a chunk:

      * `"mean"`, `"sum"`: `2·b·C·V` for logits and their gradients, `b·H·V` for the kernel in hidden's dtype if it has
        another, `4·H·V` for a float32 sum of kernel gradients if the kernel is not float32. Not differentiated:
        `b·C·V`, and `b·H·V` as before.
      * `"none"`: about 0.5 GiB on a GPU for any `V`, and a few numbers per token; `4·H·V` for that sum, if the kernel
        is not float32 and there is more than one chunk.

    Under `jax.vmap`, each example has its own kernel gradient, `4·H·V`, even if `jax.grad` around it only needs their
    sum. On a mesh, each device has those of its own examples. If the sum is enough, pass the tokens of all examples as
    `[*B]`, without `jax.vmap`, and weight the examples with `weights`: see the last example below.

    Args:
      hidden: the model's last hidden states, `[*B, H]`: float32, bfloat16, float16, or float64 (XLA only). Products are
        computed in this dtype.
      kernel: the head's weights, `[H, V]`, or `[V, H]` with `kernel_layout="vh"` (a tied embedding): hidden's dtype or
        float32.
      labels: the label of each token, `[*B]`, integers. They are not shifted here.
      bias: `[V]`, added to the logits in float32. A column with −∞ has probability 0. Do not combine it with
        `label_smoothing`, which gives every column a share: the loss is then infinite, or NaN if the column's class
        weight is 0. A softcap turns −∞ into `−c`, so that the column is not masked.
      where: bools `[*B]`, the tokens that count.
      weights: a weight for each token, `[*B]`. It carries no gradient.
      ignore_index: a label equal to it doesn't count. None, without `where`, says that all tokens count: none are
        looked for and left out, and the number of chunks is known when the program is compiled. Every label out of
        range then makes the loss NaN.
      kernel_layout: `"hv"` or `"vh"`.
      logit_scale: `s`, a Python number.
      logit_softcap: `c`, a Python number, or None for no cap.
      temperature: `T`, which divides logits after scale and softcap, before anything else: a Python number above 0, a
        scalar array, or one number for each token, `[*B]`. It carries no gradient. An array element that is not above 0
        makes its tokens' losses and gradients NaN.
      vocab_size: $V'$, a Python integer, if the kernel is padded: its columns from $V'$ on do not exist. They have no
        probability and no share in the smoothing ($\alpha / V'$), are never predicted, and their gradients are 0; a
        label among them is out of range. `bias` and `class_weights` stay `[V]`. Products are still taken of all
        columns, so what the padding holds must be finite. None for all columns.
      label_smoothing: `α` in [0, 1].
      z_loss: `λ`, at least 0.
      class_weights: `w`, `[V]`. It carries no gradient.
      reduction: `"mean"` divides the weighted sum by the weights of the tokens that count (with `class_weights`, its
        cross-entropy part by the sum of weight times `w_y`, as PyTorch does), and gives 0 if that is 0; `"sum"` doesn't
        divide; `"none"` gives each token's weighted loss.
      normalizer: with `"mean"`, the divisor to use instead, such as the global token count when accumulating
        microbatches. It carries no gradient.
      return_metrics: also return `CrossEntropyMetrics`.
      logits_dtype: the dtype that logits are rounded to before the loss reads them, in both passes; None for hidden's
        dtype.
      precision: of the matrix products, as in `jax.lax.dot_general`; None for `jax.default_matmul_precision`.
      chunk_size: tokens per chunk. None for a rule that was fastest on an H200: `2²⁸ / V`, rounded down to a power of
        two, at least 2048 and at most 8192 (`"none"`: 8192), in chunks of equal size; on other devices `2²³ / V`,
        between 128 and 1024 (`"none"`: 1024).
      vocab_axis_name: inside a `jax.shard_map`, the manual axis, or axes, that shard the kernel's columns (and bias and
        class weights); labels are columns of the whole vocabulary. Elsewhere the arrays' shardings are used
        automatically.
      adapter: a `jliger.LinearAdapter`: logits become those of `hidden · (kernel + scale · a · b)`, and gradients flow
        to `a`, `b` and `scale` too.
      implementation: `"triton"` for NVIDIA GPUs from sm_80 on, `"xla"` for any device. None selects by the device that
        the arrays are on, or under `jax.jit` by the platform that is compiled for.
      products: `"float8"` for matrix products of 8-bit operands: faster, with larger errors in logits and gradients.
        `"float8_forward"` for those of logits alone: gradients are then as exact as these logits allow. They need a GPU
        of compute capability 8.9 or later; with `implementation="xla"` the same numbers are computed on any device,
        slowly. With `"none"`, memory is that of `"mean"`. There is no `jax.export` for GPUs. docs/float8.md has speed,
        errors, training, and when to use it. None for products in hidden's dtype.
      skip_gradients_below: `ε` from 0 to 1, such as `2**-12`: logit gradients of at most ε times their token's weight
        may be approximated where 128 of them are adjacent, which takes about half the time on a GPU. Gradients in the
        labels' columns are not approximated. What is approximated keeps its sum over each token and each column. On a
        GPU all is computed in full if more than about a fifth is larger. Not with `"none"`, label smoothing, 8-bit
        products or a vocabulary that is sharded. None computes all in full. docs/skip_gradients.md has errors and
        memory.

    Returns:
      The loss, float32 (float64 for float64 hidden states): `[]`, or `[*B]` with `"none"`. With `return_metrics`, that
      and the metrics.

    Raises:
      ValueError: a shape that doesn't fit, an option out of its range, or `"triton"` without a GPU.
      TypeError: an argument that is not an array, an unsupported dtype, or an option that is not a Python number.
      NotImplementedError: an unsupported combination.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 5, 8))
      >>> kernel = jax.random.normal(jax.random.key(1), (8, 32))
      >>> labels = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, -100, -100]])
      >>> loss, grad = jax.value_and_grad(jliger.fused_linear_cross_entropy)(hidden, kernel, labels)
      >>> print(loss.shape, grad.shape, bool(jnp.all(grad[1, 3:] == 0)))
      () (2, 5, 8) True
      >>> loss, metrics = jliger.fused_linear_cross_entropy(hidden, kernel, labels, z_loss=1e-4, return_metrics=True)
      >>> print(metrics.weight, bool(jnp.allclose(loss, metrics.cross_entropy + metrics.z_loss)))
      8.0 True

      The mean of each sequence's mean, with one kernel gradient for all:

      >>> weights = jnp.broadcast_to(1 / (labels != -100).sum(-1, keepdims=True), labels.shape)
      >>> loss = jliger.fused_linear_cross_entropy(hidden, kernel, labels, weights=weights)
      >>> means = jax.vmap(jliger.fused_linear_cross_entropy, (0, None, 0))(hidden, kernel, labels)
      >>> print(bool(jnp.allclose(loss, means.mean())))
      True
    """
    _check_loss_options(label_smoothing, z_loss, reduction, normalizer, skip_gradients_below, products)
    arguments = head_arguments(
        hidden,
        kernel,
        labels,
        bias=bias,
        where=where,
        ignore_index=ignore_index,
        kernel_layout=kernel_layout,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        precision=precision,
        chunk_size=chunk_size,
        vocab_axis_name=vocab_axis_name,
        adapter=adapter,
        implementation=implementation,
        stats_wanted=StatsWanted(weighted_sum=label_smoothing > 0),
    )
    arguments = with_products(arguments, products)
    config = dataclasses.replace(arguments.config, skip_below=skip_gradients_below)
    call = _Call(config, float(label_smoothing), float(z_loss), reduction, arguments.ignore_index)
    arrays = (arguments.operands, arguments.adapter, arguments.labels, arguments.where)
    loss, metrics = _fused_linear_cross_entropy(call, *arrays, *_weights(arguments, weights, class_weights, normalizer))
    return (loss, metrics) if return_metrics else loss


def _check_loss_options(
    label_smoothing: Any, z_loss: Any, reduction: Any, normalizer: Any, skip_gradients_below: Any, products: Any
) -> None:
    checks.check_number("label_smoothing", label_smoothing, least=0, most=1)
    checks.check_number("z_loss", z_loss, least=0)
    checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer divides a mean; with reduction={reduction!r} divide the result, or pass 'mean'.")
    if skip_gradients_below is None:
        return
    checks.check_number("skip_gradients_below", skip_gradients_below, least=0, most=1)
    if reduction == "none":
        raise NotImplementedError("skip_gradients_below got reduction='none'; pass 'mean' or 'sum'.")
    if products is not None:
        raise NotImplementedError(f"skip_gradients_below got products={products!r}; pass one of the two options.")
    if label_smoothing:
        raise NotImplementedError(
            f"skip_gradients_below got label_smoothing={label_smoothing!r}, which gives every column a gradient; pass "
            "one of the two options."
        )


def _weights(
    arguments: Arguments, weights: Any, class_weights: Any, normalizer: Any
) -> tuple[Array | None, Array | None, Array | None]:
    """Checks the weights of tokens and columns, and the normalizer; converts them to arrays."""
    config, operands = arguments.config, arguments.operands
    if weights is not None:
        weights = checks.as_array("weights", weights)
        checks.check_weights(weights, arguments.labels)
    if class_weights is not None:
        class_weights = checks.as_array("class_weights", class_weights)
        head_checks.check_vocab_vector("class_weights", class_weights, operands.kernel, config.vocab_dim)
    if normalizer is not None:
        normalizer = checks.as_array("normalizer", normalizer)
        checks.check_normalizer(normalizer)
    return weights, class_weights, normalizer


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    config: HeadConfig
    label_smoothing: float
    z_loss: float
    reduction: Reduction
    ignore_index: int | None


@functools.partial(jax.jit, static_argnums=0)
def _fused_linear_cross_entropy(
    call: _Call,
    operands: Operands,
    adapter: LinearAdapter | None,
    labels: Integer[Array, "*B"],
    where: Bool[Array, "*B"] | None,
    weights: Float[Array, "*B"] | None,
    class_weights: Float[Array, " V"] | None,
    normalizer: Num[Array, ""] | None,
) -> tuple[Loss, CrossEntropyMetrics]:
    dtype = accumulator_dtype(operands.hidden.dtype)
    operands = with_adapter(call.config, operands, adapter)
    weights, class_weights, normalizer = jax.lax.stop_gradient((weights, class_weights, normalizer))
    loss_function = CrossEntropy(call.label_smoothing, call.z_loss, sharding.vocab_size(call.config, operands.kernel))
    operands = with_tokens(operands, labels, where, ignore_index=call.ignore_index, vocab_size=loss_function.vocab_size)
    columns, counted = operands.labels, operands.counted
    weights = jnp.ones_like(columns, dtype) if weights is None else weights.astype(dtype)
    token_weights = if_counted(counted, weights, 0)
    weight = token_weights.sum()
    label_terms = LabelTerms(column_validity(columns, dtype), None, float(loss_function.vocab_size))
    if class_weights is not None:
        class_weights = class_weights.astype(dtype)
        label_terms = label_terms._replace(
            weights=sharding.label_weights(call.config, class_weights, columns),
            total_weight=sharding.total_class_weight(call.config, class_weights),
        )
    smoothing_weights = class_weights if call.config.stats_wanted.weighted_sum else None
    operands = operands._replace(class_weights=smoothing_weights)

    skipped_mass = None
    if call.reduction == "none":
        stats = gradients.token_stats(call.config, False, operands)[0]
        cross_entropy, z_loss = loss_function.token_losses(stats, label_terms)
        cross_entropy, z_loss = cross_entropy * token_weights, z_loss * token_weights
        loss = cross_entropy + z_loss
    else:
        loss_weights = LossWeights(token_weights, token_weights)
        if call.reduction == "mean":
            by_label = token_weights if label_terms.weights is None else token_weights * label_terms.weights
            divisors = (by_label.sum(), weight) if normalizer is None else (normalizer.astype(dtype),) * 2
            loss_weights = LossWeights(*(token_weights * _inverse(divisor) for divisor in divisors))
        loss, stats, skipped = gradients.weighted_loss(call.config, loss_function, operands, label_terms, loss_weights)
        stats = jax.lax.stop_gradient(stats)
        if skipped is not None:
            skipped_mass = _inverse(weight) * jnp.sum(token_weights * skipped)
        cross_entropy, z_loss = loss_function.weighted_sums(stats, label_terms, loss_weights)
    return loss, jax.lax.stop_gradient(
        CrossEntropyMetrics(
            weight=weight,
            cross_entropy=cross_entropy,
            z_loss=z_loss,
            accuracy=_inverse(weight) * jnp.sum(jnp.where(stats.prediction == columns, token_weights, 0)),
            predictions=stats.prediction,
            skipped_mass=skipped_mass,
        )
    )


def _inverse(divisor: Float[Array, ""]) -> Float[Array, ""]:
    """`1 / divisor`, and 0 for 0."""
    return jnp.where(divisor == 0, 0, 1 / jnp.where(divisor == 0, 1, divisor))
