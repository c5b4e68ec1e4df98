"""The fused pass: gradients are computed together with the loss, with three products."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.core.meshes import as_varying, varying_axes
from jliger.ops.linear_head.chunks.float8_logits import ALIGNMENT, Float8Kernel
from jliger.ops.linear_head.chunks.grad_accumulators import add_chunk, after_chunks, before_chunks
from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_rows import pack_units
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, write_stats
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks
from jliger.ops.linear_head.types import GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import Coefficients, RowStats, get_rows
from jliger.ops.logits.objectives import CoefficientRule, LossArrays


def fused_pass(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    rule: CoefficientRule,
    arrays: LossArrays,
    merge: Callable[[RowStats], RowStats] | None = None,
    row_length: int | None = None,
) -> tuple[RowStats, Gradients, Float[Array, " T"] | None]:
    """Statistics, and the gradients of a loss whose coefficients follow from the statistics of each of its units.

    With `config.products`, logits have 8-bit products, and gradients those of hidden's dtype.

    In float16, if the rule needs statistics, gradients of tokens are divided by the last result: each token's largest
    coefficient, which may be smaller than float16 holds. Otherwise the last result is None.

    Args:
      config: how logits are computed.
      wanted: the dtypes of the gradients that are wanted. Gradients of parameters are summed over chunks in float32.
      operands: of `[T]` tokens.
      rule: computes the coefficients of each token's logit gradients. If it needs no statistics, one launch computes
        statistics and gradients.
      arrays: the arguments of `rule` beside the statistics: of `[T]` tokens and of all units.
      merge: combines this device's statistics with those of the other vocabulary shards; None if the vocabulary is not
        sharded. The statistics that are returned are merged.
      row_length: tokens per unit, if a unit is a row; None if it is a token.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    dtype = operands.hidden.dtype
    vocab = operands.kernel.shape[config.vocab_dim]
    float8_kernel = None if config.products is None else Float8Kernel.make(config, operands)
    alignment, of_chunks = (rows.alignment, 1) if float8_kernel is None else (ALIGNMENT, ALIGNMENT)
    blocks = Blocks.make(config, operands.head, dtype, alignment)
    packed, loop = pack_units(config, operands, vocab, row_length, of_chunks)
    in_own_scale = dtype == jnp.float16 and rule.needs_stats

    def step(size: int, index: Int[Array, ""] | int, carry: tuple[Any, Gradients]) -> tuple[Any, Gradients]:
        written, grads = carry
        part = packed.part(index, size)
        chunk = Chunk.make(part.slots, operands, alignment)
        columns, block = blocks.block(blocks.full_span, chunk)
        if float8_kernel is None:
            product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
        else:
            product = float8_kernel.logits(chunk.hidden, config.logits_dtype)
        parts = (product, block, config.logit_map(vocab))
        of_chunk = LossArrays(chunk.take(arrays.per_token), part.take_units(arrays.per_unit), arrays.shared)
        scales = None
        if merge is None and not rule.needs_stats:
            coefficients = rule(None, of_chunk, part.in_units)
            stats, logit_grads = rows.row_stats_and_grads(*parts, config.stats_wanted, coefficients, dtype=dtype)
        else:
            # Gradients need the statistics of all columns, so the merge comes between two launches.
            stats = rows.row_stats(*parts, config.stats_wanted)
            if merge is not None:
                # Merged statistics are the same on several devices. Their types must not say so: the derivative of a
                # rule would otherwise be summed over these devices.
                vary = functools.partial(as_varying, axes=varying_axes(chunk.hidden))
                stats = jax.tree.map(vary, merge(stats))
            coefficients = rule(stats, of_chunk, part.in_units)
            if in_own_scale:
                coefficients, scales = _in_own_scale(coefficients)
            logit_grads = rows.row_grads(*parts, stats.max, stats.log_sum, coefficients, dtype=dtype)
        grads = add_chunk(config, wanted, grads, chunk, columns, logit_grads, scales)
        return write_stats(written, (stats, scales), part.start), grads

    empty = packed.empty_stats(config, operands.hidden)
    scales = jnp.zeros_like(empty.max) if in_own_scale else None
    written, grads = loop(step, ((empty, scales), before_chunks(wanted, operands)))
    stats, scales = packed.restore(written)
    return stats, after_chunks(wanted, grads, operands.head), scales


def _in_own_scale(coefficients: Coefficients) -> tuple[Coefficients, Float[Array, " C"]]:
    """Coefficients divided by the largest of their token, and that."""
    scales = functools.reduce(jnp.maximum, [jnp.abs(field) for field in jax.tree.leaves(coefficients)])
    divisors = jnp.where(scales == 0, 1, scales)
    return jax.tree.map(lambda field: field / divisors, coefficients), scales
