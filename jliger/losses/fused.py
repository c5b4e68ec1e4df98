"""Code shared by the losses that are fused with a head: the counted tokens, and sums of a loss over units."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.core.dtypes import accumulator_dtype
from jliger.core.reduction import Normalizer, divided, divisor
from jliger.ops.linear_head.arguments import HEAD_DEFAULTS, counted_tokens
from jliger.ops.linear_head.logprob_loss import LossHeadOptions, Units, summed_losses


class HeadTokens(NamedTuple):
    """The head's arguments: its arrays, its options, and which tokens count."""

    hidden: Array
    kernel: Any
    tokens: Int[Array, "*B"]
    counted: Bool[Array, "*B"]
    options: LossHeadOptions

    @classmethod
    def make(cls, hidden: Any, kernel: Any, tokens: Any, options: LossHeadOptions) -> "HeadTokens":
        hidden, tokens = checks.as_array("hidden", hidden), checks.as_array("tokens", tokens)
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens got dtype {tokens.dtype}; pass integers.")
        checks.check_shape("tokens", tokens, hidden.shape[:-1], "hidden's leading dimensions")
        where = options.get("where")
        if where is not None:
            where = checks.as_array("where", where)
            checks.check_where(where, tokens)
        ignore_index = options.get("ignore_index", HEAD_DEFAULTS["ignore_index"])
        if ignore_index is not None:
            checks.check_integer("ignore_index", ignore_index)
        counted = counted_tokens(tokens, where, ignore_index)
        return cls(hidden, kernel, tokens, jnp.ones_like(tokens, bool) if counted is None else counted, options)

    def summed(
        self, loss: Callable[..., Any], given: Mapping[str, Any], arrays: Mapping[str, Any], units: Units
    ) -> tuple[Float[Array, ""], Any]:
        """The sum of `loss(result, unit's arrays, **given)` over the units, and the units' auxiliary arrays.

        Functions, strings and Python numbers of `given` become part of the program. Arrays, which carry no gradient,
        are shared by all units.
        """
        static = {name: value for name, value in given.items() if _is_static(value)}
        shared = {name: jnp.asarray(value) for name, value in given.items() if name not in static}
        arguments = jax.lax.stop_gradient(((dict(arrays),), (shared,)))
        unit_loss = _unit_loss(loss, tuple(static.items()))
        return summed_losses(
            unit_loss, self.hidden, self.kernel, self.tokens, *arguments, units=units, has_aux=True, **self.options
        )


def _is_static(value: Any) -> bool:
    return value is None or callable(value) or isinstance(value, str | bool | int | float | np.number)


@functools.cache
def _unit_loss(loss: Callable[..., Any], static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The same function for the same options, so that calls with these compile once."""

    def unit_loss(result: Any, arrays: Mapping[str, Array], shared: Mapping[str, Array]) -> Any:
        return loss(result, arrays, **dict(static), **shared)

    return unit_loss


def mean_over(total: Float[Array, ""], count: Any, normalizer: Normalizer) -> Float[Array, ""]:
    """The total divided by the count, or by `normalizer`."""
    return divided(total, divisor(count, normalizer))


def check_arguments(flat: Callable[..., Any], like: Array, *shapes: tuple[int, ...]) -> None:
    """Checks the arguments of a flat loss for log-probabilities of these shapes, without computing anything."""
    dtype = accumulator_dtype(like.dtype)
    jax.eval_shape(lambda: flat(*(jnp.zeros_like(like, dtype, shape=shape) for shape in shapes)))
