"""An implementation of levanter's fused cross entropy: `install` it, or pass `cross_entropy` to its functions."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

import jliger
from jliger.integrations.versions import check_version


def install() -> None:
    """Makes this the implementation that levanter's models use by default, in this process.

    Raises:
      ImportError: levanter's version is not one that was tested.
    """
    check_version("marin-levanter")
    from levanter.kernels.pallas.fused_cross_entropy_loss import api

    api._default_implementations = lambda: (cross_entropy,)


def cross_entropy(
    x: Float[Array, "B H"],
    labels: Int[Array, " B"],
    w: Float[Array, "H V"],
    *,
    block_sizes: Any = None,
    dtype: jax.typing.DTypeLike | None = None,
    logit_soft_cap: float | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_argmax: bool = False,
) -> tuple[Array, ...]:
    """Each token's cross entropy and log-sum-exp, as levanter asks its implementations for them.

    This imports and replaces nothing of levanter, so its version isn't checked: an argument that it adds raises.

    Args:
      x: hidden states `[B, H]`.
      labels: `[B]`. All tokens count; levanter multiplies by their weights afterwards.
      w: the head's weights `[H, V]`.
      block_sizes: ignored; they are for levanter's own kernels.
      dtype: the dtype that logits are rounded to; None for that of `x`. Products are computed in the dtype of `x`.
      logit_soft_cap: the softcap of the logits, or None.
      precision: of the matrix products.
      return_argmax: also return predictions.

    Returns:
      Losses and log-sum-exps, float32 `[B]`, and with `return_argmax` int32 predictions `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss, logsumexp = cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 7]), jnp.ones((4, 8)))
      >>> print(loss)
      [2.0794415 2.0794415 2.0794415]
    """
    del block_sizes
    result = jliger.linear_logprobs(
        x, w, labels, ignore_index=None, logit_softcap=logit_soft_cap, logits_dtype=dtype, precision=precision
    )
    return (-result.logprobs, result.logsumexp, result.predictions)[: 2 + return_argmax]
