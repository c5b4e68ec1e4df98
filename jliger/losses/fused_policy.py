"""Policy-gradient losses that are fused with a linear head: three matrix products, and no logits `[tokens, V]`."""

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.core import checks
from jliger.core.dtypes import accumulator_dtype
from jliger.core.reduction import Normalizer, divided
from jliger.losses.fused import HeadTokens, check_arguments, mean_over
from jliger.losses.policy import MEANS_OF_SEQUENCES, PER_SEQUENCE, GRPOLossType, PolicyMetrics, grpo, ppo_clip
from jliger.ops.linear_head.logprob_loss import LossHeadOptions
from jliger.ops.logits.unit_loss import LinearLogprobs


def fused_linear_grpo(
    hidden: Float[Array, "*B T H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "*B T"],
    advantages: Float[Array, "*B"] | Float[Array, "*B T"],
    *,
    old_logprobs: Float[Array, "*B T"] | None = None,
    ref_logprobs: Float[Array, "*B T"] | None = None,
    weights: Float[Array, "*B T"] | None = None,
    loss_type: GRPOLossType = "dapo",
    importance_sampling_level: Literal["token", "sequence"] = "token",
    epsilon_low: Float[Array, ""] | float | None = None,
    epsilon_high: Float[Array, ""] | float | None = None,
    delta: float | None = None,
    sapo_tau_pos: Float[Array, ""] | float | None = None,
    sapo_tau_neg: Float[Array, ""] | float | None = None,
    beta: Float[Array, ""] | float = 0.0,
    entropy_coef: Float[Array, ""] | float = 0.0,
    entropy_metric: bool = False,
    max_completion_length: int | None = None,
    normalizer: Normalizer = None,
    **options: Unpack[LossHeadOptions],
) -> tuple[Float[Array, ""], PolicyMetrics]:
    """`jliger.losses.grpo` of a linear head's log-probabilities.

    The same loss, metrics and gradients as `grpo` with the results of `jliger.linear_logprobs`, with three matrix
    products instead of four: see `jliger.fused_linear_loss`.

    Args:
      hidden: the model's last hidden states, `[*B, T, H]`.
      kernel: the head's weights, `[H, V]`, or `[V, H]` with `kernel_layout="vh"`.
      tokens: the sampled tokens, `[*B, T]`: `hidden[..., t, :]` predicts `tokens[..., t]`.
      advantages: as in `grpo`; so are the options up to `beta`, and `max_completion_length` and `normalizer`. None of
        these arrays carries a gradient.
      old_logprobs: as in `grpo`.
      ref_logprobs: as in `grpo`.
      weights: as in `grpo`.
      loss_type: as in `grpo`.
      importance_sampling_level: `"token"`, or `"sequence"`, whose sequences are whole in a chunk, and on a device.
      epsilon_low: as in `grpo`.
      epsilon_high: as in `grpo`.
      delta: as in `grpo`.
      sapo_tau_pos: as in `grpo`.
      sapo_tau_neg: as in `grpo`.
      beta: as in `grpo`.
      entropy_coef: the factor of the head's entropy.
      entropy_metric: also compute the entropy for the metrics if `entropy_coef` is 0.
      max_completion_length: as in `grpo`.
      normalizer: as in `grpo`.
      **options: those of `jliger.fused_linear_loss`. The tokens that count are those of `where` and `ignore_index`.

    Returns:
      The loss, `[]`, and `PolicyMetrics`, as from `grpo`.

    Raises:
      ValueError, TypeError, NotImplementedError: what `grpo` and `jliger.fused_linear_loss` raise.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> from jliger import losses
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 5, 8))
      >>> kernel = jax.random.normal(jax.random.key(1), (8, 32))
      >>> tokens = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, -100, -100]])
      >>> advantages = jnp.array([1.0, -1.0])
      >>> loss, metrics = losses.fused_linear_grpo(hidden, kernel, tokens, advantages)
      >>> logprobs = jliger.linear_logprobs(hidden, kernel, tokens).logprobs
      >>> flat, _ = losses.grpo(logprobs, advantages, where=tokens != -100)
      >>> print(bool(jnp.allclose(loss, flat)), metrics.count)
      True 8
    """
    head = HeadTokens.make(hidden, kernel, tokens, options)
    if not head.tokens.ndim:
        raise ValueError("tokens got a scalar; pass an array [*B, T].")
    advantages = checks.as_array("advantages", advantages)
    of_tokens: Any = _given(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, weights=weights)
    given: dict[str, Any] = {
        "loss_type": loss_type,
        "importance_sampling_level": importance_sampling_level,
        "epsilon_low": epsilon_low,
        "epsilon_high": epsilon_high,
        "delta": delta,
        "sapo_tau_pos": sapo_tau_pos,
        "sapo_tau_neg": sapo_tau_neg,
        "beta": beta,
        "entropy_coef": entropy_coef,
        "max_completion_length": max_completion_length,
    }
    with_entropy = entropy_metric or not _is_zero(entropy_coef)

    def flat(logprobs: Array, entropy: Array) -> tuple[Array, PolicyMetrics]:
        arguments: Any = {**of_tokens, **given, "where": head.counted, "normalizer": normalizer}
        arguments["entropy"] = entropy if with_entropy else None
        return grpo(logprobs, advantages, **arguments)

    check_arguments(flat, head.hidden, head.tokens.shape, head.tokens.shape)
    arrays: dict[str, Any] = {"advantages": advantages, **of_tokens}
    counts = head.counted.sum(axis=-1)
    of_unit = {**given, "with_entropy": with_entropy}
    if importance_sampling_level == "sequence":
        total, result = _grpo_of_rows(head, of_unit, arrays)
    else:
        if advantages.shape != head.tokens.shape:
            arrays["advantages"] = jnp.broadcast_to(advantages[..., None], head.tokens.shape)
        if loss_type in MEANS_OF_SEQUENCES:
            arrays["shares"] = divided(head.counted.astype(accumulator_dtype(head.hidden.dtype)), counts[..., None])
        total, result = head.summed(_grpo_of_token, of_unit, arrays, "tokens")
    count = (counts > 0).sum() if loss_type in PER_SEQUENCE else counts.sum()
    return mean_over(total, count, normalizer), flat(*result)[1]


def fused_linear_ppo_clip(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "*B"],
    old_logprobs: Float[Array, "*B"],
    advantages: Float[Array, "*B"],
    *,
    weights: Float[Array, "*B"] | None = None,
    epsilon_low: Float[Array, ""] | float = 0.2,
    epsilon_high: Float[Array, ""] | float = 0.2,
    delta: float | None = None,
    entropy_coef: Float[Array, ""] | float = 0.0,
    entropy_metric: bool = False,
    normalizer: Normalizer = None,
    **options: Unpack[LossHeadOptions],
) -> tuple[Float[Array, ""], PolicyMetrics]:
    """`jliger.losses.ppo_clip` of a linear head's log-probabilities.

    The same loss, metrics and gradients as `ppo_clip` with the results of `jliger.linear_logprobs`, with three matrix
    products instead of four: see `jliger.fused_linear_loss`.

    Args:
      hidden: the model's last hidden states, `[*B, H]`.
      kernel: the head's weights, `[H, V]`, or `[V, H]` with `kernel_layout="vh"`.
      tokens: the sampled tokens, `[*B]`: `hidden[..., t, :]` predicts `tokens[..., t]`.
      old_logprobs: as in `ppo_clip`, as are the other arrays and options. None of these arrays carries a gradient.
      advantages: as in `ppo_clip`.
      weights: as in `ppo_clip`.
      epsilon_low: as in `ppo_clip`.
      epsilon_high: as in `ppo_clip`.
      delta: as in `ppo_clip`.
      entropy_coef: the factor of the head's entropy.
      entropy_metric: also compute the entropy for the metrics if `entropy_coef` is 0.
      normalizer: as in `ppo_clip`.
      **options: those of `jliger.fused_linear_loss`. The tokens that count are those of `where` and `ignore_index`.

    Returns:
      The loss, `[]`, and `PolicyMetrics`, as from `ppo_clip`.

    Raises:
      ValueError, TypeError, NotImplementedError: what `ppo_clip` and `jliger.fused_linear_loss` raise.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> from jliger import losses
      >>> hidden = jax.random.normal(jax.random.key(0), (5, 8))
      >>> kernel = jax.random.normal(jax.random.key(1), (8, 32))
      >>> tokens, advantages = jnp.array([3, 1, 4, 1, 5]), jnp.ones(5)
      >>> logprobs = jliger.linear_logprobs(hidden, kernel, tokens).logprobs
      >>> loss, metrics = losses.fused_linear_ppo_clip(hidden, kernel, tokens, logprobs, advantages)
      >>> print(f"{loss:.2f} {metrics.old_kl:.2f}")  # ratios of 1
      -1.00 0.00
    """
    head = HeadTokens.make(hidden, kernel, tokens, options)
    given: dict[str, Any] = {
        "epsilon_low": epsilon_low,
        "epsilon_high": epsilon_high,
        "delta": delta,
        "entropy_coef": entropy_coef,
    }
    with_entropy = entropy_metric or not _is_zero(entropy_coef)
    arrays: Any = _given(old_logprobs=old_logprobs, advantages=advantages, weights=weights)

    def flat(logprobs: Array, entropy: Array) -> tuple[Array, PolicyMetrics]:
        arguments: Any = {**arrays, **given, "where": head.counted, "normalizer": normalizer}
        arguments["entropy"] = entropy if with_entropy else None
        return ppo_clip(logprobs, **arguments)

    check_arguments(flat, head.hidden, head.tokens.shape, head.tokens.shape)
    total, result = head.summed(_ppo_clip_of_token, {**given, "with_entropy": with_entropy}, arrays, "tokens")
    return mean_over(total, head.counted.sum(), normalizer), flat(*result)[1]


def _grpo_of_rows(
    head: HeadTokens, given: Mapping[str, Any], arrays: Mapping[str, Array]
) -> tuple[Float[Array, ""], Any]:
    if head.tokens.ndim > 1:
        return head.summed(_grpo_of_row, given, arrays, "rows")
    # Of one sequence, the first axis is not that of rows.
    arrays = {name: array[None] for name, array in arrays.items()}
    total, result = _with_row_axis(head).summed(_grpo_of_row, given, arrays, "rows")
    return total, jax.tree.map(lambda field: field[0], result)


# ---- the losses of one unit: the flat losses, of one token or one row ------------------------------------------


def _grpo_of_token(
    result: LinearLogprobs, arrays: Mapping[str, Array], *, with_entropy: bool, **given: Any
) -> tuple[Array, tuple[Array, Array | None]]:
    # A sequence of one token. Its share of the loss depends on the number of tokens, which is known beforehand.
    others = {name: array[None] for name, array in arrays.items() if name not in ("advantages", "shares")}
    entropy = None if _is_zero(given["entropy_coef"]) else result.entropy[None]
    arguments: Any = {**others, **given, "entropy": entropy, "normalizer": 1.0}
    loss, _ = grpo(result.logprobs[None], arrays["advantages"][None], **arguments)
    return loss * arrays.get("shares", 1), _of_metrics(result, with_entropy)


def _grpo_of_row(
    result: LinearLogprobs, arrays: Mapping[str, Array], *, with_entropy: bool, **given: Any
) -> tuple[Array, tuple[Array, Array | None]]:
    entropy = None if _is_zero(given["entropy_coef"]) else result.entropy
    arguments: Any = {**arrays, **given, "entropy": entropy, "normalizer": 1.0}
    loss, _ = grpo(result.logprobs, where=result.predictions >= 0, **arguments)
    return loss, _of_metrics(result, with_entropy)


def _ppo_clip_of_token(
    result: LinearLogprobs, arrays: Mapping[str, Array], *, with_entropy: bool, **given: Any
) -> tuple[Array, tuple[Array, Array | None]]:
    entropy = None if _is_zero(given["entropy_coef"]) else result.entropy
    arguments: Any = {**arrays, **given, "entropy": entropy, "normalizer": 1.0}
    loss, _ = ppo_clip(result.logprobs, **arguments)
    return loss, _of_metrics(result, with_entropy)


def _of_metrics(result: LinearLogprobs, with_entropy: bool) -> tuple[Array, Array | None]:
    return result.logprobs, result.entropy if with_entropy else None


# ---- arguments -------------------------------------------------------------------------------------------------


def _given(**arrays: Any) -> dict[str, Array]:
    """The arrays that are not None."""
    return {name: checks.as_array(name, array) for name, array in arrays.items() if array is not None}


def _is_zero(coefficient: Any) -> bool:
    return isinstance(coefficient, int | float) and coefficient == 0


def _with_row_axis(head: HeadTokens) -> HeadTokens:
    """The head's arguments with a first axis of size 1."""
    per_token: dict[str, Any] = {
        name: value for name, value in head.options.items() if name in ("where", "temperature")
    }
    options: Any = {
        **head.options,
        **{name: jnp.asarray(value)[None] for name, value in per_token.items() if jnp.ndim(value)},
    }
    return head._replace(hidden=head.hidden[None], tokens=head.tokens[None], options=options)
