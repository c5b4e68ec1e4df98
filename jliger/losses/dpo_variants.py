"""Direct preference optimisation (DPO) and its variants."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jliger.core import checks
from jliger.core.checks import coefficient
from jliger.core.reduction import Normalizer, Reduction, check_reduction
from jliger.losses.arguments import constant, mask, number, sequence_arrays, zero_unless
from jliger.losses.preference_pairs import (
    BOOL_PER_PAIR,
    PAIRS,
    Loss,
    PreferenceMetrics,
    Rewards,
    result,
    smoothed_logistic,
)
from jliger.losses.ratios import difference, expm1, saturated, times

DPOLossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
DPODivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def dpo(
    chosen_logprobs: Float[Array, " B"],
    rejected_logprobs: Float[Array, " B"],
    ref_chosen_logprobs: Float[Array, " B"],
    ref_rejected_logprobs: Float[Array, " B"],
    *,
    loss_type: DPOLossType = "sigmoid",
    divergence: DPODivergence = "reverse_kl",
    divergence_alpha: float | None = None,
    beta: Float[Array, ""] | float = 0.1,
    label_smoothing: float = 0.0,
    discopop_tau: float | None = None,
    reward_shift: Float[Array, ""] | float | None = None,
    where: Bool[Array, " B"] | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
) -> tuple[Loss, PreferenceMetrics]:
    r"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290), in eleven variants.

    With the reward $r_w = \beta\,(\log \pi(y_w) - \log \pi_\mathrm{ref}(y_w))$ of the chosen completion, $r_l$ of the
    rejected one, $z = r_w - r_l$, $q = \sigma(z)$, and `label_smoothing` $\varepsilon$, the loss of a pair is

    | `loss_type` | loss | source |
    | --- | --- | --- |
    | `"sigmoid"` | $-(1-\varepsilon) \log q - \varepsilon \log(1-q)$ | arXiv:2305.18290, with $\varepsilon$ cDPO |
    | `"hinge"` | $\max(0, 1 - z)$ | SLiC as in RSO, arXiv:2309.06657 |
    | `"ipo"` | $(z/\beta - 1/(2\beta))^2$ | arXiv:2310.12036 |
    | `"robust"` | $(\varepsilon \log(1-q) - (1-\varepsilon) \log q) / (1 - 2\varepsilon)$ | arXiv:2403.00409 |
    | `"exo_pair"` | $q \log\frac{q}{1-\varepsilon} + (1-q) \log\frac{1-q}{\varepsilon}$ | EXO, arXiv:2402.00856 |
    | `"nca_pair"` | $-\log\sigma(r_w) - \frac12 \log\sigma(-r_w) - \frac12 \log\sigma(-r_l)$ | NCA, arXiv:2402.05369 |
    | `"bco_pair"` | $-\log\sigma(r_w - \delta) - \log\sigma(-(r_l - \delta))$ | BCO, arXiv:2404.04656 |
    | `"sppo_hard"` | $(r_w/\beta - 1/(2\beta))^2 + (r_l/\beta + 1/(2\beta))^2$ | SPPO, arXiv:2405.00675 |
    | `"apo_zero"` | $\sigma(-r_w) + \sigma(r_l)$ | arXiv:2408.06266 |
    | `"apo_down"` | $\sigma(r_w) + \sigma(-z)$ | arXiv:2408.06266 |
    | `"discopop"` | $-\log\sigma(z)\,\sigma(-z/\tau) + e^{-z} \sigma(z/\tau)$ | arXiv:2406.08414 |

    `divergence` names the divergence from the reference that the rewards imply a penalty on (f-DPO; Wang et al., 2023,
    arXiv:2309.16240). With the log-ratio $x = \log \pi(y) - \log \pi_\mathrm{ref}(y)$ of a completion, its reward is
    $\beta\, s(x)$:

    | `divergence` | $s(x)$ |
    | --- | --- |
    | `"reverse_kl"` | $x$ |
    | `"forward_kl"` | $1 - e^{-x}$ |
    | `"js"` (Jensen-Shannon) | $\log\frac{2 e^x}{1 + e^x}$ |
    | `"alpha"` | $(1 - e^{-\alpha x}) / \alpha$; $\alpha$ is `divergence_alpha` |

    This is $f'(e^x)$ of the paper, shifted by a constant so that $s(0) = 0$. The paper's loss is `"sigmoid"`, in which
    constants cancel; the other losses take the same rewards. `"alpha"` tends to `"reverse_kl"` for $\alpha \to 0$ and
    to `"forward_kl"` for $\alpha \to 1$. Where an exponent is above 20, the exponential is replaced by its tangent, so
    that values and gradients stay finite.

    These are the definitions of TRL's `DPOTrainer`, with three differences. `label_smoothing` raises for a loss that
    does not use it. TRL's `"ipo"` divides each log-ratio by its number of tokens: to get that, pass means
    (`sequence_logprobs(..., reduction="mean")`). The paper's $\delta$ of `"bco_pair"` is `reward_shift`.

    Differentiable in `chosen_logprobs` and `rejected_logprobs`. If one is −∞, value and gradient are their limits.

    Args:
      chosen_logprobs: log-probabilities of the chosen completions, `[B]`: sums over tokens, see `sequence_logprobs`.
      rejected_logprobs: the same for the rejected completions, `[B]`.
      ref_chosen_logprobs: log-probabilities of the chosen completions under the reference, `[B]`. No gradient.
      ref_rejected_logprobs: the same for the rejected completions, `[B]`. No gradient.
      loss_type: one of the first table's.
      divergence: one of the second table's.
      divergence_alpha: `α` in (0, 1), a Python number, for `divergence="alpha"`, which needs it.
      beta: `β`, above 0.
      label_smoothing: `ε` in [0, 0.5], a Python number, for `"sigmoid"`, `"robust"` (below 0.5) and `"exo_pair"` (above
        0; TRL takes 1e-3).
      discopop_tau: `τ` in (0, 1], a Python number, for `"discopop"`; default 0.05. Above 1 the loss would grow
        exponentially in `−z`.
      reward_shift: `δ`, for `"bco_pair"`; default 0. Pass a running mean of both rewards. No gradient.
      where: bools `[B]`, True for counted pairs. Exclude pairs with an empty sequence:
        `(chosen.counts > 0) & (rejected.counts > 0)`.
      reduction: `"mean"` over the counted pairs, `"sum"`, or `"none"` for the loss of each pair, 0 for uncounted pairs.
      normalizer: with `"mean"`, the divisor to use instead, such as the number of pairs in the whole batch when
        accumulating microbatches. No gradient.

    Returns:
      The loss, float32 (float64 for float64 inputs), `[]`, or `[B]` with `"none"`; and `PreferenceMetrics`.

    Raises:
      ValueError: a shape does not match, an option is out of range, or neither `loss_type` nor `divergence` uses it.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jliger import losses
      >>> chosen, rejected = jnp.array([-10.0, -12.0]), jnp.array([-14.0, -11.0])
      >>> ref_chosen, ref_rejected = jnp.array([-11.0, -11.0]), jnp.array([-12.0, -12.0])
      >>> loss, metrics = losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
      >>> print(f"{loss:.4f} {metrics.margins:.2f} {metrics.accuracy:.1f}")
      0.7573 0.25 0.5
      >>> _, metrics = losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.5, divergence="forward_kl")
      >>> print(f"{metrics.margins:.2f}")  # the mean of (e² − e⁻¹) / 2 and (e⁻¹ − e) / 2
      1.17
    """
    checks.check_choice("loss_type", loss_type, get_args(DPOLossType))
    score = _score(divergence, divergence_alpha)
    check_reduction(reduction, normalizer)
    arrays = sequence_arrays(
        PAIRS,
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    options = _options(loss_type, beta, label_smoothing, discopop_tau, reward_shift, arrays[0].dtype)
    counted = mask("where", where, arrays[0], BOOL_PER_PAIR)
    chosen, rejected, ref_chosen, ref_rejected = zero_unless(counted, *arrays)
    ref_chosen, ref_rejected = constant(ref_chosen, ref_rejected)
    scores = score(difference(chosen, ref_chosen)), score(difference(rejected, ref_rejected))
    rewards = Rewards(*(times(options.beta, array) for array in scores))
    losses = _LOSSES[loss_type](rewards, options)
    return result(losses, jnp.zeros_like(losses), rewards, counted, reduction, normalizer)


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments of the losses beside the rewards."""

    beta: Float[Array, ""] | float
    label_smoothing: float
    discopop_tau: float
    reward_shift: Float[Array, ""] | float


def _options(
    loss_type: str, beta: object, label_smoothing: float, tau: float | None, shift: object, dtype: Any
) -> _Options:
    label_smoothing = number("label_smoothing", label_smoothing, least=0, most=0.5)
    if label_smoothing and loss_type not in ("sigmoid", "robust", "exo_pair"):
        raise ValueError(f"label_smoothing got {label_smoothing}; loss_type={loss_type!r} has none, pass 0.")
    if loss_type == "robust" and label_smoothing == 0.5:
        raise ValueError("label_smoothing got 0.5, with which 'robust' would divide by 0; pass a number below 0.5.")
    if loss_type == "exo_pair" and not label_smoothing:
        raise ValueError(
            "label_smoothing got 0, with which 'exo_pair' is infinite; pass a number above 0, such as 1e-3."
        )
    if tau is not None and loss_type != "discopop":
        raise ValueError(f"discopop_tau got {tau!r}; it is for loss_type='discopop', leave it out.")
    tau = number("discopop_tau", 0.05 if tau is None else tau, most=1, least=0)
    if tau == 0:
        raise ValueError("discopop_tau got 0; pass a number above 0.")
    if shift is not None and loss_type != "bco_pair":
        raise ValueError("reward_shift is for loss_type='bco_pair'; leave it out.")
    return _Options(
        beta=coefficient("beta", beta, dtype, above=0),
        label_smoothing=label_smoothing,
        discopop_tau=tau,
        reward_shift=0.0 if shift is None else jax.lax.stop_gradient(coefficient("reward_shift", shift, dtype)),
    )


def _score(divergence: str, alpha: float | None) -> Callable[[Float[Array, " B"]], Float[Array, " B"]]:
    """The reward that a log-ratio implies under a divergence, for `β = 1`."""
    checks.check_choice("divergence", divergence, get_args(DPODivergence))
    if (alpha is not None) != (divergence == "alpha"):
        raise ValueError(
            f"divergence_alpha got {alpha!r} with divergence={divergence!r}; 'alpha' needs it, and the others do not "
            "use it."
        )
    if alpha is not None:
        alpha = number("divergence_alpha", alpha, least=0, most=1)
        if alpha in (0, 1):
            raise ValueError(
                f"divergence_alpha got {alpha}; pass a number between 0 and 1. The limits are 'reverse_kl' at 0 and "
                "'forward_kl' at 1."
            )
        return lambda x: -expm1(-alpha * x) / alpha
    return {
        "reverse_kl": lambda x: x,
        "forward_kl": lambda x: -expm1(-x),
        "js": lambda x: math.log(2) + jax.nn.log_sigmoid(x),
    }[divergence]


def _sigmoid(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    return smoothed_logistic(rewards.margin, options.label_smoothing)


def _hinge(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    return jax.nn.relu(1 - rewards.margin)


def _ipo(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    return jnp.square((rewards.margin - 0.5) / options.beta)


def _robust(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    # The docstring's fraction, simplified by log σ(−z) = log σ(z) − z.
    excess = options.label_smoothing / (1 - 2 * options.label_smoothing)
    return jax.nn.softplus(-rewards.margin) - times(excess, rewards.margin)


def _exo_pair(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    # Beyond ±1000, σ log σ is 0 and the loss constant; at ±∞ it would be 0 · ∞ = NaN.
    margin, smoothing = saturated(rewards.margin), options.label_smoothing
    right = jax.nn.sigmoid(margin) * (jax.nn.log_sigmoid(margin) - math.log1p(-smoothing))
    wrong = jax.nn.sigmoid(-margin) * (jax.nn.log_sigmoid(-margin) - math.log(smoothing))
    return right + wrong


def _nca_pair(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    return (
        jax.nn.softplus(-rewards.chosen) + jax.nn.softplus(rewards.chosen) / 2 + jax.nn.softplus(rewards.rejected) / 2
    )


def _bco_pair(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    shift = options.reward_shift
    return jax.nn.softplus(shift - rewards.chosen) + jax.nn.softplus(rewards.rejected - shift)


def _sppo_hard(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    return jnp.square((rewards.chosen - 0.5) / options.beta) + jnp.square((rewards.rejected + 0.5) / options.beta)


def _apo_zero(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    return jax.nn.sigmoid(-rewards.chosen) + jax.nn.sigmoid(rewards.rejected)


def _apo_down(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    return jax.nn.sigmoid(rewards.chosen) + jax.nn.sigmoid(-rewards.margin)


def _discopop(rewards: Rewards, options: _Options) -> Float[Array, " B"]:
    margin, tau = rewards.margin, options.discopop_tau
    # Where σ is saturated, the first term is linear in the margin, and so is the exponent of the second. Splitting the
    # margin there keeps infinities out of σ and log σ.
    inside = saturated(margin)
    beyond = margin - inside
    logistic = jax.nn.softplus(-inside) * jax.nn.sigmoid(-inside / tau) + jax.nn.relu(-beyond)
    # One exponential for the product: e^−z alone would overflow where the product tends to 0.
    exponent = jax.nn.log_sigmoid(inside / tau) - inside
    return logistic + jnp.exp(exponent + jnp.where(beyond < 0, times(1 / tau - 1, beyond), -beyond))


_LOSSES: dict[str, Callable[[Rewards, _Options], Float[Array, " B"]]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}
