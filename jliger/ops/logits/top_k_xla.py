"""The largest logits of each row in plain JAX, for every device and dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.ops.logits.top_k_types import NO_COLUMN, TopLogits
from jliger.ops.logits.types import Block, LogitMap
from jliger.ops.logits.xla import _logits

_GROUP = 32  # columns per group


def top_logits(product: Float[Array, "T V"], block: Block, logit_map: LogitMap, k: int) -> TopLogits:
    """The k largest logits, selected in two stages, because on most devices `jax.lax.top_k` sorts.

    The k groups with the largest maxima contain the k largest logits: a logit in another group is preceded by the k
    maxima. Groups are contiguous, so that of equal maxima the first group has the lower ids.
    """
    logits, _, inside = _logits(product, block, logit_map)
    rows, width = product.shape
    # Columns that are not inside come last, after those with −inf.
    ids = jnp.where(inside, jax.lax.broadcasted_iota(jnp.int32, product.shape, 1), NO_COLUMN)
    num_groups = -(-width // _GROUP)
    if num_groups > k:
        padding = ((0, 0), (0, num_groups * _GROUP - width))
        logits = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(rows, num_groups, _GROUP)
        ids = jnp.pad(ids, padding, constant_values=NO_COLUMN).reshape(rows, num_groups, _GROUP)
        groups = jnp.sort(jax.lax.top_k(logits.max(axis=2), k)[1], axis=1)[:, :, None]
        logits, ids = (jnp.take_along_axis(array, groups, axis=1).reshape(rows, -1) for array in (logits, ids))
    elif width < k:
        padding = ((0, 0), (0, k - width))
        logits = jnp.pad(logits, padding, constant_values=-jnp.inf)
        ids = jnp.pad(ids, padding, constant_values=NO_COLUMN)
    # Candidates are in the order of their ids, and `jax.lax.top_k` prefers the earlier of equals.
    values, places = jax.lax.top_k(logits, k)
    return TopLogits(jnp.take_along_axis(ids, places, axis=1), values)
