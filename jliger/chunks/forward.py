"""The forward form: gradients together with the loss, three products."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Int

from jliger.chunks.arrays import plus
from jliger.chunks.blocks import Blocks
from jliger.chunks.queue import Chunk, Queue, write_stats
from jliger.chunks.sizes import forward_chunk
from jliger.chunks.types import Grads, GradTypes, Head, Tokens, accumulator_dtype, empty_grads
from jliger.config import HeadConfig
from jliger.products import hidden_grad_product, kernel_grad_product, logits_product
from jliger.rows import Coefficients, RowStats, get_rows


def forward_form(
    config: HeadConfig,
    wanted: GradTypes,
    tokens: Tokens,
    head: Head,
    coefficients: Coefficients,
    merge: Callable[[RowStats], RowStats] | None = None,
) -> tuple[RowStats, Grads]:
    """Stats, and the gradients of a loss whose coefficients are known beforehand.

    Args:
      config: how logits come about.
      wanted: which gradients, in which dtypes; the kernel's and the bias's are sums over chunks in float32 before.
      tokens: `[T]` of them.
      head: kernel, bias and class weights.
      coefficients: of each token's logit gradients, `[T]`.
      merge: makes stats of all columns from those of the head's, if it has but some; the stats returned are the head's.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    dtype = tokens.hidden.dtype
    sums = accumulator_dtype(dtype)
    vocab = head.kernel.shape[config.vocab_dim]
    blocks = Blocks.make(config, head, dtype, rows.alignment)
    queue = Queue.make(tokens.counted, forward_chunk(config, tokens.labels.shape[0], vocab))

    def step(size: int, index: Int[Array, ""] | int, carry: tuple[RowStats, Grads]) -> tuple[RowStats, Grads]:
        stats, grads = carry
        start = index * queue.chunk
        chunk = Chunk.make(queue.slots(start, size), tokens, rows.alignment)
        columns, block, _ = blocks.block(0, chunk.labels)
        product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
        parts = (product, block, blocks.logit_map)
        chunk_coefficients = chunk.take(coefficients)
        if merge is None:
            found, logit_grads = rows.row_stats_and_grads(*parts, config.stats_wanted, chunk_coefficients, dtype=dtype)
        else:
            found = rows.row_stats(*parts, config.stats_wanted)
            all_columns = merge(found)
            logit_grads = rows.row_grads(*parts, all_columns.max, all_columns.log_sum, chunk_coefficients, dtype=dtype)
        if grads.hidden is not None:
            part = hidden_grad_product(config, logit_grads, columns.kernel, grads.hidden.dtype)
            grads = grads._replace(hidden=chunk.put(grads.hidden, part))
        if grads.adapted is not None and columns.adapter is not None:
            part = hidden_grad_product(config.of_adapter, logit_grads, columns.adapter, grads.adapted.dtype)
            grads = grads._replace(adapted=chunk.put(grads.adapted, part))
        if wanted.kernel is not None:
            part = kernel_grad_product(config, chunk.hidden, logit_grads, sums)
            grads = grads._replace(kernel=plus(grads.kernel, part))
        if wanted.adapter is not None and chunk.adapted is not None:
            part = kernel_grad_product(config.of_adapter, chunk.adapted, logit_grads, sums)
            grads = grads._replace(adapter=plus(grads.adapter, part))
        if wanted.bias is not None:
            grads = grads._replace(bias=plus(grads.bias, logit_grads.sum(axis=0, dtype=sums)))
        return write_stats(stats, found, start), grads

    grads = empty_grads(GradTypes(wanted.hidden, None, None, wanted.adapted, None), tokens, head)
    stats, grads = queue.loop(step, (queue.empty_stats(config, tokens.hidden), grads), (queue.chunk,))
    return queue.restore(stats), grads._replace(
        kernel=_finished(grads.kernel, head.kernel, wanted.kernel),
        bias=_finished(grads.bias, head.bias, wanted.bias),
        adapter=_finished(grads.adapter, head.adapter, wanted.adapter),
    )


def _finished(grad: Array | None, like: Array | None, dtype: np.dtype | None) -> Array | None:
    """Without padding, and rounded."""
    if grad is None or like is None:
        return None
    return grad[tuple(map(slice, like.shape))].astype(dtype)
