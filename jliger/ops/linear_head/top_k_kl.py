"""top_k_kl: `fused_linear_top_k_kl`, distillation from the few log-probabilities of a teacher that were kept."""

import dataclasses
import functools
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from jliger.core import checks
from jliger.core.checks import coefficient
from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import with_tokens_of
from jliger.core.reduction import Normalizer
from jliger.ops.linear_head import sharding
from jliger.ops.linear_head.adapter import LinearAdapter, with_adapter
from jliger.ops.linear_head.arguments import HeadOptions, head_arguments, one_or_nan
from jliger.ops.linear_head.distillation_arguments import Call, check_loss_options
from jliger.ops.linear_head.distillation_reduction import DistillationMetrics, KnownTeacher, Loss, reduced_distillation
from jliger.ops.linear_head.types import Operands
from jliger.ops.logits import StatsWanted
from jliger.ops.logits.top_k_divergence import TopKDivergence


class TopKOptions(HeadOptions, total=False):
    """The options of `fused_linear_top_k_kl`."""

    normalize: Literal["vocab", "top_k"]
    remainder: bool
    labels: Int[Array, "*B"] | None
    hard_weight: Float[Array, ""] | float
    soft_weight: Float[Array, ""] | float
    weights: Float[Array, "*B"] | None
    reduction: Literal["mean", "sum"]
    normalizer: Normalizer


@overload
def fused_linear_top_k_kl(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_ids: Integer[Array, "*B K"],
    teacher_logprobs: Float[Array, "*B K"],
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[TopKOptions],
) -> Loss: ...


@overload
def fused_linear_top_k_kl(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_ids: Integer[Array, "*B K"],
    teacher_logprobs: Float[Array, "*B K"],
    *,
    return_metrics: Literal[True],
    **options: Unpack[TopKOptions],
) -> tuple[Loss, DistillationMetrics]: ...


@overload
def fused_linear_top_k_kl(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_ids: Integer[Array, "*B K"],
    teacher_logprobs: Float[Array, "*B K"],
    *,
    return_metrics: bool,
    **options: Unpack[TopKOptions],
) -> Loss | tuple[Loss, DistillationMetrics]: ...


def fused_linear_top_k_kl(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_ids: Integer[Array, "*B K"],
    teacher_logprobs: Float[Array, "*B K"],
    *,
    return_metrics: bool = False,
    **options: Unpack[TopKOptions],
) -> Loss | tuple[Loss, DistillationMetrics]:
    r"""Forward KL divergence from a teacher of which K log-probabilities a token are known, such as its largest.

    The teacher runs once, `jliger.linear_top_k` gives its largest log-probabilities, and the student learns from what
    was kept of them: no teacher, and no logits `[tokens, V]`, at training time.

    With the student's logits $z$ as in `jliger.fused_linear_cross_entropy`, temperature $\tau$,
    $p = \mathrm{softmax}(z / \tau)$, and the teacher's probabilities $r_k$ of the columns $v_k$, a token's loss is

    $$w_{soft}\, D + w_{hard}\, (\mathrm{lse}(z) - z_y), \qquad D = \sum_k r_k \log \frac{r_k}{p_{v_k}}$$

    * `normalize="vocab"`: $r_k = e^{\mathrm{logprob}_k}$, which are probabilities among all columns at temperature
      $\tau$, and so is $p$. They may add up to less than 1. With `remainder=True`, everything else is one more column:
      $D$ then has a term $\rho \log (\rho / P)$ with $\rho = 1 - \sum_k r_k$ and $P$ the student's probability of all
      columns that the teacher does not name. It is a proper divergence, 0 only if all of these probabilities are equal;
      without it, $D$ has its minimum there, too, but may be negative.
    * `normalize="top_k"`: both distributions are renormalised over the K columns:
      $r = \mathrm{softmax}(\mathrm{logprobs} / \tau)$, and $p = \mathrm{softmax}(z_{v} / \tau)$ over the $v_k$ alone.
      The log-probabilities are those of temperature 1. The student's other logits get no gradient.

    With K = 1 and probability 1, `"vocab"` is the cross entropy with $v_1$; with all columns it is
    `jliger.losses.fused_linear_kl`. As there, $D$ is not multiplied by $\tau^2$, and the hard part, the cross entropy
    with labels $y$, is at temperature 1.

    Differentiable once, in reverse mode, in `hidden`, `kernel`, `bias` and `adapter`; only the gradients that are
    needed are computed, together with the loss, with three matrix products. Gradients have their argument's dtype and
    are summed in float32. The teacher's arrays carry no gradient.

    Which tokens count, and what an invalid label does, is as in `jliger.losses.fused_linear_kl`. Memory is that of
    `jliger.fused_linear_cross_entropy`, and of a few copies of the teacher's arrays.

    Args:
      hidden: the student's last hidden states, `[*B, H]`: float32, bfloat16, float16, or float64 (XLA only).
      kernel: the student's head, `[H, V]`, or `[V, H]` with `kernel_layout="vh"`: hidden's dtype or float32.
      teacher_ids: the columns $v_k$, `[*B, K]`, integers, in any order. A negative id is a column that is absent.
        Probabilities of equal ids add up. An id that is too large makes the loss and the gradients NaN, if its token
        counts. With K above 4096, `implementation=None` is `"xla"`.
      teacher_logprobs: the teacher's log-probabilities of these columns, `[*B, K]`, of any floating-point dtype.
      return_metrics: also return `jliger.losses.DistillationMetrics`. The teacher's predictions are its most likely
        columns.
      **options: those of every head, which `jliger.linear_logprobs` documents, with `temperature` a Python number; and
        those of this loss:

        * `normalize`: `"vocab"`, the default, or `"top_k"`.
        * `remainder`: whether to compare the probability of everything else; with `"vocab"` only.
        * `labels`, `hard_weight`, `soft_weight`, `weights`, `reduction`, `normalizer`: as in
          `jliger.losses.fused_linear_kl`.

    Returns:
      The loss, float32 (float64 for float64 hidden states), `[]`. With `return_metrics`, that and the metrics.

    Raises:
      ValueError: a shape that doesn't fit, an option out of its range, or `"triton"` without a GPU.
      TypeError: an argument that is not an array, an unsupported dtype, or an option that is not a Python number.
      NotImplementedError: an unsupported combination.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> from jliger import losses
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> student = jax.random.normal(keys[0], (2, 5, 8)), jax.random.normal(keys[1], (8, 32))
      >>> teacher = jax.random.normal(keys[2], (2, 5, 16)), jax.random.normal(keys[3], (16, 32))
      >>> top = jliger.linear_top_k(*teacher, 4)
      >>> loss, grads = jax.value_and_grad(losses.fused_linear_top_k_kl, (0, 1))(*student, top.ids, top.logprobs)
      >>> log_p = jnp.take_along_axis(jax.nn.log_softmax(student[0] @ student[1]), top.ids, axis=-1)
      >>> expected = (jnp.exp(top.logprobs) * (top.logprobs - log_p)).sum(-1).mean()
      >>> print(bool(jnp.allclose(loss, expected, rtol=1e-5)), grads[0].shape)
      True (2, 5, 8)
    """
    loss, metrics = _top_k_kl(*_arguments(hidden, kernel, teacher_ids, teacher_logprobs, options))
    return (loss, metrics) if return_metrics else loss


# The Triton kernels hold a row's columns in registers.
_MOST_COLUMNS = 4096
_OF_THE_LOSS = TopKOptions.__annotations__.keys() - HeadOptions.__annotations__.keys() | {"temperature"}


def _arguments(hidden: Any, kernel: Any, ids: Any, logprobs: Any, options: TopKOptions) -> tuple[Any, ...]:
    """The arguments of `_top_k_kl`, checked."""
    normalize, remainder = options.get("normalize", "vocab"), options.get("remainder", False)
    temperature, normalizer = options.get("temperature", 1.0), options.get("normalizer")
    reduction = options.get("reduction", "mean")
    checks.check_choice("normalize", normalize, ("vocab", "top_k"))
    check_loss_options(temperature, reduction, normalizer)
    if not isinstance(remainder, bool):
        raise TypeError(f"remainder got {remainder!r}; pass True or False.")
    if remainder and normalize != "vocab":
        raise ValueError(f"remainder got True with normalize={normalize!r}; nothing remains there: pass 'vocab'.")
    hidden, ids = checks.as_array("hidden", hidden), checks.as_array("teacher_ids", ids)
    logprobs = checks.as_array("teacher_logprobs", logprobs)
    dtype = accumulator_dtype(hidden.dtype)
    hard_weight = coefficient("hard_weight", options.get("hard_weight", 0.0), dtype, least=0)
    soft_weight = coefficient("soft_weight", options.get("soft_weight", 1.0), dtype, least=0)
    with_labels = not (isinstance(hard_weight, float) and hard_weight == 0)
    labels, weights = options.get("labels"), options.get("weights")
    if labels is None and with_labels:
        raise ValueError("labels got None with a hard_weight; pass the labels that the cross entropy is to be with.")
    some_labels = jnp.zeros(hidden.shape[:-1], jnp.int32) if labels is None else labels
    of_head: Any = {name: value for name, value in options.items() if name not in _OF_THE_LOSS}
    head = head_arguments(hidden, kernel, some_labels, stats_wanted=StatsWanted(), **of_head)
    _check_teacher(hidden, ids, logprobs)
    if weights is not None:
        weights = checks.as_array("weights", weights)
        checks.check_weights(weights, head.labels)
    divergence = TopKDivergence(normalize, remainder, float(temperature), with_labels)
    config = dataclasses.replace(head.config, teacher=divergence)
    if ids.shape[-1] > _MOST_COLUMNS:
        if options.get("implementation") == "triton":
            raise ValueError(
                f"teacher_ids got {ids.shape[-1]} columns for each token, of which the Triton kernels take at most "
                f"{_MOST_COLUMNS}; pass fewer, or implementation='xla'."
            )
        config = dataclasses.replace(config, implementation="xla")
    call = Call(config, reduction, head.ignore_index)
    labels = None if labels is None else head.labels
    arrays = head.operands, (ids, logprobs), head.adapter, labels, head.where, weights
    return call, *arrays, normalizer, hard_weight, soft_weight


def _check_teacher(hidden: Any, ids: Any, logprobs: Any) -> None:
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"teacher_ids got dtype {ids.dtype}; pass integers.")
    checks.check_floating("teacher_logprobs", logprobs)
    if ids.shape[:-1] != hidden.shape[:-1] or ids.ndim != hidden.ndim or not ids.shape[-1]:
        raise ValueError(
            f"teacher_ids got shape {ids.shape} with hidden of shape {hidden.shape}; pass [*B, K]: K columns, at least "
            "one, for each of the same tokens."
        )
    checks.check_shape("teacher_logprobs", logprobs, ids.shape, "one for each of teacher_ids")


@functools.partial(jax.jit, static_argnums=0)
def _top_k_kl(
    call: Call,
    operands: Operands,
    teacher: tuple[Integer[Array, "*B K"], Float[Array, "*B K"]],
    adapter: LinearAdapter | None,
    labels: Integer[Array, "*B"] | None,
    where: Bool[Array, "*B"] | None,
    weights: Float[Array, "*B"] | None,
    normalizer: Normalizer,
    hard_weight: Float[Array, ""],
    soft_weight: Float[Array, ""],
) -> tuple[Loss, DistillationMetrics]:
    operands = with_adapter(call.config, operands, adapter)
    divergence, vocab_size = call.config.teacher, sharding.vocab_size(call.config, operands.kernel)
    assert isinstance(divergence, TopKDivergence)
    dtype = accumulator_dtype(operands.hidden.dtype)
    # Explicit mesh axes may shard a teacher's arrays in other ways, over the columns too, which are sorted here.
    ids, logprobs = (with_tokens_of(operands.hidden, array) for array in jax.lax.stop_gradient(teacher))
    inside = ids <= min(vocab_size - 1, jnp.iinfo(ids.dtype).max)
    ids, log_r = _merged(jnp.where(inside & (ids >= 0), ids, -1).astype(jnp.int32), logprobs.astype(dtype))
    best = jnp.argmax(log_r, axis=-1, keepdims=True)
    known = KnownTeacher(
        predictions=jnp.take_along_axis(ids, best, axis=-1)[..., 0],
        validity=one_or_nan(inside.all(axis=-1), dtype),
    )
    rest = None
    if divergence.normalize == "top_k":
        log_r = log_r * (1 / divergence.temperature)
        total = jax.nn.logsumexp(log_r, axis=-1, keepdims=True)
        log_r = jnp.where(total == -jnp.inf, -jnp.inf, log_r - total)
    if divergence.remainder:
        # If all columns are named, there is no other, whatever the rounding of the sum.
        is_partial = (ids >= 0).sum(axis=-1) < vocab_size
        rest = jnp.where(is_partial, jnp.maximum(1 - jnp.exp(log_r).sum(axis=-1), 0), 0)
    operands = operands._replace(teacher_ids=ids, teacher_logprobs=log_r, teacher_rest=rest)
    return reduced_distillation(call, operands, labels, where, weights, normalizer, hard_weight, soft_weight, known)


def _merged(ids: Int[Array, "*B K"], logprobs: Float[Array, "*B K"]) -> tuple[Int[Array, "*B K"], Float[Array, "*B K"]]:
    """Sorted ids, each of them once, and log-probabilities, added up over equal ids; −1 and −∞ for none."""
    ids, logprobs = jax.lax.sort((ids, logprobs), num_keys=1, is_stable=False)
    is_last = jnp.concatenate([ids[..., 1:] != ids[..., :-1], jnp.ones_like(ids[..., :1], bool)], axis=-1)
    # The last of equal ids gets the sum of all: each adds the sum that ends `step` places before it, for steps of 1, 2,
    # 4 and so on. Ids are sorted, so if two are equal, all between them are.
    step = 1
    while step < ids.shape[-1]:
        is_equal = ids[..., step:] == ids[..., :-step]
        sums = jnp.logaddexp(logprobs[..., step:], jnp.where(is_equal, logprobs[..., :-step], -jnp.inf))
        logprobs = jnp.concatenate([logprobs[..., :step], sums], axis=-1)
        step *= 2
    ids = jnp.where(is_last, ids, -1)
    return ids, jnp.where(ids < 0, -jnp.inf, logprobs)
