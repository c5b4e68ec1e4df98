"""Gradient accumulators of the fused pass: token gradients are written per chunk, the head's summed over chunks."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head.chunks.arrays import accumulate
from jliger.ops.linear_head.chunks.matmuls import hidden_grad_product, kernel_grad_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk
from jliger.ops.linear_head.chunks.types import zero_gradients
from jliger.ops.linear_head.types import GradientDtypes, Gradients, Head, HeadConfig, Operands


def before_chunks(wanted: GradientDtypes, operands: Operands) -> Gradients:
    """Zeros for token gradients, which uncounted tokens keep; None for the head's, which start with the first chunk."""
    return zero_gradients(GradientDtypes(hidden=wanted.hidden, adapted=wanted.adapted), operands)


def add_chunk(
    config: HeadConfig,
    wanted: GradientDtypes,
    grads: Gradients,
    chunk: Chunk,
    columns: Head,
    logit_grads: Float[Array, "C V"],
    scales: Float[Array, " C"] | None = None,
) -> Gradients:
    """`grads` with a chunk's gradients written (tokens) or added in float32 (head).

    With `scales`, the logit gradients are in units of each token's own scale, and so are the gradients of tokens.
    """
    sums = accumulator_dtype(chunk.hidden.dtype)
    if grads.hidden is not None:
        part = hidden_grad_product(config, logit_grads, columns.kernel, grads.hidden.dtype)
        grads = grads._replace(hidden=chunk.put(grads.hidden, part))
    if grads.adapted is not None and columns.adapter is not None:
        part = hidden_grad_product(config.of_adapter, logit_grads, columns.adapter, grads.adapted.dtype)
        grads = grads._replace(adapted=chunk.put(grads.adapted, part))
    # Sums over tokens are in units of the chunk's largest scale: a token that is too small beside it to be held adds
    # nothing that the sum could hold.
    largest = relative = None
    if scales is not None:
        largest = scales.max()
        relative = (scales / jnp.where(largest == 0, 1, largest))[:, None]

    def rescaled(rows: Array) -> Array:
        return rows if relative is None else rows * relative.astype(rows.dtype)

    def added(total: Array | None, part: Array) -> Array:
        return accumulate(total, part if largest is None else part * largest)

    if wanted.kernel is not None:
        part = kernel_grad_product(config, rescaled(chunk.hidden), logit_grads, sums)
        grads = grads._replace(kernel=added(grads.kernel, part))
    if wanted.adapter is not None and chunk.adapted is not None:
        part = kernel_grad_product(config.of_adapter, rescaled(chunk.adapted), logit_grads, sums)
        grads = grads._replace(adapter=added(grads.adapter, part))
    if wanted.bias is not None:
        wide = logit_grads if relative is None else logit_grads * relative
        grads = grads._replace(bias=added(grads.bias, wide.sum(axis=0, dtype=sums)))
    return grads


def after_chunks(wanted: GradientDtypes, grads: Gradients, head: Head) -> Gradients:
    """The final gradients, with the shapes of the head's arrays and the wanted dtypes."""
    return grads._replace(
        kernel=_finished(grads.kernel, head.kernel, wanted.kernel),
        bias=_finished(grads.bias, head.bias, wanted.bias),
        adapter=_finished(grads.adapter, head.adapter, wanted.adapter),
    )


def _finished(grad: Array | None, like: Array | None, dtype: np.dtype | None) -> Array | None:
    """A gradient without padding, cast to `dtype`."""
    if grad is None or like is None:
        return None
    return grad[tuple(map(slice, like.shape))].astype(dtype)
