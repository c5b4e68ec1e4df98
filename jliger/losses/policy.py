"""Policy-gradient losses on token log-probabilities, with clipped ratios, a KL penalty and an entropy bonus."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.core.checks import coefficient
from jliger.core.reduction import Normalizer, divided, divisor, mean
from jliger.losses.arguments import constant, mask, number, real_arrays, sharded_like, zero_unless
from jliger.losses.ratios import Ratios, clipped, difference, held, k3, soft_gated, times

GRPOLossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"]
# Loss types that average over the tokens of each sequence, and those that divide by the number of sequences.
MEANS_OF_SEQUENCES = ("grpo", "sapo")
PER_SEQUENCE = (*MEANS_OF_SEQUENCES, "dr_grpo")

_TOKENS = "one number per token"


class PolicyMetrics(NamedTuple):
    """Metrics of a policy loss, without gradients.

    Means are over the counted tokens and do not depend on `normalizer`; they are 0 if no token counts. To combine the
    means of several calls, weight them by `count`.

    Attributes:
      count: int32 `[]`, the number of counted tokens.
      policy_loss: the loss without its KL and entropy terms, reduced like the loss.
      kl: `[]`, mean estimate of the KL divergence from the reference; None without `ref_logprobs`.
      entropy: `[]`, mean entropy; None without `entropy`.
      old_kl: `[]`, mean estimate of the KL divergence from the policy of `old_logprobs`: how far off-policy the data
        is.
      clip_fraction_low: `[]`, the fraction of tokens whose ratio was below its lower bound.
      clip_fraction_high: `[]`, the fraction of tokens whose ratio was above its upper bound. Both are 0 for
        `loss_type="sapo"`, which has no bounds.
    """

    count: Int[Array, ""]
    policy_loss: Float[Array, ""]
    kl: Float[Array, ""] | None
    entropy: Float[Array, ""] | None
    old_kl: Float[Array, ""]
    clip_fraction_low: Float[Array, ""]
    clip_fraction_high: Float[Array, ""]


def grpo(
    logprobs: Float[Array, "*B T"],
    advantages: Float[Array, "*B"] | Float[Array, "*B T"],
    *,
    where: Bool[Array, "*B T"] | None = None,
    old_logprobs: Float[Array, "*B T"] | None = None,
    ref_logprobs: Float[Array, "*B T"] | None = None,
    entropy: Float[Array, "*B T"] | None = None,
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
    max_completion_length: int | None = None,
    normalizer: Normalizer = None,
) -> tuple[Float[Array, ""], PolicyMetrics]:
    r"""Group relative policy optimisation (Shao et al., 2024, arXiv:2402.03300) and its variants.

    With ratios $r_t = \pi(y_t) / \pi_\mathrm{old}(y_t)$ and advantages $A_t$, the loss of a token is

    $$-\min\big(r_t A_t,\ \mathrm{clip}(r_t, 1 - \varepsilon_\mathrm{low}, 1 + \varepsilon_\mathrm{high})\, A_t\big)
      + \beta\, \big(e^{d_t} - d_t - 1\big) - c\, H_t, \qquad d_t = \log \pi_\mathrm{ref}(y_t) - \log \pi(y_t)$$

    where $\beta$ (`beta`) multiplies the "k3" estimate of the KL divergence from the reference, $c$ is `entropy_coef`,
    and $H_t$ are the entropies. `delta` also clips from above the ratios of tokens with a negative advantage (two-sided
    clipping, arXiv:2505.07291; dual clip, arXiv:1912.09729). `loss_type` says how token losses are reduced, with
    $|y_i|$ counted tokens in the i-th of $N$ sequences:

    | `loss_type` | loss | source |
    | --- | --- | --- |
    | `"grpo"` | $\frac{1}{N} \sum_i \frac{1}{\lvert y_i\rvert} \sum_t$ | arXiv:2402.03300 |
    | `"bnpo"` | $\frac{1}{\sum_i \lvert y_i\rvert} \sum_i \sum_t$, of this batch | TRL's first |
    | `"dr_grpo"` | $\frac{1}{N L} \sum_i \sum_t$, $L$ is `max_completion_length` | arXiv:2503.20783 |
    | `"dapo"` | $\frac{1}{\sum_i \lvert y_i\rvert} \sum_i \sum_t$, of the whole batch | arXiv:2503.14476 |
    | `"cispo"` | as `"dapo"`, of $-\mathrm{sg}(c_t) A_t \log \pi(y_t)$ instead of the minimum | arXiv:2506.13585 |
    | `"sapo"` | as `"grpo"`, of $-\frac{4}{\tau} \sigma(\tau (r_t - 1)) A_t$, not the minimum | arXiv:2511.20347 |

    where $c_t$ is the clipped ratio and $\mathrm{sg}$ stops the gradient. SAPO (soft adaptive policy optimisation) has
    the temperature $\tau$ = `sapo_tau_pos` if $A_t > 0$, else `sapo_tau_neg`. `"bnpo"` and `"dapo"` compute the same
    formula: to normalise by the whole batch when accumulating microbatches, as DAPO does, pass `normalizer`.

    With `importance_sampling_level="sequence"` each token has the ratio of its sequence, $s_i = \exp
    \frac{1}{\lvert y_i\rvert} \sum_t \log r_t$, and its gradient is $s_i A_t \nabla \log \pi(y_t)$: GSPO
    (arXiv:2507.18071), or GSPO-token if advantages are per token. The published GSPO is this with `loss_type="grpo"`.

    $N$ excludes sequences without a counted token. (TRL includes them.)

    For log-ratios above 20, all ratios and KL estimates replace $e^x$ by its tangent: values and gradients stay finite,
    and gradients keep their sign. At a log-probability of −∞, such as that of a token masked in sampling, value and
    gradient are their limits. A token with −∞ under both policies has ratio 1.

    Args:
      logprobs: log-probabilities of tokens, `[*B, T]`, such as those of `jliger.linear_logprobs`. Differentiable.
      advantages: one per sequence, `[*B]`, or one per token, `[*B, T]`. No gradient.
      where: bools `[*B, T]`, True for counted tokens: those of the completion. Values of other tokens are ignored.
      old_logprobs: log-probabilities under the policy that sampled the tokens, `[*B, T]`. No gradient. None if the
        current policy sampled them: the ratios are then 1, with the gradient of a ratio.
      ref_logprobs: log-probabilities under the reference, `[*B, T]`. No gradient. With `beta=0` they only give the
        metric.
      entropy: the entropy at each token, `[*B, T]`. Differentiable. With `entropy_coef=0` it only gives the metric.
      weights: factors of each token's loss without its KL and entropy terms, `[*B, T]`, such as the importance weights
        of `sampler_correction`. They do not change what the loss is divided by. No gradient.
      loss_type: one of the table's.
      importance_sampling_level: `"token"` or `"sequence"`.
      epsilon_low: at least 0. Default 0.2; for `"cispo"` 1, which does not clip.
      epsilon_high: at least 0. Default 0.2; for `"cispo"` 4, which clips ratios at 5. (TRL's `epsilon_high` is this 5.)
      delta: a Python number above `1 + epsilon_high`, or None for no such bound; not for `"cispo"`. None of the three
        is for `"sapo"`.
      sapo_tau_pos: `τ` for positive advantages, above 0, for `"sapo"`; default 1.
      sapo_tau_neg: `τ` for the others, above 0, for `"sapo"`; default 1.05. A larger one reduces the gradient of ratios
        far from 1 more.
      beta: `β`, at least 0.
      entropy_coef: `c`.
      max_completion_length: `L`, a Python integer, only for `"dr_grpo"`.
      normalizer: the divisor to use instead of the count: a number of sequences for `"grpo"`, `"dr_grpo"` and
        `"sapo"`, a number of tokens for the others. Pass that of the whole batch when accumulating microbatches, and
        inside a `jax.shard_map`. No gradient.

    Returns:
      The loss, `[]`, float32 (float64 for float64 inputs), 0 if no token counts; and `PolicyMetrics`.

    Raises:
      ValueError: a shape does not match, an option is out of range, `loss_type` does not use it, or the argument of a
        term is missing.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jliger import losses
      >>> old_logprobs = jnp.log(jnp.array([[0.5, 0.5, 0.5], [0.5, 0.5, 1.0]]))
      >>> logprobs = jnp.log(jnp.array([[0.5, 0.75, 0.5], [0.5, 0.25, 1.0]]))  # ratios 1, 1.5, 1 and 1, 0.5
      >>> where = jnp.array([[True, True, True], [True, True, False]])
      >>> loss, metrics = losses.grpo(logprobs, jnp.array([1.0, -1.0]), where=where, old_logprobs=old_logprobs)
      >>> print(f"{loss:.2f} {metrics.clip_fraction_low:.1f} {metrics.clip_fraction_high:.1f}")  # -(3.2 - 1.8) / 5
      -0.28 0.2 0.2
    """
    checks.check_choice("loss_type", loss_type, get_args(GRPOLossType))
    checks.check_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
    if (max_completion_length is not None) != (loss_type == "dr_grpo"):
        raise ValueError(
            f"max_completion_length got {max_completion_length!r} with loss_type={loss_type!r}; 'dr_grpo' needs it, "
            "and the other types do not use it."
        )
    length = number("max_completion_length", 1.0 if max_completion_length is None else max_completion_length, least=1)
    tokens = _tokens(logprobs, old_logprobs, ref_logprobs, entropy, where)
    if tokens.logprobs.ndim < 1:
        raise ValueError("logprobs got a scalar; pass an array [*B, T].")
    options = epsilon_low, epsilon_high, delta, sapo_tau_pos, sapo_tau_neg
    trust_region = _TrustRegion.make(loss_type, *options, dtype=tokens.logprobs.dtype)
    terms = _terms(beta, entropy_coef, tokens)
    advantages = _constant_of_tokens("advantages", advantages, tokens, one_a_sequence=True)
    counts = tokens.counted.sum(axis=-1, keepdims=True)

    log_ratios = tokens.log_ratios
    if importance_sampling_level == "sequence":
        of_sequence = jax.lax.stop_gradient(divided(log_ratios.sum(axis=-1, keepdims=True), counts))
        # The value is the sequence's log-ratio; the gradient is that of the token's own log-probability (GSPO-token).
        log_ratios = of_sequence + difference(tokens.logprobs, jax.lax.stop_gradient(tokens.logprobs))
    ratios = trust_region.ratios(log_ratios, advantages)
    if loss_type == "cispo":
        policy_losses = -times(jax.lax.stop_gradient(times(advantages, ratios.values)), tokens.logprobs)
    else:
        policy_losses = -times(advantages, ratios.values)

    shares = tokens.counted.astype(policy_losses.dtype) / length
    if loss_type in MEANS_OF_SEQUENCES:
        shares = divided(shares, counts)
    divide_by = divisor((counts > 0).sum() if loss_type in PER_SEQUENCE else counts.sum(), normalizer)
    return _result(tokens, ratios, _weighted(policy_losses, weights, tokens), terms, shares, divide_by)


def ppo_clip(
    logprobs: Float[Array, "*B"],
    old_logprobs: Float[Array, "*B"],
    advantages: Float[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    entropy: Float[Array, "*B"] | None = None,
    weights: Float[Array, "*B"] | None = None,
    epsilon_low: Float[Array, ""] | float = 0.2,
    epsilon_high: Float[Array, ""] | float = 0.2,
    delta: float | None = None,
    entropy_coef: Float[Array, ""] | float = 0.0,
    normalizer: Normalizer = None,
) -> tuple[Float[Array, ""], PolicyMetrics]:
    r"""The clipped surrogate of proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347).

    With ratios $r_t = \pi(y_t) / \pi_\mathrm{old}(y_t)$, advantages $A_t$ and entropies $H_t$, the mean over tokens of

    $$-\min\big(r_t A_t,\ \mathrm{clip}(r_t, 1 - \varepsilon_\mathrm{low}, 1 + \varepsilon_\mathrm{high})\, A_t\big)
      - c\, H_t$$

    `delta` also clips from above the ratios of tokens with a negative advantage (dual clip, Ye et al., 2020,
    arXiv:1912.09729). For log-ratios above 20, $e^x$ is replaced by its tangent. The loss of a value head is not
    included. There is no KL penalty either: subtract it from the rewards, or use `grpo`, whose loss has one.

    Args:
      logprobs: log-probabilities of tokens, `[*B]`, such as those of `jliger.linear_logprobs`. Differentiable.
      old_logprobs: log-probabilities under the policy that sampled the tokens, `[*B]`. No gradient.
      advantages: `[*B]`. No gradient.
      where: bools `[*B]`, True for counted tokens. Values of other tokens are ignored.
      entropy: the entropy at each token, `[*B]`. Differentiable. With `entropy_coef=0` it only gives the metric.
      weights: factors of each token's loss without its entropy term, `[*B]`, such as the importance weights of
        `sampler_correction`. They do not change what the loss is divided by. No gradient.
      epsilon_low: at least 0.
      epsilon_high: at least 0.
      delta: a Python number above `1 + epsilon_high`, or None for no such bound.
      entropy_coef: `c`.
      normalizer: the divisor to use instead of the number of counted tokens. Pass that of the whole batch when
        accumulating microbatches, and inside a `jax.shard_map`. No gradient.

    Returns:
      The loss, `[]`, float32 (float64 for float64 inputs), 0 if no token counts; and `PolicyMetrics`.

    Raises:
      ValueError: a shape does not match, an option is out of range, or the argument of a term is missing.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jliger import losses
      >>> old_logprobs, logprobs = jnp.log(jnp.array([0.4, 0.4])), jnp.log(jnp.array([0.6, 0.44]))
      >>> loss, metrics = losses.ppo_clip(logprobs, old_logprobs, jnp.array([1.0, -1.0]))  # -(1.2 - 1.1) / 2
      >>> print(f"{loss:.2f} {metrics.clip_fraction_high:.1f}")
      -0.05 0.5
    """
    tokens = _tokens(logprobs, old_logprobs, None, entropy, where)
    dtype = tokens.logprobs.dtype
    trust_region = _TrustRegion.make("dapo", epsilon_low, epsilon_high, delta, None, None, dtype=dtype)
    terms = _terms(0.0, entropy_coef, tokens)
    advantages = _constant_of_tokens("advantages", advantages, tokens)
    ratios = trust_region.ratios(tokens.log_ratios, advantages)
    policy_losses = _weighted(-times(advantages, ratios.values), weights, tokens)
    shares = tokens.counted.astype(policy_losses.dtype)
    return _result(tokens, ratios, policy_losses, terms, shares, divisor(tokens.counted.sum(), normalizer))


class _Tokens(NamedTuple):
    """Which tokens count, and their log-probabilities and entropies, set to 0 for uncounted tokens."""

    counted: Bool[Array, "*B"]
    logprobs: Float[Array, "*B"]
    old_logprobs: Float[Array, "*B"]
    ref_logprobs: Float[Array, "*B"] | None
    entropy: Float[Array, "*B"] | None

    @property
    def log_ratios(self) -> Float[Array, "*B"]:
        return difference(self.logprobs, self.old_logprobs)


class _Terms(NamedTuple):
    """Coefficients of the KL penalty and the entropy bonus."""

    beta: Any
    entropy_coef: Any


class _TrustRegion(NamedTuple):
    """How ratios are bounded: bounds, or the temperatures of soft gates, None for a loss type that has none."""

    loss_type: str
    low: Any
    high: Any
    delta: float | None
    tau_pos: Any
    tau_neg: Any

    @classmethod
    def make(
        cls, loss_type: str, low: Any, high: Any, delta: Any, tau_pos: Any, tau_neg: Any, *, dtype: Any
    ) -> "_TrustRegion":
        """Checks the options of `grpo` and fills in the defaults of its loss types."""
        if loss_type == "sapo":
            bounds = {"epsilon_low": low, "epsilon_high": high, "delta": delta}
            _refuse("loss_type='sapo', which does not clip", bounds)
            tau_pos = coefficient("sapo_tau_pos", 1.0 if tau_pos is None else tau_pos, dtype, above=0)
            tau_neg = coefficient("sapo_tau_neg", 1.05 if tau_neg is None else tau_neg, dtype, above=0)
            return cls(loss_type, None, None, None, tau_pos, tau_neg)
        _refuse(f"loss_type={loss_type!r}", {"sapo_tau_pos": tau_pos, "sapo_tau_neg": tau_neg})
        if loss_type == "cispo":
            _refuse("loss_type='cispo', which clips every ratio at 1 + epsilon_high", {"delta": delta})
        default_low, default_high = (1.0, 4.0) if loss_type == "cispo" else (0.2, 0.2)
        low = coefficient("epsilon_low", default_low if low is None else low, dtype, least=0)
        high = coefficient("epsilon_high", default_high if high is None else high, dtype, least=0)
        delta = None if delta is None else number("delta", delta)
        if delta is not None and isinstance(high, float) and delta <= 1 + high:
            raise ValueError(f"delta got {delta}; pass a number above 1 + epsilon_high = {1 + high}, or None.")
        return cls(loss_type, low, high, delta, None, None)

    def ratios(self, log_ratios: Float[Array, "*B"], advantages: Float[Array, "*B"]) -> Ratios:
        if self.loss_type == "sapo":
            return soft_gated(log_ratios, advantages, self.tau_pos, self.tau_neg)
        if self.loss_type == "cispo":
            return held(log_ratios, 1 - self.low, 1 + self.high)
        return clipped(log_ratios, advantages, self.low, self.high, self.delta)


def _refuse(what: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is not for {what}; leave it out.")


def _terms(beta: Any, entropy_coef: Any, tokens: _Tokens) -> _Terms:
    dtype = tokens.logprobs.dtype
    terms = _Terms(coefficient("beta", beta, dtype, least=0), coefficient("entropy_coef", entropy_coef, dtype))
    for name, factor, needed, array in (
        ("beta", terms.beta, "ref_logprobs", tokens.ref_logprobs),
        ("entropy_coef", terms.entropy_coef, "entropy", tokens.entropy),
    ):
        if array is None and not _is_zero(factor):
            raise ValueError(f"{needed} is missing; pass it, or {name}=0.")
    return terms


def _is_zero(factor: Any) -> bool:
    """Whether a coefficient is known to be 0 when the loss is traced. Its term then has no gradient, not one of 0."""
    return isinstance(factor, float) and factor == 0


def _tokens(logprobs: Any, old_logprobs: Any, ref_logprobs: Any, entropy: Any, where: Any) -> _Tokens:
    given = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "entropy": entropy}
    given = {"logprobs": logprobs} | {name: array for name, array in given.items() if array is not None}
    arrays = dict(zip(given, real_arrays(_TOKENS, **given), strict=True))
    counted = mask("where", where, arrays["logprobs"], "one bool per token")
    arrays = dict(zip(given, zero_unless(counted, *arrays.values()), strict=True))
    old_logprobs, ref_logprobs = constant(arrays.get("old_logprobs", arrays["logprobs"]), arrays.get("ref_logprobs"))
    return _Tokens(counted, arrays["logprobs"], old_logprobs, ref_logprobs, arrays.get("entropy"))


def _constant_of_tokens(name: str, value: Any, tokens: _Tokens, *, one_a_sequence: bool = False) -> Float[Array, "*B"]:
    """An array per token, without a gradient; 0 for uncounted tokens."""
    (array,) = constant(*real_arrays(_TOKENS, **{name: value}))
    shape = tokens.logprobs.shape
    if one_a_sequence and array.shape == shape[:-1]:
        array = jnp.broadcast_to(array[..., None], shape)
    what = "one number per token, or one per sequence: logprobs' shape without or with its last dimension"
    checks.check_shape(name, array, shape, what if one_a_sequence else _TOKENS)
    array = sharded_like(tokens.logprobs, array.astype(tokens.logprobs.dtype))
    (array,) = zero_unless(tokens.counted, array)
    return array


def _weighted(policy_losses: Float[Array, "*B"], weights: Any, tokens: _Tokens) -> Float[Array, "*B"]:
    return policy_losses if weights is None else times(_constant_of_tokens("weights", weights, tokens), policy_losses)


def _result(
    tokens: _Tokens, ratios: Ratios, policy_losses: Array, terms: _Terms, shares: Array, divide_by: Any
) -> tuple[Float[Array, ""], PolicyMetrics]:
    """The loss, which is the sum of all terms times `shares`, divided by `divide_by`; and the metrics."""
    losses = policy_losses
    kl = None if tokens.ref_logprobs is None else k3(difference(tokens.ref_logprobs, tokens.logprobs))
    if kl is not None and not _is_zero(terms.beta):
        losses = losses + times(terms.beta, kl)
    if tokens.entropy is not None and not _is_zero(terms.entropy_coef):
        losses = losses - times(terms.entropy_coef, tokens.entropy)

    def share(flags: Bool[Array, "*B"]) -> Float[Array, ""]:
        return mean(flags.astype(losses.dtype), tokens.counted)

    metrics = PolicyMetrics(
        count=tokens.counted.sum(dtype=jnp.int32),
        policy_loss=divided(jnp.sum(shares * policy_losses), divide_by),
        kl=None if kl is None else mean(kl, tokens.counted),
        entropy=None if tokens.entropy is None else mean(tokens.entropy, tokens.counted),
        old_kl=mean(k3(tokens.log_ratios), tokens.counted),
        clip_fraction_low=share(ratios.below),
        clip_fraction_high=share(ratios.above),
    )
    return divided(jnp.sum(shares * losses), divide_by), jax.lax.stop_gradient(metrics)
