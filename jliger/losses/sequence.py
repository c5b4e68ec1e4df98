"""Sums or means of token log-probabilities over each sequence."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.core.reduction import divided
from jliger.losses.arguments import mask, number, real_arrays, zero_unless
from jliger.losses.ratios import times


class SequenceLogprobs(NamedTuple):
    """Log-probabilities of sequences, and how many tokens each sums.

    Attributes:
      logprobs: `[*B]`, float32 (float64 for float64 inputs); 0 for a sequence without a counted token.
      counts: `[*B]`, int32, the number of counted tokens. Pass `counts > 0` to a loss as `where`.
    """

    logprobs: Float[Array, "*B"]
    counts: Int[Array, "*B"]


def sequence_logprobs(
    logprobs: Float[Array, "*B T"],
    where: Bool[Array, "*B T"] | None = None,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    excess_weight: float | None = None,
) -> SequenceLogprobs:
    r"""Sums or averages log-probabilities over the tokens of each sequence.

    The sum is $\log \pi(y \mid x) = \sum_t \log \pi(y_t \mid x, y_{<t})$; the mean is the sum divided by the number of
    counted tokens. `dpo`, `cpo` and `kto` take sums, `orpo` and `simpo` take means.

    With `excess_weight` $\alpha$, `logprobs` are those of pairs, `[*B, 2, T]`. The tokens by which one sequence of a
    pair is longer than the other are weighted by $\alpha$:

    $$\sum_{t \le m} \log \pi(y_t \mid x, y_{<t}) + \alpha \sum_{t > m} \log \pi(y_t \mid x, y_{<t})$$

    where $m$ is the smaller of the pair's numbers of counted tokens. The mean divides by the sum of the weights. With
    the reference's log-probabilities reduced in the same way, `dpo` is then LD-DPO (length-desensitised DPO; Liu et
    al., 2024, arXiv:2409.06411), which makes a policy less verbose.

    A sequence without a counted token gives 0, with a gradient of 0. This 0 is not a log-probability: exclude the
    sequence's pair from the loss, as in the example.

    Args:
      logprobs: log-probabilities of tokens, `[*B, T]`, such as those of `jliger.linear_logprobs`. Differentiable.
      where: bools `[*B, T]`, True for counted tokens: those of the completion, without prompt and padding. Values of
        other tokens, even NaN, are ignored.
      reduction: `"sum"` or `"mean"`.
      excess_weight: `α` in [0, 1], a Python number, or None for 1, which needs no pairs. With `α`, Explicit mesh axes
        must not shard the last dimension.

    Returns:
      `SequenceLogprobs`.

    Raises:
      ValueError: a shape does not match, `reduction` is unknown, `excess_weight` is out of range, or `logprobs` are not
        those of pairs.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jliger import losses
      >>> logprobs = jnp.log(jnp.array([[0.5, 0.25, 0.1], [0.1, 0.1, 0.1]]))
      >>> where = jnp.array([[True, True, False], [False, False, False]])
      >>> chosen = losses.sequence_logprobs(logprobs, where)
      >>> print(jnp.exp(chosen.logprobs).round(3), chosen.counts)
      [0.125 1.   ] [2 0]
      >>> rejected = losses.sequence_logprobs(logprobs[:, ::-1], where)
      >>> _, metrics = losses.cpo(chosen.logprobs, rejected.logprobs, where=(chosen.counts > 0) & (rejected.counts > 0))
      >>> print(metrics.count)
      1

      LD-DPO's sums: the second sequence is longer by one token.

      >>> pair = jnp.log(jnp.array([[0.5, 0.25, 0.1], [0.5, 0.5, 0.25]]))
      >>> where = jnp.array([[True, True, False], [True, True, True]])
      >>> result = losses.sequence_logprobs(pair, where, excess_weight=0.5)
      >>> print(jnp.exp(result.logprobs).round(3), result.counts)  # 0.5 · 0.25 and 0.5 · 0.5 · √0.25
      [0.125 0.125] [2 3]
    """
    checks.check_choice("reduction", reduction, ("sum", "mean"))
    (logprobs,) = real_arrays("one number per token", logprobs=logprobs)
    if logprobs.ndim < 1:
        raise ValueError("logprobs got a scalar; pass an array [*B, T].")
    counted = mask("where", where, logprobs, "one bool per token")
    (logprobs,) = zero_unless(counted, logprobs)
    counts = counted.sum(axis=-1, dtype=jnp.int32)
    divisors = counts
    if excess_weight is not None:
        weights = _pair_weights(
            counted, counts, number("excess_weight", excess_weight, least=0, most=1), logprobs.dtype
        )
        logprobs, divisors = times(weights, logprobs), weights.sum(axis=-1)
    totals = logprobs.sum(axis=-1)
    return SequenceLogprobs(totals if reduction == "sum" else divided(totals, divisors), counts)


def _pair_weights(
    counted: Bool[Array, "*B 2 T"], counts: Int[Array, "*B 2"], excess_weight: float, dtype: Any
) -> Float[Array, "*B 2 T"]:
    """1 for the first tokens that count, as many as the shorter sequence has; `excess_weight` for those after them."""
    if counted.ndim < 2 or counted.shape[-2] != 2:
        raise ValueError(
            f"logprobs got shape {counted.shape} with excess_weight; pass pairs [*B, 2, T], whose two sequences are "
            "compared in length."
        )
    common = counts.min(axis=-1, keepdims=True)[..., None]
    ranks = jnp.cumsum(counted, axis=-1, dtype=jnp.int32)
    weights = jnp.where(ranks <= common, 1, excess_weight).astype(dtype)
    return jnp.where(counted, weights, 0)
