"""The recompute form: gradients for any cotangents, after `token_stats`; three products more, the least memory."""

from jaxtyping import Array, Float, Int

from jliger.chunks.arrays import plus, write_block, zeros_if_wanted
from jliger.chunks.blocks import Blocks
from jliger.chunks.queue import Chunk, Queue
from jliger.chunks.sizes import part_sizes, recompute_tile
from jliger.chunks.types import Grads, GradTypes, Head, Tokens, accumulator_dtype
from jliger.config import HeadConfig
from jliger.products import hidden_grad_product, kernel_grad_product, logits_product
from jliger.rows import Coefficients, get_rows


def recompute_form(
    config: HeadConfig,
    wanted: GradTypes,
    tokens: Tokens,
    head: Head,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
) -> Grads:
    """Gradients for any coefficients.

    Args:
      config: how logits come about.
      wanted: which gradients, in which dtypes.
      tokens: `[T]` of them.
      head: kernel, bias and class weights.
      row_max: of each token's stats, over all columns, `[T]`.
      log_sum: likewise.
      coefficients: of each token's logit gradients, `[T]`.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    dtype = tokens.hidden.dtype
    sums = accumulator_dtype(dtype)
    num_tokens, vocab = tokens.labels.shape[0], head.kernel.shape[config.vocab_dim]
    chunk_size, width = recompute_tile(config, num_tokens, vocab)
    blocks = Blocks.make(config, head, dtype, rows.alignment, width)
    queue = Queue.make(tokens.counted, chunk_size)
    # With several chunks the kernel's gradient is a sum over them; with one, each block of it is written once.
    add = queue.num_chunks > 1

    def step(size: int, index: Int[Array, ""] | int, grads: Grads) -> Grads:
        chunk = Chunk.make(queue.slots(index * queue.chunk, size), tokens, rows.alignment)
        chunk_max, chunk_log_sum, chunk_coefficients = chunk.take((row_max, log_sum, coefficients))

        def block_step(index: Int[Array, ""] | int, carry: Grads) -> Grads:
            kernel, block, start = blocks.block(index, chunk.labels)
            product = logits_product(config, chunk.hidden, kernel)
            logit_grads = rows.row_grads(
                product, block, blocks.logit_map, chunk_max, chunk_log_sum, chunk_coefficients, dtype=dtype
            )
            if wanted.hidden is not None:
                part = hidden_grad_product(config, logit_grads, kernel, sums)
                carry = carry._replace(hidden=plus(carry.hidden, part))
            if carry.kernel is not None:
                part = kernel_grad_product(config, chunk.hidden, logit_grads, sums)
                carry = carry._replace(kernel=blocks.write_kernel(carry.kernel, part, start, add=add))
            if carry.bias is not None:
                part = logit_grads.sum(axis=0, dtype=sums)[: blocks.width]
                carry = carry._replace(bias=write_block(carry.bias, part, (start,), add=add))
            return carry

        found = blocks.sweep(block_step, grads._replace(hidden=None))
        if grads.hidden is None or found.hidden is None:
            return found
        return found._replace(hidden=chunk.put(grads.hidden, found.hidden))

    kernel_dtype = None if wanted.kernel is None else sums if add else wanted.kernel
    grads = Grads(
        zeros_if_wanted(tokens.hidden.shape, wanted.hidden, tokens.hidden),
        zeros_if_wanted(head.kernel.shape, kernel_dtype, tokens.hidden),
        zeros_if_wanted((vocab,), None if wanted.bias is None else sums, tokens.hidden),
    )
    grads = queue.loop(step, grads, part_sizes(queue.chunk))
    return Grads(*(grad if grad is None else grad.astype(dtype) for grad, dtype in zip(grads, wanted, strict=True)))
