"""Shifts tokens to make labels: the label of each position is the token that it predicts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jliger.core import checks


def shift_labels(
    tokens: Int[Array, "*B L"],
    mask: Bool[Array, "*B L"] | None = None,
    by: int | Sequence[int] = 1,
    *,
    segment_ids: Int[Array, "*B L"] | None = None,
    padding_segment: int | None = 0,
    ignore_index: int = -100,
) -> Int[Array, "*B L"] | Int[Array, "K *B L"]:
    """Labels for next-token prediction: each position gets the token `by` positions later, or `ignore_index`.

    The losses in jliger never shift labels. If the model returns hidden states for all tokens, pass
    `shift_labels(tokens, mask)` for next-token prediction, or `shift_labels(tokens, mask, by=range(1, k + 1))` for k
    heads that predict 1 to k tokens ahead (Gloeckle et al., 2024, arXiv:2404.19737). If the model shifts its inputs
    itself, as flax's lm1b example does, use `by=0`, or the tokens unchanged.

    If a sequence is sharded, call this outside of `jax.shard_map`: inside, each device only sees its part of the
    sequence.

    Args:
      tokens: `[*B, L]`, integers.
      mask: bools `[*B, L]`, the tokens that count as labels, such as those of an answer but not of its prompt. It is
        shifted together with the tokens: `mask[t]` belongs to `tokens[t]`.
      by: the number of positions to look ahead, at least 0; or a sequence of them, whose labels are stacked on a new
        first axis.
      segment_ids: `[*B, L]`, integers that identify packed documents. A label from another document than its position's
        is ignored.
      padding_segment: the segment id of padding, whose labels are all ignored: 0, as in T5X and MaxText. None if every
        segment is a document, for example if documents are numbered from 0. No effect without `segment_ids`.
      ignore_index: the label of uncounted positions.

    Returns:
      Labels `[*B, L]`, or `[len(by), *B, L]` for a sequence. Their dtype is that of the tokens, or int32 if that cannot
      represent `ignore_index`.

    Raises:
      ValueError: a shape does not match, or `by` is negative or empty.
      TypeError: a dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> tokens = jnp.array([[5, 6, 7, 8]])
      >>> print(jliger.shift_labels(tokens))
      [[   6    7    8 -100]]
      >>> print(jliger.shift_labels(tokens, mask=jnp.array([[False, False, True, True]]), by=range(1, 3)).tolist())
      [[[-100, 7, 8, -100]], [[7, 8, -100, -100]]]
      >>> tokens, segments = jnp.array([[5, 6, 7, 8, 0, 0]]), jnp.array([[1, 1, 2, 2, 0, 0]])
      >>> print(jliger.shift_labels(tokens, segment_ids=segments).tolist())
      [[6, -100, 8, -100, -100, -100]]
    """
    if not isinstance(by, int | np.integer):
        options = {"segment_ids": segment_ids, "padding_segment": padding_segment, "ignore_index": ignore_index}
        shifted = [shift_labels(tokens, mask, one, **options) for one in by]
        if not shifted:
            raise ValueError("by got no distances; pass at least one.")
        return jnp.stack(shifted)
    if isinstance(by, bool) or by < 0:
        raise ValueError(f"by got {by!r}; pass how many tokens to look ahead, at least 0.")
    tokens = checks.as_array("tokens", tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens got dtype {tokens.dtype}; pass integers.")
    if tokens.ndim < 1:
        raise ValueError("tokens got a scalar; pass an array [*B, L].")
    limits = jnp.iinfo(tokens.dtype)
    if not limits.min <= ignore_index <= limits.max:
        tokens = tokens.astype(jnp.int32)
    labels = _ahead(tokens, by, ignore_index)
    if mask is not None:
        mask = checks.as_array("mask", mask)
        if mask.dtype != jnp.bool:
            raise TypeError(f"mask got dtype {mask.dtype}; pass bools (`mask != 0`).")
        checks.check_shape("mask", mask, tokens.shape, "one bool per token")
        labels = jnp.where(_ahead(mask, by, False), labels, ignore_index)
    if segment_ids is not None:
        segment_ids = checks.as_array("segment_ids", segment_ids)
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids got dtype {segment_ids.dtype}; pass integers.")
        checks.check_shape("segment_ids", segment_ids, tokens.shape, "one integer per token")
        same = _ahead(segment_ids, by, 0) == segment_ids
        if padding_segment is not None:
            checks.check_integer("padding_segment", padding_segment)
            # If the dtype cannot represent padding_segment, there is no such segment. A comparison would wrap it
            # around.
            limits = jnp.iinfo(segment_ids.dtype)
            if limits.min <= padding_segment <= limits.max:
                same &= segment_ids != padding_segment
        labels = jnp.where(same, labels, ignore_index)
    return labels


def _ahead(array: Array, by: int, fill: int | bool) -> Array:
    """The elements `by` positions later. A gather, because JAX raises for slices of a sharded (Explicit) dimension."""
    positions = jnp.arange(array.shape[-1]) + by
    return array.at[..., positions].get(mode="fill", fill_value=fill, out_sharding=jax.typeof(array).sharding)
