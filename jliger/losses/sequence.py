"""Sums or means of token log-probabilities over each sequence."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.core.reduction import divided
from jliger.losses.arguments import mask, real_arrays, zero_unless


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
) -> SequenceLogprobs:
    r"""Sums or averages log-probabilities over the tokens of each sequence.

    The sum is $\log \pi(y \mid x) = \sum_t \log \pi(y_t \mid x, y_{<t})$; the mean is the sum divided by the number of
    counted tokens. `dpo`, `cpo` and `kto` take sums, `orpo` and `simpo` take means.

    A sequence without a counted token gives 0, with a gradient of 0. This 0 is not a log-probability: exclude the
    sequence's pair from the loss, as in the example.

    Args:
      logprobs: log-probabilities of tokens, `[*B, T]`, such as those of `jliger.linear_logprobs`. Differentiable.
      where: bools `[*B, T]`, True for counted tokens: those of the completion, without prompt and padding. Values of
        other tokens, even NaN, are ignored.
      reduction: `"sum"` or `"mean"`.

    Returns:
      `SequenceLogprobs`.

    Raises:
      ValueError: a shape does not match, or `reduction` is unknown.
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
    """
    checks.check_choice("reduction", reduction, ("sum", "mean"))
    (logprobs,) = real_arrays("one number per token", logprobs=logprobs)
    if logprobs.ndim < 1:
        raise ValueError("logprobs got a scalar; pass an array [*B, T].")
    counted = mask("where", where, logprobs, "one bool per token")
    (logprobs,) = zero_unless(counted, logprobs)
    counts = counted.sum(axis=-1, dtype=jnp.int32)
    totals = logprobs.sum(axis=-1)
    return SequenceLogprobs(totals if reduction == "sum" else divided(totals, counts), counts)
