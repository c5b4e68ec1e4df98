"""Preference losses without a reference model: odds ratio, contrastive, and simple preference optimisation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jliger.core.checks import coefficient
from jliger.core.reduction import Normalizer, Reduction, check_reduction
from jliger.losses.arguments import mask, number, sequence_arrays, zero_unless
from jliger.losses.preference_pairs import (
    BOOL_PER_PAIR,
    PAIRS,
    Loss,
    PreferenceMetrics,
    Rewards,
    result,
    smoothed_logistic,
)
from jliger.losses.ratios import times


def orpo(
    chosen_logprobs: Float[Array, " B"],
    rejected_logprobs: Float[Array, " B"],
    *,
    beta: Float[Array, ""] | float = 0.1,
    nll_weight: Float[Array, ""] | float = 1.0,
    where: Bool[Array, " B"] | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
) -> tuple[Loss, PreferenceMetrics]:
    r"""Odds ratio preference optimisation (Hong et al., 2024, arXiv:2403.07691).

    With the mean log-probability per token $\ell = \frac{1}{|y|} \log \pi(y)$, the loss of a pair is

    $$-\alpha\, \ell_w - \beta \log \sigma\!\left(\log \frac{\mathrm{odds}(y_w)}{\mathrm{odds}(y_l)}\right),
      \qquad \log \mathrm{odds}(y) = \ell - \log(1 - e^{\ell})$$

    where $\alpha$ is `nll_weight` and $\beta$, the paper's $\lambda$, is `beta`. The likelihood term is the paper's:
    that of the chosen completion, averaged over its tokens and then over pairs. TRL and Liger average it over all
    tokens of the batch: to get that, pass `nll_weight=0` and add the term yourself (docs/preferences.md).

    At $\ell = 0$ the odds are infinite. A mean closer to 0 than the machine epsilon (1.2e-7 in float32) is replaced by
    minus the epsilon, and its gradient is that at minus the epsilon, so that both are finite.

    Args:
      chosen_logprobs: mean log-probabilities per token of the chosen completions, `[B]`:
        `sequence_logprobs(..., reduction="mean")`.
      rejected_logprobs: the same for the rejected completions, `[B]`.
      beta: `β`, at least 0.
      nll_weight: `α`, at least 0.
      where: bools `[B]`, True for counted pairs. Exclude pairs with an empty sequence:
        `(chosen.counts > 0) & (rejected.counts > 0)`.
      reduction: `"mean"` over the counted pairs, `"sum"`, or `"none"` for the loss of each pair, 0 for uncounted pairs.
      normalizer: with `"mean"`, the divisor to use instead, such as the number of pairs in the whole batch when
        accumulating microbatches. No gradient.

    Returns:
      The loss, float32 (float64 for float64 inputs), `[]`, or `[B]` with `"none"`; and `PreferenceMetrics`, with
      rewards `β·ℓ`.

    Raises:
      ValueError: a shape does not match, or an option is out of range.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jliger import losses
      >>> chosen, rejected = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
      >>> loss, metrics = losses.orpo(chosen, rejected)  # odds of 1 and 1/3: -log(1/2) - 0.1 log(3/4)
      >>> print(f"{loss:.4f} {metrics.nll:.4f} {metrics.preference_loss:.4f}")
      0.7219 0.6931 0.0288
    """
    check_reduction(reduction, normalizer)
    logprobs, counted = _pairs(chosen_logprobs, rejected_logprobs, where)
    beta, nll_weight = _coefficients(logprobs, beta=beta, nll_weight=nll_weight)
    log_odds = Rewards(_log_odds(logprobs.chosen), _log_odds(logprobs.rejected))
    losses = times(beta, jax.nn.softplus(-log_odds.margin))
    nlls = times(-nll_weight, logprobs.chosen)
    return result(losses, nlls, _scaled(logprobs, beta), counted, reduction, normalizer)


def cpo(
    chosen_logprobs: Float[Array, " B"],
    rejected_logprobs: Float[Array, " B"],
    *,
    beta: Float[Array, ""] | float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: Float[Array, ""] | float = 1.0,
    where: Bool[Array, " B"] | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
) -> tuple[Loss, PreferenceMetrics]:
    r"""Contrastive preference optimisation (Xu et al., 2024, arXiv:2401.08417): DPO with a uniform reference.

    With $z = \beta\,(\log \pi(y_w) - \log \pi(y_l))$, the loss of a pair is

    $$-(1 - \varepsilon) \log \sigma(z) - \varepsilon \log \sigma(-z) - \alpha \log \pi(y_w)$$

    where $\varepsilon$ is `label_smoothing` and $\alpha$ is `nll_weight`. The likelihood term is the paper's: that of
    the whole chosen completion. TRL and Liger average it over all tokens of the batch: to get that, pass `nll_weight=0`
    and add the term yourself (docs/preferences.md).

    Args:
      chosen_logprobs: log-probabilities of the chosen completions, `[B]`: sums over tokens, see `sequence_logprobs`.
      rejected_logprobs: the same for the rejected completions, `[B]`.
      beta: `β`, at least 0.
      label_smoothing: `ε` in [0, 0.5], a Python number.
      nll_weight: `α`, at least 0.
      where: bools `[B]`, True for counted pairs. Exclude pairs with an empty sequence:
        `(chosen.counts > 0) & (rejected.counts > 0)`.
      reduction: `"mean"` over the counted pairs, `"sum"`, or `"none"` for the loss of each pair, 0 for uncounted pairs.
      normalizer: with `"mean"`, the divisor to use instead, such as the number of pairs in the whole batch when
        accumulating microbatches. No gradient.

    Returns:
      The loss, float32 (float64 for float64 inputs), `[]`, or `[B]` with `"none"`; and `PreferenceMetrics`, with
      rewards `β·log π(y)`.

    Raises:
      ValueError: a shape does not match, or an option is out of range.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jliger import losses
      >>> loss, metrics = losses.cpo(jnp.array([-4.0]), jnp.array([-6.0]), beta=0.5)  # 4 + log(1 + 1/e)
      >>> print(f"{loss:.4f} {metrics.margins:.1f}")
      4.3133 1.0
    """
    label_smoothing = number("label_smoothing", label_smoothing, least=0, most=0.5)
    check_reduction(reduction, normalizer)
    logprobs, counted = _pairs(chosen_logprobs, rejected_logprobs, where)
    beta, nll_weight = _coefficients(logprobs, beta=beta, nll_weight=nll_weight)
    rewards = _scaled(logprobs, beta)
    losses = smoothed_logistic(rewards.margin, label_smoothing)
    return result(losses, times(-nll_weight, logprobs.chosen), rewards, counted, reduction, normalizer)


def simpo(
    chosen_logprobs: Float[Array, " B"],
    rejected_logprobs: Float[Array, " B"],
    *,
    beta: Float[Array, ""] | float = 2.0,
    gamma: Float[Array, ""] | float = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: Float[Array, ""] | float = 0.0,
    where: Bool[Array, " B"] | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
) -> tuple[Loss, PreferenceMetrics]:
    r"""Simple preference optimisation (Meng et al., 2024, arXiv:2405.14734).

    With the mean log-probability per token $\ell = \frac{1}{|y|} \log \pi(y)$ and
    $z = \beta\,(\ell_w - \ell_l) - \gamma$, the loss of a pair is

    $$-(1 - \varepsilon) \log \sigma(z) - \varepsilon \log \sigma(-z) - \alpha\, \ell_w$$

    where $\gamma$ is the target margin `gamma`, $\varepsilon$ is `label_smoothing`, and $\alpha$ is `nll_weight`. The
    likelihood term is not in the paper; it is that of CPO-SimPO. TRL's `simpo_gamma` is `gamma`; the paper's code takes
    `gamma / beta`.

    Args:
      chosen_logprobs: mean log-probabilities per token of the chosen completions, `[B]`:
        `sequence_logprobs(..., reduction="mean")`.
      rejected_logprobs: the same for the rejected completions, `[B]`.
      beta: `β`, at least 0; the paper uses 2 to 10, because the log-probabilities are means.
      gamma: `γ`, at least 0.
      label_smoothing: `ε` in [0, 0.5], a Python number.
      nll_weight: `α`, at least 0.
      where: bools `[B]`, True for counted pairs. Exclude pairs with an empty sequence:
        `(chosen.counts > 0) & (rejected.counts > 0)`.
      reduction: `"mean"` over the counted pairs, `"sum"`, or `"none"` for the loss of each pair, 0 for uncounted pairs.
      normalizer: with `"mean"`, the divisor to use instead, such as the number of pairs in the whole batch when
        accumulating microbatches. No gradient.

    Returns:
      The loss, float32 (float64 for float64 inputs), `[]`, or `[B]` with `"none"`; and `PreferenceMetrics`, with
      rewards `β·ℓ`.

    Raises:
      ValueError: a shape does not match, or an option is out of range.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jliger import losses
      >>> loss, metrics = losses.simpo(jnp.array([-0.5]), jnp.array([-1.25]), beta=2.0, gamma=0.5)  # log(1 + 1/e)
      >>> print(f"{loss:.4f} {metrics.margins:.1f}")
      0.3133 1.5
    """
    label_smoothing = number("label_smoothing", label_smoothing, least=0, most=0.5)
    check_reduction(reduction, normalizer)
    logprobs, counted = _pairs(chosen_logprobs, rejected_logprobs, where)
    beta, gamma, nll_weight = _coefficients(logprobs, beta=beta, gamma=gamma, nll_weight=nll_weight)
    rewards = _scaled(logprobs, beta)
    losses = smoothed_logistic(rewards.margin - gamma, label_smoothing)
    return result(losses, times(-nll_weight, logprobs.chosen), rewards, counted, reduction, normalizer)


def _pairs(chosen: Array, rejected: Array, where: Array | None) -> tuple[Rewards, Bool[Array, " B"]]:
    chosen, rejected = sequence_arrays(PAIRS, chosen_logprobs=chosen, rejected_logprobs=rejected)
    counted = mask("where", where, chosen, BOOL_PER_PAIR)
    return Rewards(*zero_unless(counted, chosen, rejected)), counted


def _coefficients(logprobs: Rewards, **values: Any) -> tuple[Any, ...]:
    return tuple(coefficient(name, value, logprobs.chosen.dtype, least=0) for name, value in values.items())


def _scaled(logprobs: Rewards, beta: Float[Array, ""] | float) -> Rewards:
    return Rewards(times(beta, logprobs.chosen), times(beta, logprobs.rejected))


def _log_odds(logprobs: Float[Array, " B"]) -> Float[Array, " B"]:
    """`log p − log(1 − p)`, given `log p`."""
    nearest = -float(jnp.finfo(logprobs.dtype).eps)
    # Clamps the value but keeps the gradient. The derivative, 1/(1 − p), is finite at `nearest`. With jnp.minimum it
    # would be 0 above `nearest`, and a completion with p ≈ 1 would get no gradient.
    logprobs = jnp.where(logprobs > nearest, logprobs + jax.lax.stop_gradient(nearest - logprobs), logprobs)
    return logprobs - jnp.log(-jnp.expm1(logprobs))
