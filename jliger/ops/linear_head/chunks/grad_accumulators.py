"""Gradient accumulators of the fused pass: token gradients are written per chunk, the head's summed over chunks."""

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
) -> Gradients:
    """`grads` with a chunk's gradients written (tokens) or added in float32 (head)."""
    sums = accumulator_dtype(chunk.hidden.dtype)
    if grads.hidden is not None:
        part = hidden_grad_product(config, logit_grads, columns.kernel, grads.hidden.dtype)
        grads = grads._replace(hidden=chunk.put(grads.hidden, part))
    if grads.adapted is not None and columns.adapter is not None:
        part = hidden_grad_product(config.of_adapter, logit_grads, columns.adapter, grads.adapted.dtype)
        grads = grads._replace(adapted=chunk.put(grads.adapted, part))
    if wanted.kernel is not None:
        part = kernel_grad_product(config, chunk.hidden, logit_grads, sums)
        grads = grads._replace(kernel=accumulate(grads.kernel, part))
    if wanted.adapter is not None and chunk.adapted is not None:
        part = kernel_grad_product(config.of_adapter, chunk.adapted, logit_grads, sums)
        grads = grads._replace(adapter=accumulate(grads.adapter, part))
    if wanted.bias is not None:
        grads = grads._replace(bias=accumulate(grads.bias, logit_grads.sum(axis=0, dtype=sums)))
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
