"""labels: tokens shifted, so that each position's label is the token it predicts."""

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
    """The token that comes `by` positions later, as each position's label; `ignore_index` where there is none.

    The losses here never shift. With hidden states of all tokens, `shift_labels(tokens, mask)` are the labels of next
    token prediction, and `shift_labels(tokens, mask, by=range(1, k + 1))` those of k heads that look 1 to k tokens
    ahead (Gloeckle et al., 2024, arXiv:2404.19737). Where a model shifts its inputs itself, as flax's lm1b example
    does, use `by=0`, or the tokens as they are.

    Inside a `jax.shard_map` whose devices share a sequence, each device has only its own part to shift: call this
    before.

    Args:
      tokens: `[*B, L]`, integers.
      mask: bools `[*B, L]`, the tokens that count as labels, such as those of an answer and not of its prompt. It is
        shifted along with the tokens: `mask[t]` is of `tokens[t]`.
      by: how far ahead, at least 0; or several of that, for labels with a leading axis of one entry each.
      segment_ids: `[*B, L]`, integers that tell packed documents apart. A label of another document than its position
        is ignored.
      padding_segment: the segment id of padding, whose labels are all ignored: 0, as in T5X and MaxText. None if every
        segment is a document, such as where documents are numbered from 0. It has no effect without `segment_ids`.
      ignore_index: the label of what doesn't count.

    Returns:
      Labels of the tokens' dtype, or int32 if that cannot hold `ignore_index`: `[*B, L]`, with several `by`
      `[len(by), *B, L]`.

    Raises:
      ValueError: a shape that doesn't fit, or a negative `by`.
      TypeError: a dtype that isn't supported.

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
        checks.check_shape("mask", mask, tokens.shape, "one bool a token")
        labels = jnp.where(_ahead(mask, by, False), labels, ignore_index)
    if segment_ids is not None:
        segment_ids = checks.as_array("segment_ids", segment_ids)
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids got dtype {segment_ids.dtype}; pass integers.")
        checks.check_shape("segment_ids", segment_ids, tokens.shape, "one integer a token")
        same = _ahead(segment_ids, by, 0) == segment_ids
        if padding_segment is not None:
            checks.check_integer("padding_segment", padding_segment)
            # A dtype that cannot hold padding_segment has no such segment; a comparison would wrap it around.
            limits = jnp.iinfo(segment_ids.dtype)
            if limits.min <= padding_segment <= limits.max:
                same &= segment_ids != padding_segment
        labels = jnp.where(same, labels, ignore_index)
    return labels


def _ahead(array: Array, by: int, fill: int | bool) -> Array:
    """What is `by` positions later. A gather, since slices of a dimension spread over devices are refused."""
    positions = jnp.arange(array.shape[-1]) + by
    return array.at[..., positions].get(mode="fill", fill_value=fill, out_sharding=jax.typeof(array).sharding)
