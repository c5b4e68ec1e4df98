"""The fused pass of a loss that may skip logit gradients that are next to nothing.

A segment is a run of 128 logit gradients: of a token in 128 adjacent columns, or of a column in 128 adjacent tokens of
a chunk. The product for the kernel's gradient skips segments of tokens, and that for gradients of hidden states skips
segments of columns: those in which no gradient is larger than its token's limit, and no token's label is. Here they are
replaced by zeros. On a GPU, `skipping_triton.py` leaves them out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.ops.linear_head.chunks.grad_accumulators import add_chunk, after_chunks, before_chunks
from jliger.ops.linear_head.chunks.matmuls import logits_product
from jliger.ops.linear_head.chunks.packed_tokens import Chunk, PackedTokens, write_stats
from jliger.ops.linear_head.chunks.sizes import forward_chunk, is_symbolic
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks
from jliger.ops.linear_head.types import GradientDtypes, Gradients, Head, HeadConfig, Operands
from jliger.ops.logits import Coefficients, RowStats, get_rows

SEGMENT = 128


class Evaluated(NamedTuple):
    """A chunk, and its results up to the logit gradients.

    Attributes:
      chunk: the tokens.
      start: the first place.
      columns: the head.
      stats: the statistics.
      logit_grads: the logit gradients, with padding.
      weights: the size of each token's label coefficient.
      limits: the size up to which each token's gradients may be skipped.
    """

    chunk: Chunk
    start: Int[Array, ""] | int
    columns: Head
    stats: RowStats
    logit_grads: Float[Array, "C V"]
    weights: Float[Array, " C"]
    limits: Float[Array, " C"]


class Carry(NamedTuple):
    """What loops over chunks carry: statistics and skipped shares in packed order, and gradients."""

    written: tuple[RowStats, Float[Array, " places"]]
    grads: Gradients


def skipping_pass(
    config: HeadConfig, wanted: GradientDtypes, operands: Operands, coefficients: Coefficients
) -> tuple[RowStats, Gradients, Float[Array, " T"]]:
    """Statistics and gradients as of the fused pass, and how much is skipped.

    The last result is, for each token, the sum of the sizes of skipped gradients, divided by the token's weight. The
    two products skip different gradients; it is the larger of both sums.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    num_tokens, vocab = operands.labels.shape[0], operands.kernel.shape[config.vocab_dim]
    if is_symbolic(num_tokens):
        raise NotImplementedError("skip_gradients_below got a symbolic number of tokens; export with a fixed one.")
    blocks = Blocks.make(config, operands.head, operands.hidden.dtype, rows.alignment)
    packed = PackedTokens.of(operands, forward_chunk(config, num_tokens, vocab))

    def evaluate(index: Int[Array, ""] | int) -> Evaluated:
        start = index * packed.chunk
        chunk = Chunk.make(packed.slots(start, packed.chunk), operands, rows.alignment)
        columns, block = blocks.block(blocks.full_span, chunk)
        product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
        of_chunk = chunk.take(coefficients)
        stats, logit_grads = rows.row_stats_and_grads(
            product, block, config.logit_map(vocab), config.stats_wanted, of_chunk, dtype=chunk.hidden.dtype
        )
        weights = jnp.abs(of_chunk.label)
        return Evaluated(chunk, start, columns, stats, logit_grads, weights, config.skip_below * weights)

    stats = packed.empty_stats(config, operands.hidden)
    initial = Carry((stats, jnp.zeros_like(stats.max)), before_chunks(wanted, operands))
    if config.implementation == "xla":
        written, grads = _run(config, wanted, packed, evaluate, initial)
    else:
        from jliger.ops.linear_head.chunks import skipping_triton

        width = blocks.head.kernel.shape[config.vocab_dim]
        of_segments = skipping_triton.SegmentsPass(config, wanted, operands, packed, evaluate, initial, width)
        written, grads = of_segments.run()
    stats, skipped = packed.restore(written)
    return stats, after_chunks(wanted, grads, operands.head), skipped


def write(carry: Carry, evaluated: Evaluated, grads: Gradients, skipped: Float[Array, " C"]) -> Carry:
    """The carry after a chunk. `skipped` are sums of sizes of gradients."""
    weights = evaluated.weights
    share = jnp.where(skipped == 0, 0, skipped / jnp.where(weights == 0, 1, weights))
    return Carry(write_stats(carry.written, (evaluated.stats, share), evaluated.start), grads)


def add_rest(config: HeadConfig, wanted: GradientDtypes, grads: Gradients, evaluated: Evaluated) -> Gradients:
    """`grads` with a chunk's gradients of bias and adapter, which take all logit gradients; without the other two."""
    wanted, grads = wanted._replace(hidden=None, kernel=None), grads._replace(hidden=None, kernel=None)
    return add_chunk(config, wanted, grads, evaluated.chunk, evaluated.columns, evaluated.logit_grads)


def _run(
    config: HeadConfig,
    wanted: GradientDtypes,
    packed: PackedTokens,
    evaluate: Callable[[Int[Array, ""] | int], Evaluated],
    initial: Carry,
) -> Carry:
    def step(size: int, index: Int[Array, ""] | int, carry: Carry) -> Carry:
        evaluated = evaluate(index)
        for_hidden, for_kernel, skipped = _without_segments(evaluated)
        chunk, columns, grads = evaluated.chunk, evaluated.columns, carry.grads
        rest = add_rest(config, wanted, grads, evaluated)
        hidden = add_chunk(config, GradientDtypes(), Gradients(hidden=grads.hidden), chunk, columns, for_hidden).hidden
        of_kernel = GradientDtypes(kernel=wanted.kernel)
        kernel = add_chunk(config, of_kernel, Gradients(kernel=grads.kernel), chunk, columns, for_kernel).kernel
        return write(carry, evaluated, rest._replace(hidden=hidden, kernel=kernel), skipped)

    return packed.loop(step, initial, sizes=(packed.chunk,))


def _without_segments(
    evaluated: Evaluated,
) -> tuple[Float[Array, "C V"], Float[Array, "C V"], Float[Array, " C"]]:
    """Logit gradients for both products, with zeros for what they skip, and the sizes of what is skipped, summed."""
    grads = evaluated.logit_grads
    rows, columns = grads.shape
    sizes = jnp.abs(grads).astype(evaluated.limits.dtype)
    # Not `>`, which is false for NaN.
    matters = ~(sizes <= evaluated.limits[:, None])
    matters |= jnp.arange(columns)[None] == evaluated.chunk.labels[:, None]
    tiles = jnp.pad(matters, ((0, -rows % SEGMENT), (0, -columns % SEGMENT)))
    tiles = tiles.reshape(-(-rows // SEGMENT), SEGMENT, -(-columns // SEGMENT), SEGMENT)

    def kept(dim: int) -> Array:
        whole = jnp.broadcast_to(tiles.any(axis=dim, keepdims=True), tiles.shape)
        return whole.reshape(tiles.shape[0] * SEGMENT, -1)[:rows, :columns]

    for_hidden, for_kernel = kept(1), kept(3)
    skipped = [jnp.where(each, 0, sizes).sum(axis=1) for each in (for_hidden, for_kernel)]
    return jnp.where(for_hidden, grads, 0), jnp.where(for_kernel, grads, 0), jnp.maximum(*skipped)
