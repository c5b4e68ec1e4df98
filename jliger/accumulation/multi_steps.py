"""An optimizer that accumulates gradients over several calls, weighted by their numbers of tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jliger.accumulation.devices import zeros_of_type
from jliger.core.dtypes import accumulator_dtype
from jliger.core.reduction import weight_divisor

if TYPE_CHECKING:
    import optax


class WeightedMultiStepsState(NamedTuple):
    """The state of `weighted_multi_steps`: a tree of arrays, which can be saved after any call.

    Attributes:
      mini_step: int32, the number of calls since the last update.
      gradient_step: int32, the number of updates.
      weight: the sum of the weights of the calls since the last update: float32, or float64 with `jax_enable_x64`.
      mean_gradients: the weighted mean of the gradients of these calls.
      inner_state: the state of the inner optimizer.
    """

    mini_step: Int[Array, ""]
    gradient_step: Int[Array, ""]
    weight: Float[Array, ""]
    mean_gradients: Any
    inner_state: Any

    @property
    def has_updated(self) -> Bool[Array, ""]:
        """Whether the last call updated the parameters."""
        return jnp.logical_and(jnp.equal(self.mini_step, 0), jnp.greater(self.gradient_step, 0))


def weighted_multi_steps(
    optimizer: "optax.GradientTransformation", every_k_schedule: int | Callable[[Int[Array, ""]], Any]
) -> "optax.GradientTransformationExtraArgs":
    r"""`optax.MultiSteps` with gradients weighted by their numbers of tokens.

    The last of k calls updates the parameters. It passes `optimizer` the gradient

    $$\frac{\sum_i \mathrm{weight}_i \, \mathrm{gradients}_i}{\sum_i \mathrm{weight}_i}$$

    The other calls return updates of zero. If the gradients are those of mean losses, and each weight is the number of
    tokens in the mean, this is the gradient of the mean loss over the tokens of all k calls. The mean of means that
    `optax.MultiSteps` computes is not. A weight is that of the whole call, over all devices, such as the `weight` that
    `accumulate_gradients` returns.

    Means are float32 (float64 for float64); `optimizer` gets them in the dtype of the gradients. Its state keeps its
    initial dtypes, which are usually those of the parameters, as in `optax.MultiSteps`. The optimizer is called once
    per k calls: clipping applies to the mean of all k, and schedules count updates. If all weights are 0 it gets
    gradients of 0. With `optax.apply_if_finite` inside, as `optimizer`, a call with non-finite gradients causes its
    update to be skipped, but no later one. With `optax.apply_if_finite` around the result, only such a call is skipped.

    Args:
      optimizer: an optax transformation.
      every_k_schedule: k, or a function from the number of updates so far to k.

    Returns:
      A transformation whose `update(gradients, state, params, weight=...)` requires the weight, a scalar of at least 0.
      `optimizer` gets the other extra arguments of the last of k calls. `has_updated` of the state says whether the
      last call updated the parameters.

    Raises:
      ValueError: k is below 1.
      TypeError: k is not an integer, or `update` is called without a weight.

    Examples:
      >>> import jax.numpy as jnp, jliger, optax
      >>> optimizer = jliger.weighted_multi_steps(optax.sgd(1.0), every_k_schedule=2)
      >>> params = jnp.zeros(1)
      >>> state = optimizer.init(params)
      >>> for gradient, tokens in ((1.0, 30), (5.0, 10)):
      ...     updates, state = optimizer.update(jnp.array([gradient]), state, params, weight=tokens)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params, state.has_updated)
      [0.] False
      [-2.] True
    """
    import optax  # imported here, because it would slow down `import jliger`

    inner = optax.with_extra_args_support(optimizer)
    if not callable(every_k_schedule):
        if isinstance(every_k_schedule, bool) or not isinstance(every_k_schedule, int | np.integer):
            raise TypeError(
                f"every_k_schedule got {every_k_schedule!r}; pass an integer, or a function of the updates."
            )
        if every_k_schedule < 1:
            raise ValueError(f"every_k_schedule got {every_k_schedule}; pass 1 or more calls for an update.")

    def init(params: Any) -> WeightedMultiStepsState:
        return WeightedMultiStepsState(
            mini_step=jnp.int32(0),
            gradient_step=jnp.int32(0),
            weight=jnp.zeros(()),
            mean_gradients=jax.tree.map(_zeros, params),
            inner_state=inner.init(params),
        )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, WeightedMultiStepsState]:
        weight = extra_args.pop("weight", None)
        if weight is None:
            raise TypeError("weight got nothing; pass update(gradients, state, params, weight=tokens).")
        if jnp.shape(weight) != ():
            raise ValueError(
                f"weight got shape {jnp.shape(weight)}; pass a scalar: the tokens that the gradients are a mean of."
            )
        calls = every_k_schedule(state.gradient_step) if callable(every_k_schedule) else every_k_schedule
        weight = jnp.asarray(weight, state.weight.dtype)
        total = state.weight + weight

        def mean(old: Array, new: Array) -> Array:
            """The weighted mean of all calls so far. A call of weight 0 is skipped: its gradients may be 0 / 0."""
            share = weight.astype(old.dtype) / weight_divisor(total).astype(old.dtype)
            return jnp.where(weight == 0, old, old + (new.astype(old.dtype) - old) * share)

        means = jax.tree.map(mean, state.mean_gradients, updates)

        def emit() -> tuple[Any, WeightedMultiStepsState]:
            gradients = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), means, updates)
            changes, inner_state = inner.update(gradients, state.inner_state, params, **extra_args)
            # Without this cast, float32 gradients would turn the state of bfloat16 parameters into float32.
            inner_state = jax.tree.map(lambda new, old: jnp.astype(new, old.dtype), inner_state, state.inner_state)
            zeros = jax.tree.map(jnp.zeros_like, means)
            return changes, WeightedMultiStepsState(
                jnp.zeros_like(state.mini_step), state.gradient_step + 1, jnp.zeros_like(total), zeros, inner_state
            )

        def keep() -> tuple[Any, WeightedMultiStepsState]:
            changes = jax.tree.map(zeros_of_type, changes_type)
            return changes, state._replace(mini_step=state.mini_step + 1, weight=total, mean_gradients=means)

        changes_type, _ = jax.eval_shape(emit)
        return jax.lax.cond(state.mini_step + 1 >= calls, emit, keep)

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(param: Array) -> Array:
    return jnp.zeros_like(param, dtype=accumulator_dtype(jnp.result_type(param)))
