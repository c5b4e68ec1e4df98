"""The pass with 8-bit products: statistics, and with them the gradients of a loss.

Logits are products of hidden states and kernel in e4m3. Logit gradients are converted once, to e5m2, in units of each
token's own: chosen so that the largest gradient of a row, which is its label's, is a power of two and loses nothing.
The others are dithered, so that their sums over tokens and columns have no bias.
The hidden states of the kernel-gradient product are multiplied by that unit instead, before they are converted again.

Beside a chunk's logits, it holds two 8-bit copies of the kernel and of the logit gradients, as they are and transposed:
together as large as the one 16-bit copy of each that the fused pass holds.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.core.meshes import as_varying, varying_axes
from jliger.ops.linear_head.chunks.arrays import accumulate, materialize, pad
from jliger.ops.linear_head.chunks.float8_logits import ALIGNMENT, Float8Kernel
from jliger.ops.linear_head.chunks.grad_accumulators import after_chunks, before_chunks
from jliger.ops.linear_head.chunks.packed_rows import pack_units
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, write_stats
from jliger.ops.linear_head.types import GradientDtypes, Gradients, HeadConfig, Operands
from jliger.ops.logits import Block, Coefficients, RowStats, get_rows
from jliger.ops.logits.float8 import LARGEST_GRADIENT, quantized
from jliger.ops.logits.objectives import CoefficientRule, LossArrays

_LEAST_UNIT = 2.0**-100  # a token whose gradients are smaller has none
# e5m2 ends at 1.75 times `LARGEST_GRADIENT`, and dithering may turn a number just above that into ∞. The bounds are
# rounded, so they stay a little below.
_HEADROOM = 1.75 * (1 - 2.0**-16)


def float8_pass(
    config: HeadConfig,
    wanted: GradientDtypes,
    operands: Operands,
    rule: CoefficientRule,
    arrays: LossArrays,
    merge: Callable[[RowStats], RowStats] | None = None,
    row_length: int | None = None,
) -> tuple[RowStats, Gradients]:
    """Statistics and gradients as `fused_pass` computes them, with 8-bit products.

    Without wanted gradients, `rule` is not called.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    vocab = operands.kernel.shape[config.vocab_dim]
    packed, loop = pack_units(config, operands, vocab, row_length, ALIGNMENT)
    kernel = Float8Kernel.make(config, operands)
    logit_map = config.logit_map(vocab)

    def step(size: int, index: Int[Array, ""] | int, carry: tuple[Any, Gradients]) -> tuple[Any, Gradients]:
        written, grads = carry
        part = packed.part(index, size)
        chunk = Chunk.make(part.slots, operands, ALIGNMENT)
        product = kernel.logits(chunk.hidden, config.logits_dtype)
        block = _block(operands, chunk)
        stats = rows.row_stats(product, block, logit_map, config.stats_wanted)
        if merge is not None:
            vary = functools.partial(as_varying, axes=varying_axes(chunk.hidden))
            stats = jax.tree.map(vary, merge(stats))
        if any(dtype is not None for dtype in wanted):
            of_chunk = LossArrays(chunk.take(arrays.per_token), part.take_units(arrays.per_unit), arrays.shared)
            coefficients = rule(stats, of_chunk, part.in_units)
            units = _units(config, stats, coefficients, block)
            in_units = jax.tree.map(lambda field: field * jnp.where(units == 0, 0, 1 / units), coefficients)
            logit_grads = kernel.float8.row_grads(product, block, logit_map, stats.max, stats.log_sum, in_units)
            grads = _add_chunk(config, wanted, grads, chunk, kernel, logit_grads, units)
        return write_stats(written, stats, part.start), grads

    empty = packed.empty_stats(config, operands.hidden)
    written, grads = loop(step, (empty, before_chunks(wanted, operands)))
    return packed.restore(written), after_chunks(wanted, grads, operands.head)


def _block(operands: Operands, chunk: Chunk) -> Block:
    def vector(array: Array | None) -> Array | None:
        return None if array is None else pad(array.astype(jnp.float32), (0,), ALIGNMENT)

    return Block(
        vector(operands.bias),
        vector(operands.class_weights),
        chunk.labels,
        chunk.inverse_temperature,
        operands.num_columns,
    )


def _units(config: HeadConfig, stats: RowStats, coefficients: Coefficients, block: Block) -> Float[Array, " C"]:
    """What each token's logit gradients are divided by, before they are converted; 0 if there are none.

    In these units the label's gradient without smoothing is `±LARGEST_GRADIENT`, a power of two, or less, and no
    gradient exceeds 1.75 times that, which is the largest number of e5m2.
    """
    probability, label, probability_lse, smoothing, probability_logit = coefficients
    if probability_lse is not None:
        probability = probability + probability_lse * (stats.max + stats.log_sum)
    of_label = jnp.exp(stats.label_logit - stats.max - stats.log_sum)
    largest = jnp.exp(-stats.log_sum)  # probability
    factor = probability
    if probability_logit is not None:
        # A label's logit of −∞ is clipped as in the row functions: times its probability, 0, it would be NaN.
        factor = probability + probability_logit * jnp.maximum(stats.label_logit - stats.max, -1024)
    at_label = jnp.abs(factor * of_label - label)
    # Probabilities of other columns are also at most what the label's leaves: that, and a rounding of 1.
    rounding = float(jnp.finfo(of_label.dtype).eps)
    others = jnp.abs(probability) * jnp.minimum(largest, 1 - of_label + rounding)
    of_smoothing = 0
    if smoothing is not None:
        weights = 1 if block.class_weights is None else jnp.abs(block.class_weights).max()
        of_smoothing = jnp.abs(smoothing) * weights
        others += of_smoothing
    if probability_logit is not None:
        others += jnp.abs(probability_logit) * largest  # exp(x) · |x| is at most 1 / e for x below 0
    inverse_temperature = 1 if block.inverse_temperature is None else block.inverse_temperature
    if config.logit_softcap is not None:
        at_label *= 1 - jnp.square(stats.label_logit / (config.logit_softcap * inverse_temperature))
    largest_of_all = jnp.maximum(others, at_label + of_smoothing)
    bound = jnp.maximum(at_label, largest_of_all / _HEADROOM) * jnp.abs(config.logit_scale * inverse_temperature)
    return jnp.where(bound <= _LEAST_UNIT, 0, bound) / LARGEST_GRADIENT


def _add_chunk(
    config: HeadConfig,
    wanted: GradientDtypes,
    grads: Gradients,
    chunk: Chunk,
    kernel: Float8Kernel,
    logit_grads: tuple[Float[Array, "C V"], Float[Array, "V C"]],
    units: Float[Array, " C"],
) -> Gradients:
    """`grads` with a chunk's gradients written (hidden states) or added in float32 (kernel, bias)."""
    # No fast sums here: probabilities are small beside the label's gradient, and would be lost in the same sum.
    by_token, by_column = logit_grads
    float8 = kernel.float8
    if grads.hidden is not None:
        product = float8.product(by_token, kernel.by_row, jnp.float32)
        grads = grads._replace(hidden=chunk.put(grads.hidden, product * (units * kernel.scale)[:, None]))
    if wanted.kernel is not None:
        # One bfloat16 number in 16 lies halfway between two of e4m3. Multiplied by units a little below a power of two,
        # all of these would be rounded down. Multiplied by √2, they are no longer halfway.
        hidden = quantized(chunk.hidden.astype(jnp.float32) * (units * 2**0.5)[:, None])
        of_hidden = materialize(hidden.values.T)
        sides = (of_hidden, by_column) if config.kernel_layout == "hv" else (by_column, of_hidden)
        part = float8.product(*sides, jnp.float32) * (hidden.scale * 0.5**0.5)
        grads = grads._replace(kernel=accumulate(grads.kernel, part))
    if wanted.bias is not None:
        part = jnp.sum(by_column.astype(jnp.float32) * units, axis=1)
        grads = grads._replace(bias=accumulate(grads.bias, part))
    return grads
