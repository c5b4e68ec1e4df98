"""top_k: `linear_top_k`, the largest logits of each token, such as a teacher's for distillation."""

import dataclasses
import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core import checks
from jliger.ops.linear_head import gradients, sharding
from jliger.ops.linear_head.adapter import LinearAdapter, with_adapter
from jliger.ops.linear_head.arguments import HeadOptions, check_names, head_arguments, if_counted
from jliger.ops.linear_head.types import HeadConfig, Operands
from jliger.ops.logits import StatsWanted
from jliger.ops.logits.top_k import MOST_COLUMNS


class LinearTopK(NamedTuple):
    """The most likely columns of each token. Nothing carries a gradient.

    Attributes:
      ids: int32 `[*B, k]`, the columns with the largest logits, the largest first; of equal ones, the lower id first.
        −1 for a token that doesn't count.
      logprobs: `[*B, k]`, their log-probabilities under the softmax over all columns; 0 for a token that doesn't count.
      logsumexp: `[*B]`, of all logits; 0 for a token that doesn't count.
    """

    ids: Int[Array, "*B k"]
    logprobs: Float[Array, "*B k"]
    logsumexp: Float[Array, "*B"]


def linear_top_k(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    k: int,
    **options: Unpack[HeadOptions],
) -> LinearTopK:
    r"""The k most likely columns of each token under a linear head, without storing the logits `[tokens, V]` whole.

    With logits $z$ as in `jliger.fused_linear_cross_entropy`, the ids of the k largest $z_v$ and their
    $\log p_v = z_v - \mathrm{lse}$. Ids and logits are those of `jax.lax.top_k` on the logits in float32, after they
    are rounded to `logits_dtype`, with 0 and −0 equal. A teacher's, written to disk once, are what
    `jliger.losses.fused_linear_top_k_kl` trains a student with.

    A token with a logit of +∞ has NaN log-probabilities and log-sum-exp, as with `jax.nn.log_softmax`.

    Nothing is differentiable: the results are constants for `jax.grad`.

    Logits are computed in chunks of tokens. Memory beside arguments and results is about 0.5 GiB on a GPU for any `V`.
    A kernel that is not in hidden's dtype is cast in blocks of columns, of which one is held at a time. Columns are
    selected in two stages: the best groups of columns, and the best columns of these.

    Args:
      hidden: the model's last hidden states, `[*B, H]`: float32, bfloat16, float16, or float64 (XLA only).
      kernel: the head's weights, `[H, V]`, or `[V, H]` with `kernel_layout="vh"`: hidden's dtype or float32.
      k: how many columns, a Python integer, at least 1, at most 256 and at most the number of columns.
      **options: those of every head, which `jliger.linear_logprobs` documents. `where` says which tokens count;
        `ignore_index` has no effect, because there are no labels.

    Returns:
      `LinearTopK`.

    Raises:
      ValueError: k is out of its range; what `jliger.linear_logprobs` raises.
      TypeError: k is not a Python integer; what `jliger.linear_logprobs` raises.
      NotImplementedError: an unsupported combination.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 5, 8))
      >>> kernel = jax.random.normal(jax.random.key(1), (8, 32))
      >>> top = jliger.linear_top_k(hidden, kernel, 3)
      >>> values, ids = jax.lax.top_k(jax.nn.log_softmax(hidden @ kernel), 3)
      >>> print(top.ids.shape, bool(jnp.all(top.ids == ids)), bool(jnp.allclose(top.logprobs, values, atol=1e-5)))
      (2, 5, 3) True True
    """
    hidden = checks.as_array("hidden", hidden)
    checks.check_integer("k", k)
    check_names(options)
    labels = jnp.zeros(hidden.shape[:-1], jnp.int32)
    arguments = head_arguments(hidden, kernel, labels, stats_wanted=StatsWanted(), **options)
    if not 1 <= k <= MOST_COLUMNS:
        raise ValueError(f"k got {k}; pass a number of columns from 1 to {MOST_COLUMNS}.")
    config = dataclasses.replace(arguments.config, top_k=int(k))
    return _linear_top_k(config, arguments.operands, arguments.adapter, arguments.where)


@functools.partial(jax.jit, static_argnums=0)
def _linear_top_k(
    config: HeadConfig, operands: Operands, adapter: LinearAdapter | None, where: Bool[Array, "*B"] | None
) -> LinearTopK:
    operands, adapter = jax.lax.stop_gradient((operands, adapter))
    operands = with_adapter(config, operands, adapter)
    _check_columns(config, operands.kernel)
    inverse_temperature = operands.inverse_temperature
    if inverse_temperature is not None:
        inverse_temperature = if_counted(where, inverse_temperature, 1)
    operands = operands._replace(
        # Spread over devices as the tokens are.
        labels=jnp.zeros_like(operands.hidden.sum(axis=-1), dtype=jnp.int32),
        counted=where,
        inverse_temperature=inverse_temperature,
    )
    stats = gradients.top_k_stats(config, operands)
    # The logits and the maximum may be large and close: subtract them first, to keep log_sum's precision.
    logprobs = stats.top.logits - stats.max[..., None] - stats.log_sum[..., None]
    every = None if where is None else where[..., None]
    return LinearTopK(
        ids=if_counted(every, stats.top.ids, -1),
        logprobs=if_counted(every, logprobs, 0),
        logsumexp=if_counted(where, stats.max + stats.log_sum, 0),
    )


def _check_columns(config: HeadConfig, kernel: Any) -> None:
    """Checks that there are k columns; inside a `shard_map`, over all devices."""
    vocab_size = sharding.vocab_size(config, kernel)
    assert config.top_k is not None
    if config.top_k > vocab_size:
        raise ValueError(f"k got {config.top_k}; pass at most {vocab_size}, the number of columns that exist.")
