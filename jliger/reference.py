"""Reference implementations in plain JAX on full logits.

In float64 they are the oracle of the tests; in other dtypes they are the baseline of benchmarks. They share no code
with the fused operations, so that an error in one is not an error in both. They are not fast.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head.cross_entropy import CrossEntropyMetrics
from jliger.ops.linear_head.distillation import DistillationMetrics
from jliger.ops.linear_head.logprobs import LinearLogprobs
from jliger.ops.linear_head.top_k import LinearTopK


def fused_linear_cross_entropy(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    weights: Float[Array, "*B"] | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: Float[Array, " V"] | None = None,
    reduction: str = "mean",
    normalizer: Num[Array, ""] | float | None = None,
    return_metrics: bool = False,
    **head: Any,
) -> Any:
    """`jliger.fused_linear_cross_entropy` on full logits, with the same arguments and results.

    Products are in hidden's dtype and everything else in float32, as in an unfused model; for float64 inputs all is in
    float64. A label out of range gives NaN. `**head` are the options that say how logits are computed; others, such as
    `chunk_size`, `vocab_axis_name` and `implementation`, are accepted and ignored.
    """
    logits = _logits(hidden, kernel, **head)
    dtype, vocab_size = logits.dtype, logits.shape[-1]
    counted, inside, safe = _labels(labels, where, ignore_index, vocab_size)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    w = jnp.ones((vocab_size,), dtype) if class_weights is None else jax.lax.stop_gradient(class_weights).astype(dtype)
    w = w[:vocab_size]
    nll = -jnp.take_along_axis(log_probs, safe[..., None], axis=-1)[..., 0]
    weighted = jnp.broadcast_to(w, log_probs.shape) * log_probs
    cross_entropy = (1 - label_smoothing) * w[safe] * nll - label_smoothing * jnp.mean(weighted, axis=-1)
    cross_entropy = jnp.where(inside, cross_entropy, jnp.nan)
    token_weights = 1.0 if weights is None else jax.lax.stop_gradient(weights).astype(dtype)
    token_weights = jnp.where(counted, token_weights, 0)
    cross_entropy = jnp.where(counted, cross_entropy, 0) * token_weights
    z_losses = jnp.where(counted, z_loss * lse**2, 0) * token_weights

    weight = token_weights.sum()
    if reduction != "none":
        by_label, by_weight = (token_weights * w[safe]).sum(), weight
        if normalizer is not None:
            by_label = by_weight = jnp.asarray(normalizer, dtype)
        if reduction == "sum":
            by_label = by_weight = jnp.ones((), dtype)
        cross_entropy = jnp.where(by_label == 0, 0, cross_entropy.sum() / jnp.where(by_label == 0, 1, by_label))
        z_losses = jnp.where(by_weight == 0, 0, z_losses.sum() / jnp.where(by_weight == 0, 1, by_weight))
    loss = cross_entropy + z_losses
    predictions = jnp.where(counted, jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)
    correct = jnp.sum(token_weights, where=predictions == labels)
    accuracy = jnp.where(weight == 0, 0, correct / jnp.where(weight == 0, 1, weight))
    metrics = CrossEntropyMetrics(weight, cross_entropy, z_losses, accuracy, predictions)
    return (loss, jax.lax.stop_gradient(metrics)) if return_metrics else loss


def linear_logprobs(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    ignore_index: int | None = -100,
    **head: Any,
) -> LinearLogprobs:
    """`jliger.linear_logprobs` on full logits, with the same arguments and results."""
    logits = _logits(hidden, kernel, **head)
    counted, inside, safe = _labels(labels, where, ignore_index, logits.shape[-1])
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    logprobs = jnp.take_along_axis(log_probs, safe[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(_times(jnp.exp(log_probs), log_probs), axis=-1)
    predictions = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return LinearLogprobs(
        logprobs=jnp.where(counted, jnp.where(inside, logprobs, jnp.nan), 0),
        logsumexp=jnp.where(counted, jax.nn.logsumexp(logits, axis=-1), 0),
        entropy=jnp.where(counted, entropy, 0),
        predictions=jnp.where(counted, predictions, -1),
    )


def fused_linear_kl(*operands: Any, direction: str = "forward", **options: Any) -> Any:
    """`jliger.losses.fused_linear_kl` on full logits of both models, with the same arguments and results."""
    return fused_linear_jsd(*operands, beta=0.0 if direction == "forward" else 1.0, **options)


def fused_linear_jsd(
    student_hidden: Float[Array, "*B H"],
    student_kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B G"],
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    labels: Integer[Array, "*B"] | None = None,
    hard_weight: Any = 0.0,
    soft_weight: Any = 1.0,
    where: Bool[Array, "*B"] | None = None,
    weights: Float[Array, "*B"] | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normalizer: Num[Array, ""] | float | None = None,
    return_metrics: bool = False,
    **heads: Any,
) -> Any:
    """`jliger.losses.fused_linear_jsd` on full logits of both models, with the same arguments and results."""
    student = _logits(student_hidden, student_kernel, **_options_of("student_", heads))
    teacher = _logits(teacher_hidden, teacher_kernel, **_options_of("teacher_", heads))
    teacher = jax.lax.stop_gradient(teacher)
    log_p, log_r = jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)
    of_teacher = jnp.argmax(teacher, axis=-1).astype(jnp.int32)
    return _distillation(
        student, _divergence(beta, log_p, log_r), of_teacher, labels, hard_weight, soft_weight,
        where, weights, ignore_index, reduction, normalizer, return_metrics,
    )  # fmt: skip


def linear_top_k(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    k: int,
    *,
    where: Bool[Array, "*B"] | None = None,
    **head: Any,
) -> LinearTopK:
    """`jliger.linear_top_k` on full logits, with the same arguments and results."""
    logits = jax.lax.stop_gradient(_logits(hidden, kernel, **head))
    values, ids = jax.lax.top_k(logits, k)
    lse = jax.nn.logsumexp(logits, axis=-1)
    counted = jnp.ones_like(lse, bool) if where is None else where
    every = counted[..., None]
    return LinearTopK(
        ids=jnp.where(every, ids, -1),
        logprobs=jnp.where(every, values - lse[..., None], 0),
        logsumexp=jnp.where(counted, lse, 0),
    )


def fused_linear_top_k_kl(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_ids: Integer[Array, "*B K"],
    teacher_logprobs: Float[Array, "*B K"],
    *,
    normalize: str = "vocab",
    remainder: bool = False,
    temperature: float = 1.0,
    labels: Integer[Array, "*B"] | None = None,
    hard_weight: Any = 0.0,
    soft_weight: Any = 1.0,
    where: Bool[Array, "*B"] | None = None,
    weights: Float[Array, "*B"] | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normalizer: Num[Array, ""] | float | None = None,
    return_metrics: bool = False,
    **head: Any,
) -> Any:
    """`jliger.losses.fused_linear_top_k_kl` on full logits, with the same arguments and results."""
    student = _logits(hidden, kernel, **head)
    vocab_size = student.shape[-1]
    teacher_ids, logprobs = jax.lax.stop_gradient((teacher_ids, teacher_logprobs.astype(student.dtype)))
    present = teacher_ids >= 0
    # Of equal ids the first gets the sum of all.
    equal = (teacher_ids[..., :, None] == teacher_ids[..., None, :]) & present[..., None, :]
    r = jnp.where(equal, jnp.exp(logprobs)[..., None, :], 0).sum(axis=-1)
    present &= ~jnp.tril(equal, -1).any(axis=-1)
    r = jnp.where(present, r, 0)
    of_teacher = jnp.where(r == r.max(axis=-1, keepdims=True), teacher_ids, vocab_size)
    of_teacher = jnp.where(present, of_teacher, vocab_size).min(axis=-1)
    safe = jnp.where(present & (teacher_ids < vocab_size), teacher_ids, 0)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(student / temperature), safe, axis=-1)
    if normalize == "top_k":
        r = r ** (1 / temperature)
        total = r.sum(axis=-1, keepdims=True)
        r = r / jnp.where(total == 0, 1, total)
        log_p = jax.nn.log_softmax(log_p, where=present, axis=-1)
    log_r = jnp.log(jnp.where(r == 0, 1, r))
    divergence = jnp.sum(r * (log_r - jnp.where(r == 0, 0, log_p)), axis=-1)
    if remainder:
        named = (safe[..., None] == jnp.arange(vocab_size)) & present[..., None]
        others = ~named.any(axis=-2)
        rest = jnp.where(others.any(axis=-1), jnp.maximum(1 - r.sum(axis=-1), 0), 0)
        log_rest = jax.nn.logsumexp(jax.nn.log_softmax(student / temperature), where=others, axis=-1)
        log_rho = jnp.log(jnp.where(rest == 0, 1, rest))
        divergence += rest * (log_rho - jnp.where(rest == 0, 0, log_rest))
    divergence = jnp.where((teacher_ids < vocab_size).all(axis=-1), divergence, jnp.nan)
    return _distillation(
        student, divergence, jnp.where(of_teacher == vocab_size, -1, of_teacher).astype(jnp.int32), labels, hard_weight,
        soft_weight, where, weights, ignore_index, reduction, normalizer, return_metrics,
    )  # fmt: skip


def _distillation(
    student: Float[Array, "*B V"],
    divergence: Float[Array, "*B"],
    of_teacher: Int[Array, "*B"],
    labels: Integer[Array, "*B"] | None,
    hard_weight: Any,
    soft_weight: Any,
    where: Bool[Array, "*B"] | None,
    weights: Float[Array, "*B"] | None,
    ignore_index: int | None,
    reduction: str,
    normalizer: Num[Array, ""] | float | None,
    return_metrics: bool,
) -> Any:
    """Reduces divergences and cross entropies; `of_teacher` are the teacher's predictions."""
    weights = jax.lax.stop_gradient(weights)
    dtype = student.dtype
    some_labels = jnp.zeros(student.shape[:-1], jnp.int32) if labels is None else labels
    # Without labels all tokens count, for any ignore_index.
    index = -1 if labels is None else ignore_index
    counted, inside, safe = _labels(some_labels, where, index, student.shape[-1])

    cross_entropy = -jnp.take_along_axis(jax.nn.log_softmax(student), safe[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.where(inside, cross_entropy, jnp.nan)

    token_weights = jnp.where(counted, 1.0 if weights is None else weights.astype(dtype), 0)
    weight = token_weights.sum()
    denominator = jnp.asarray(1.0 if reduction == "sum" else weight if normalizer is None else normalizer, dtype)

    def reduced(values: Float[Array, "*B"]) -> Float[Array, ""]:
        total = (jnp.where(counted, values, 0) * token_weights).sum()
        return jnp.where(denominator == 0, 0, total / jnp.where(denominator == 0, 1, denominator))

    def share_of_weight(true: Bool[Array, "*B"]) -> Float[Array, ""]:
        return jnp.where(weight == 0, 0, jnp.sum(token_weights, where=true) / jnp.where(weight == 0, 1, weight))

    divergence, cross_entropy = reduced(divergence), reduced(cross_entropy)
    with_labels = not isinstance(hard_weight, int | float) or hard_weight != 0
    loss = soft_weight * divergence + (hard_weight * cross_entropy if with_labels else 0)
    predictions, teacher_predictions = (
        jnp.where(counted, columns, -1) for columns in (jnp.argmax(student, axis=-1).astype(jnp.int32), of_teacher)
    )
    metrics = DistillationMetrics(
        weight=weight,
        divergence=divergence,
        cross_entropy=cross_entropy if with_labels else None,
        accuracy=None if labels is None else share_of_weight(predictions == labels),
        agreement=share_of_weight(predictions == teacher_predictions),
        predictions=predictions,
        teacher_predictions=teacher_predictions,
    )
    return (loss, jax.lax.stop_gradient(metrics)) if return_metrics else loss


def _divergence(beta: float, log_p: Float[Array, "*B V"], log_r: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    if beta == 0:
        return _kl(log_r, log_p)
    if beta == 1:
        return _kl(log_p, log_r)
    log_m = jnp.logaddexp(log_p + jnp.log1p(-beta), log_r + jnp.log(beta))
    return beta * _kl(log_r, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    return jnp.sum(_times(jnp.exp(log_p), log_p - log_q), axis=-1)


def _times(p: Float[Array, "*B V"], factor: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """`p · factor`, and 0 where `p` is 0, even if the factor is infinite."""
    return p * jnp.where(p == 0, 0, factor)


def _options_of(whose: str, heads: dict[str, Any]) -> dict[str, Any]:
    """One head's options, and those that have no head's name before them, without that name."""
    return {name.removeprefix(whose): value for name, value in heads.items()}


def _logits(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    *,
    bias: Float[Array, " V"] | Float[Array, "*B V"] | None = None,
    adapter: Any = None,
    kernel_layout: str = "hv",
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: Any = 1.0,
    vocab_size: int | None = None,
    logits_dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    **unused: Any,
) -> Float[Array, "*B V"]:
    del unused

    def product(left: Array, right: Array, equation: str) -> Array:
        return jnp.einsum(
            equation,
            left,
            right.astype(left.dtype),
            precision=precision,
            preferred_element_type=logits_dtype or hidden.dtype,
        )

    dtype = accumulator_dtype(hidden.dtype)
    logits = product(hidden, kernel, "...h,hv->...v" if kernel_layout == "hv" else "...h,vh->...v")
    if adapter is not None:
        low = jnp.einsum("...h,hr->...r", hidden, adapter.a.astype(hidden.dtype), precision=precision)
        logits = logits + product(low * jnp.asarray(adapter.scale, low.dtype), adapter.b, "...r,rv->...v")
    logits = logits.astype(dtype)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias.astype(dtype), logits.shape)
    logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, dtype))
    temperature = jnp.where(temperature > 0, temperature, jnp.nan)
    logits = logits / (temperature if temperature.ndim == 0 else temperature[..., None])
    return logits[..., :vocab_size]


def _labels(
    labels: Integer[Array, "*B"], where: Bool[Array, "*B"] | None, ignore_index: int | None, vocab_size: int
) -> tuple[Bool[Array, "*B"], Bool[Array, "*B"], Int[Array, "*B"]]:
    """Which tokens count, which labels are in range, and labels with 0 for those that are not."""
    counted = jnp.ones_like(labels, bool) if ignore_index is None else labels != ignore_index
    if where is not None:
        counted &= where
    inside = (labels >= 0) & (labels < vocab_size)
    return counted, inside, jnp.where(counted & inside, labels, 0)
