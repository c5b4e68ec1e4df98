"""The recompute pass: gradients for any cotangents, given the statistics; three more products, and the least memory."""

from jaxtyping import Array, Float, Int

from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head.chunks.arrays import accumulate
from jliger.ops.linear_head.chunks.matmuls import hidden_grad_product, kernel_grad_product, logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens
from jliger.ops.linear_head.chunks.sizes import part_sizes, recompute_tile
from jliger.ops.linear_head.chunks.types import dtypes_of_sums, zero_gradients
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks, Span
from jliger.ops.linear_head.types import Differentiable, GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import Coefficients, get_rows


def recompute_pass(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
    others: Gradients | None = None,
) -> Gradients:
    """Gradients for any coefficients.

    Args:
      config: how logits are computed.
      wanted: the dtypes of the wanted gradients.
      operands: arrays of `[T]` tokens.
      row_max: `RowStats.max` over all columns, `[T]`.
      log_sum: `RowStats.log_sum` over all columns, `[T]`.
      coefficients: coefficients of the logit gradients, `[T]`.
      others: gradients of tokens that don't count here, in the dtypes of `dtypes_of_sums`, to be added; None for none.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    dtype = operands.hidden.dtype
    sums = accumulator_dtype(dtype)
    num_tokens, vocab = operands.labels.shape[0], operands.kernel.shape[config.vocab_dim]
    chunk_size, width = recompute_tile(config, num_tokens, vocab)
    blocks = Blocks.make(config, operands.head, dtype, rows.alignment, width)
    packed = PackedTokens.of(operands, chunk_size)
    # With several chunks the kernel's gradient is a float32 sum over them. With one, each block is written once, and
    # directly in the result's dtype.
    add = packed.has_several_chunks or others is not None

    def step(size: int, index: Int[Array, ""] | int, grads: Gradients) -> Gradients:
        chunk = Chunk.make(packed.slots(index * packed.chunk, size), operands, rows.alignment)
        of_chunk = chunk.take((row_max, log_sum, coefficients))

        def block_step(span: Span, carry: Gradients) -> Gradients:
            columns, block = blocks.block(span, chunk)
            product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
            logit_grads = rows.row_grads(product, block, config.logit_map(span.width), *of_chunk, dtype=dtype)
            if wanted.hidden is not None:
                part = hidden_grad_product(config, logit_grads, columns.kernel, sums)
                carry = carry._replace(hidden=accumulate(carry.hidden, part))
            if wanted.adapted is not None and columns.adapter is not None:
                part = hidden_grad_product(config.of_adapter, logit_grads, columns.adapter, sums)
                carry = carry._replace(adapted=accumulate(carry.adapted, part))
            if carry.kernel is not None:
                part = kernel_grad_product(config, chunk.hidden, logit_grads, sums)
                carry = carry._replace(kernel=blocks.write(carry.kernel, part, span, config.vocab_dim, add=add))
            if carry.adapter is not None and chunk.adapted is not None:
                part = kernel_grad_product(config.of_adapter, chunk.adapted, logit_grads, sums)
                carry = carry._replace(adapter=blocks.write(carry.adapter, part, span, 1, add=add))
            if carry.bias is not None:
                part = logit_grads.sum(axis=0, dtype=sums)
                carry = carry._replace(bias=blocks.write(carry.bias, part, span, 0, add=add))
            return carry

        # Gradients of the chunk's tokens are summed over its blocks in float32, and written and rounded once, after all
        # blocks. None starts these sums without zeros. The head's gradients are written block by block instead.
        result = blocks.sweep(block_step, grads._replace(hidden=None, adapted=None))
        if grads.hidden is not None:
            result = result._replace(hidden=chunk.put(grads.hidden, result.hidden))
        if grads.adapted is not None:
            result = result._replace(adapted=chunk.put(grads.adapted, result.adapted))
        return result

    in_sums = dtypes_of_sums(wanted, dtype)
    if not add:
        in_sums = in_sums._replace(kernel=wanted.kernel)
    initial = zero_gradients(in_sums, operands) if others is None else others
    grads = packed.loop(step, initial, part_sizes(packed.chunk), skip_empty=others is not None)
    return Differentiable(
        *(grad if grad is None else grad.astype(dtype) for grad, dtype in zip(grads, wanted, strict=True))
    )
