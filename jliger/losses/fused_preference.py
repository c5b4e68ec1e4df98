"""Preference losses that are fused with a linear head: three matrix products, and no logits `[tokens, V]`."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Unpack

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.core.reduction import Normalizer, check_reduction
from jliger.losses.dpo_variants import DPODivergence, DPOLossType, dpo
from jliger.losses.fused import HeadTokens, check_arguments, mean_over
from jliger.losses.kto_loss import KTOMetrics, kto
from jliger.losses.preference_pairs import PreferenceMetrics
from jliger.losses.reference_free import cpo, orpo, simpo
from jliger.losses.sequence import sequence_logprobs
from jliger.ops.linear_head.logprob_loss import LossHeadOptions
from jliger.ops.logits.unit_loss import LinearLogprobs

SequenceReduction = Literal["sum", "mean"]
ScalarReduction = Literal["mean", "sum"]


def fused_linear_dpo(
    hidden: Float[Array, "P 2 L H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "P 2 L"],
    ref_chosen_logprobs: Float[Array, " P"],
    ref_rejected_logprobs: Float[Array, " P"],
    *,
    loss_type: DPOLossType = "sigmoid",
    divergence: DPODivergence = "reverse_kl",
    divergence_alpha: float | None = None,
    beta: Float[Array, ""] | float = 0.1,
    label_smoothing: float = 0.0,
    discopop_tau: float | None = None,
    reward_shift: Float[Array, ""] | float | None = None,
    sequence_reduction: SequenceReduction = "sum",
    excess_weight: float | None = None,
    reduction: ScalarReduction = "mean",
    normalizer: Normalizer = None,
    **options: Unpack[LossHeadOptions],
) -> tuple[Float[Array, ""], PreferenceMetrics]:
    """`jliger.losses.dpo` of a linear head's log-probabilities.

    The same loss, metrics and gradients as `dpo` with `sequence_logprobs` of `jliger.linear_logprobs`, with three
    matrix products instead of four: see `jliger.fused_linear_loss`. Both sequences of a pair are in one chunk, and on
    one device.

    Args:
      hidden: the model's last hidden states, `[P, 2, L, H]`: of each pair the chosen sequence first.
      kernel: the head's weights, `[H, V]`, or `[V, H]` with `kernel_layout="vh"`.
      tokens: the tokens, `[P, 2, L]`: `hidden[..., t, :]` predicts `tokens[..., t]`.
      ref_chosen_logprobs: as in `dpo`, `[P]`, reduced as `sequence_reduction` and `excess_weight` say. No gradient.
      ref_rejected_logprobs: the same for the rejected sequences.
      loss_type: as in `dpo`.
      divergence: as in `dpo`.
      divergence_alpha: as in `dpo`.
      beta: as in `dpo`. No gradient.
      label_smoothing: as in `dpo`.
      discopop_tau: as in `dpo`.
      reward_shift: as in `dpo`.
      sequence_reduction: `"sum"` or `"mean"` of the log-probabilities of a sequence's tokens.
      excess_weight: as in `sequence_logprobs`: the weight of the tokens by which one sequence is longer (LD-DPO).
      reduction: `"mean"` over the counted pairs, or `"sum"`.
      normalizer: as in `dpo`.
      **options: those of `jliger.fused_linear_loss`. The tokens that count are those of `where` and `ignore_index`; a
        pair counts if both of its sequences have one.

    Returns:
      The loss, `[]`, and `PreferenceMetrics`, as from `dpo`.

    Raises:
      ValueError, TypeError, NotImplementedError: what `dpo` and `jliger.fused_linear_loss` raise.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> from jliger import losses
      >>> hidden = jax.random.normal(jax.random.key(0), (1, 2, 5, 8))
      >>> kernel = jax.random.normal(jax.random.key(1), (8, 32))
      >>> tokens = jnp.array([[[3, 1, 4, 1, 5], [9, 2, 6, -100, -100]]])
      >>> reference = losses.sequence_logprobs(jliger.linear_logprobs(hidden, kernel, tokens).logprobs).logprobs
      >>> loss, metrics = losses.fused_linear_dpo(hidden, kernel, tokens, reference[:, 0], reference[:, 1])
      >>> print(f"{loss:.4f} {metrics.count}")  # log 2: the policy is the reference
      0.6931 1
    """
    references = {"ref_chosen_logprobs": ref_chosen_logprobs, "ref_rejected_logprobs": ref_rejected_logprobs}
    given = {
        "loss_type": loss_type,
        "divergence": divergence,
        "divergence_alpha": divergence_alpha,
        "beta": beta,
        "label_smoothing": label_smoothing,
        "discopop_tau": discopop_tau,
        "reward_shift": reward_shift,
    }
    head = HeadTokens.make(hidden, kernel, tokens, options)
    sequences = {"sequence_reduction": sequence_reduction, "excess_weight": excess_weight}
    return _of_pairs(dpo, head, references, given, sequences, reduction, normalizer)


def fused_linear_orpo(
    hidden: Float[Array, "P 2 L H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "P 2 L"],
    *,
    beta: Float[Array, ""] | float = 0.1,
    nll_weight: Float[Array, ""] | float = 1.0,
    sequence_reduction: SequenceReduction = "mean",
    excess_weight: float | None = None,
    reduction: ScalarReduction = "mean",
    normalizer: Normalizer = None,
    **options: Unpack[LossHeadOptions],
) -> tuple[Float[Array, ""], PreferenceMetrics]:
    """`jliger.losses.orpo` of a linear head's log-probabilities, with three matrix products instead of four.

    Args:
      hidden: as in `fused_linear_dpo`, as are `kernel`, `tokens`, `reduction`, `normalizer` and the other options.
      kernel: the head's weights.
      tokens: the tokens, `[P, 2, L]`, of each pair the chosen sequence first.
      beta: as in `orpo`. No gradient.
      nll_weight: as in `orpo`. No gradient.
      sequence_reduction: `"mean"` or `"sum"` of the log-probabilities of a sequence's tokens.
      excess_weight: as in `sequence_logprobs`.
      reduction: `"mean"` over the counted pairs, or `"sum"`.
      normalizer: as in `orpo`.
      **options: as in `fused_linear_dpo`.

    Returns:
      The loss, `[]`, and `PreferenceMetrics`, as from `orpo`.

    Raises:
      ValueError, TypeError, NotImplementedError: what `orpo` and `jliger.fused_linear_loss` raise.
    """
    head = HeadTokens.make(hidden, kernel, tokens, options)
    sequences = {"sequence_reduction": sequence_reduction, "excess_weight": excess_weight}
    return _of_pairs(orpo, head, {}, {"beta": beta, "nll_weight": nll_weight}, sequences, reduction, normalizer)


def fused_linear_cpo(
    hidden: Float[Array, "P 2 L H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "P 2 L"],
    *,
    beta: Float[Array, ""] | float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: Float[Array, ""] | float = 1.0,
    sequence_reduction: SequenceReduction = "sum",
    excess_weight: float | None = None,
    reduction: ScalarReduction = "mean",
    normalizer: Normalizer = None,
    **options: Unpack[LossHeadOptions],
) -> tuple[Float[Array, ""], PreferenceMetrics]:
    """`jliger.losses.cpo` of a linear head's log-probabilities, with three matrix products instead of four.

    Args:
      hidden: as in `fused_linear_dpo`, as are `kernel`, `tokens`, `reduction`, `normalizer` and the other options.
      kernel: the head's weights.
      tokens: the tokens, `[P, 2, L]`, of each pair the chosen sequence first.
      beta: as in `cpo`. No gradient.
      label_smoothing: as in `cpo`.
      nll_weight: as in `cpo`. No gradient.
      sequence_reduction: `"sum"` or `"mean"` of the log-probabilities of a sequence's tokens.
      excess_weight: as in `sequence_logprobs`: the weight of the tokens by which one sequence is longer (LD-DPO).
      reduction: `"mean"` over the counted pairs, or `"sum"`.
      normalizer: as in `cpo`.
      **options: as in `fused_linear_dpo`.

    Returns:
      The loss, `[]`, and `PreferenceMetrics`, as from `cpo`.

    Raises:
      ValueError, TypeError, NotImplementedError: what `cpo` and `jliger.fused_linear_loss` raise.
    """
    head = HeadTokens.make(hidden, kernel, tokens, options)
    sequences = {"sequence_reduction": sequence_reduction, "excess_weight": excess_weight}
    given = {"beta": beta, "label_smoothing": label_smoothing, "nll_weight": nll_weight}
    return _of_pairs(cpo, head, {}, given, sequences, reduction, normalizer)


def fused_linear_simpo(
    hidden: Float[Array, "P 2 L H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "P 2 L"],
    *,
    beta: Float[Array, ""] | float = 2.0,
    gamma: Float[Array, ""] | float = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: Float[Array, ""] | float = 0.0,
    sequence_reduction: SequenceReduction = "mean",
    excess_weight: float | None = None,
    reduction: ScalarReduction = "mean",
    normalizer: Normalizer = None,
    **options: Unpack[LossHeadOptions],
) -> tuple[Float[Array, ""], PreferenceMetrics]:
    """`jliger.losses.simpo` of a linear head's log-probabilities, with three matrix products instead of four.

    Args:
      hidden: as in `fused_linear_dpo`, as are `kernel`, `tokens`, `reduction`, `normalizer` and the other options.
      kernel: the head's weights.
      tokens: the tokens, `[P, 2, L]`, of each pair the chosen sequence first.
      beta: as in `simpo`. No gradient.
      gamma: as in `simpo`. No gradient.
      label_smoothing: as in `simpo`.
      nll_weight: as in `simpo`. No gradient.
      sequence_reduction: `"mean"` or `"sum"` of the log-probabilities of a sequence's tokens.
      excess_weight: as in `sequence_logprobs`.
      reduction: `"mean"` over the counted pairs, or `"sum"`.
      normalizer: as in `simpo`.
      **options: as in `fused_linear_dpo`.

    Returns:
      The loss, `[]`, and `PreferenceMetrics`, as from `simpo`.

    Raises:
      ValueError, TypeError, NotImplementedError: what `simpo` and `jliger.fused_linear_loss` raise.
    """
    head = HeadTokens.make(hidden, kernel, tokens, options)
    sequences = {"sequence_reduction": sequence_reduction, "excess_weight": excess_weight}
    given = {"beta": beta, "gamma": gamma, "label_smoothing": label_smoothing, "nll_weight": nll_weight}
    return _of_pairs(simpo, head, {}, given, sequences, reduction, normalizer)


def fused_linear_kto(
    hidden: Float[Array, "B L H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "B L"],
    ref_logprobs: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    *,
    kl: Float[Array, ""] | Float[Array, " B"] | float,
    beta: Float[Array, ""] | float = 0.1,
    desirable_weight: Float[Array, ""] | float = 1.0,
    undesirable_weight: Float[Array, ""] | float = 1.0,
    sequence_reduction: SequenceReduction = "sum",
    reduction: ScalarReduction = "mean",
    normalizer: Normalizer = None,
    **options: Unpack[LossHeadOptions],
) -> tuple[Float[Array, ""], KTOMetrics]:
    """`jliger.losses.kto` of a linear head's log-probabilities, with three matrix products instead of four.

    Args:
      hidden: the model's last hidden states, `[B, L, H]`.
      kernel: the head's weights, `[H, V]`, or `[V, H]` with `kernel_layout="vh"`.
      tokens: the tokens, `[B, L]`: `hidden[..., t, :]` predicts `tokens[..., t]`.
      ref_logprobs: as in `kto`, `[B]`, reduced as `sequence_reduction` says. No gradient.
      desirable: as in `kto`.
      kl: as in `kto`. No gradient.
      beta: as in `kto`. No gradient.
      desirable_weight: as in `kto`. No gradient.
      undesirable_weight: as in `kto`. No gradient.
      sequence_reduction: `"sum"` or `"mean"` of the log-probabilities of a sequence's tokens.
      reduction: `"mean"` over the counted sequences, or `"sum"`.
      normalizer: as in `kto`.
      **options: those of `jliger.fused_linear_loss`. The tokens that count are those of `where` and `ignore_index`; a
        sequence counts if it has one.

    Returns:
      The loss, `[]`, and `KTOMetrics`, as from `kto`.

    Raises:
      ValueError, TypeError, NotImplementedError: what `kto` and `jliger.fused_linear_loss` raise.
    """
    head = HeadTokens.make(hidden, kernel, tokens, options)
    _check(head, 2, "sequences [B, L]", sequence_reduction, reduction, normalizer)
    counts = head.counted.sum(axis=-1)
    coefficients = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight, "beta": beta}
    arrays = {name: checks.as_array(name, array) for name, array in {"ref_logprobs": ref_logprobs, "kl": kl}.items()}
    arrays["desirable"] = checks.as_array("desirable", desirable)

    def flat(logprobs: Float[Array, " B"]) -> tuple[Array, KTOMetrics]:
        how = {"where": counts > 0, "reduction": reduction, "normalizer": normalizer}
        return kto(logprobs, **arrays, **coefficients, **how)

    check_arguments(flat, head.hidden, counts.shape)
    per_row = {**arrays, "kl": jnp.broadcast_to(arrays["kl"], counts.shape)}
    given = {**coefficients, "sequence_reduction": sequence_reduction}
    total, logprobs = head.summed(_kto_of_sequence, given, per_row, "rows")
    loss = total if reduction == "sum" else mean_over(total, (counts > 0).sum(), normalizer)
    return loss, flat(logprobs)[1]


# ---- shared code ----------------------------------------------------------------------------------------------


def _of_pairs(
    flat: Callable[..., tuple[Array, PreferenceMetrics]],
    head: HeadTokens,
    references: Mapping[str, Any],
    given: Mapping[str, Any],
    sequences: Mapping[str, Any],
    reduction: ScalarReduction,
    normalizer: Normalizer,
) -> tuple[Float[Array, ""], PreferenceMetrics]:
    """The loss and metrics of a flat loss on pairs. `sequences` says how sequences are reduced."""
    _check(head, 3, "pairs [P, 2, L]", sequences["sequence_reduction"], reduction, normalizer)
    if head.tokens.shape[1] != 2:
        raise ValueError(f"tokens got shape {head.tokens.shape}; pass pairs [P, 2, L], the chosen sequence first.")
    references = {name: checks.as_array(name, array) for name, array in references.items()}
    counted = (head.counted.sum(axis=-1) > 0).all(axis=-1)

    def reduced(chosen: Float[Array, " P"], rejected: Float[Array, " P"]) -> tuple[Array, PreferenceMetrics]:
        how = {"where": counted, "reduction": reduction, "normalizer": normalizer}
        return flat(chosen, rejected, **references, **given, **how)

    check_arguments(reduced, head.hidden, counted.shape, counted.shape)
    total, logprobs = head.summed(_of_pair, {**given, **sequences, "flat": flat}, references, "rows")
    loss = total if reduction == "sum" else mean_over(total, counted.sum(), normalizer)
    return loss, reduced(logprobs[:, 0], logprobs[:, 1])[1]


def _of_pair(
    result: LinearLogprobs,
    references: Mapping[str, Array],
    *,
    flat: Callable[..., tuple[Array, PreferenceMetrics]],
    sequence_reduction: SequenceReduction,
    excess_weight: float | None,
    **given: Any,
) -> tuple[Array, Array]:
    """The flat loss of a single pair, and the log-probabilities of its sequences."""
    counted = result.predictions >= 0
    logprobs, counts = sequence_logprobs(
        result.logprobs, counted, reduction=sequence_reduction, excess_weight=excess_weight
    )
    references = {name: array[None] for name, array in references.items()}
    where = (counts > 0).all(keepdims=True)
    return flat(logprobs[:1], logprobs[1:], **references, **given, where=where, reduction="sum")[0], logprobs


def _kto_of_sequence(
    result: LinearLogprobs, arrays: Mapping[str, Array], *, sequence_reduction: SequenceReduction, **given: Any
) -> tuple[Array, Array]:
    logprobs, _ = sequence_logprobs(result.logprobs, result.predictions >= 0, reduction=sequence_reduction)
    arrays = {name: array[None] for name, array in arrays.items()}
    return kto(logprobs[None], **arrays, **given, reduction="sum")[0], logprobs


def _check(
    head: HeadTokens, ndim: int, what: str, sequence_reduction: Any, reduction: Any, normalizer: Normalizer
) -> None:
    if head.tokens.ndim != ndim:
        raise ValueError(f"tokens got shape {head.tokens.shape}; pass {what}.")
    checks.check_choice("sequence_reduction", sequence_reduction, ("sum", "mean"))
    checks.check_choice("reduction", reduction, ("mean", "sum"))
    check_reduction(reduction, normalizer)
