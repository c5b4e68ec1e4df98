"""From log-probabilities of tokens to those of sequences."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.core.reduction import divided
from jliger.losses.arguments import mask, real_arrays, zero_unless


class SequenceLogprobs(NamedTuple):
    """Log-probabilities of sequences, and of how many tokens.

    Attributes:
      logprobs: `[*B]`, float32 (float64 for float64); 0 for a sequence of which no token counts.
      counts: `[*B]`, int32, the tokens that count. `counts > 0` is what a loss needs as `where`.
    """

    logprobs: Float[Array, "*B"]
    counts: Int[Array, "*B"]


def sequence_logprobs(
    logprobs: Float[Array, "*B T"],
    where: Bool[Array, "*B T"] | None = None,
    *,
    reduction: Literal["sum", "mean"] = "sum",
) -> SequenceLogprobs:
    r"""Sums, or averages, log-probabilities over the tokens of each sequence.

    $\log \pi(y \mid x) = \sum_t \log \pi(y_t \mid x, y_{<t})$, or that divided by the number of tokens. `dpo`, `cpo`
    and `kto` are defined on sums, `orpo` and `simpo` on means.

    A sequence of which no token counts gives 0, and a gradient of 0. That is no log-probability of anything: leave its
    pair out, as in the example.

    Args:
      logprobs: of tokens, `[*B, T]`, such as those of `jliger.linear_logprobs`. Gradients go through them.
      where: bools `[*B, T]`, the tokens that count: those of the completion, without prompt and padding. What stands
        elsewhere, NaN included, does not matter.
      reduction: `"sum"` or `"mean"`.

    Returns:
      `SequenceLogprobs`.

    Raises:
      ValueError: a shape that doesn't fit, or another reduction.
      TypeError: a dtype that isn't supported.

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
    (logprobs,) = real_arrays("one number a token", logprobs=logprobs)
    if logprobs.ndim < 1:
        raise ValueError("logprobs got a scalar; pass an array [*B, T].")
    counted = mask("where", where, logprobs, "one bool a token")
    (logprobs,) = zero_unless(counted, logprobs)
    counts = counted.sum(axis=-1, dtype=jnp.int32)
    totals = logprobs.sum(axis=-1)
    return SequenceLogprobs(totals if reduction == "sum" else divided(totals, counts), counts)
