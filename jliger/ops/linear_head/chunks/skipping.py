"""The fused pass of a loss that may approximate logit gradients that are next to nothing.

A segment is a run of 128 logit gradients: of a token in 128 adjacent columns, or of a column in 128 adjacent tokens of
a chunk. The product for the kernel's gradient skips segments of tokens, and that for gradients of hidden states skips
segments of columns: those in which no gradient is larger than its token's limit, and no token's label is.

What is skipped is small, but adds up: dropped, rare columns of the kernel would get no gradient at all. So it is
replaced by a matrix of rank one that has the same sums over each token and over each column: for the kernel's gradient,
one for each 128 columns of a chunk; for gradients of hidden states, one for each 128 tokens. A product with a matrix of
rank one costs next to nothing.

Here these matrices are written out. On a GPU, `skipping_triton.py` multiplies by their factors.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jliger.core.dtypes import accumulator_dtype
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
      weights: the size of each token's label coefficient, in units of the product.
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


@dataclasses.dataclass(frozen=True)
class SkippingPass:
    """The arguments of `skipping_pass`, in chunks.

    Attributes:
      config, wanted, operands, coefficients: as there.
      packed: the tokens.
      blocks: the head. On a GPU its kernel has a row for each column of the vocabulary.
    """

    config: HeadConfig
    wanted: GradientDtypes
    operands: Operands
    coefficients: Coefficients
    packed: PackedTokens
    blocks: Blocks

    def initial(self) -> Carry:
        """The carry before the first chunk."""
        stats = self.packed.empty_stats(self.config, self.operands.hidden)
        return Carry((stats, jnp.zeros_like(stats.max)), before_chunks(self.wanted, self.operands))

    def evaluate(self, index: Int[Array, ""] | int) -> Evaluated:
        """A chunk's statistics and logit gradients."""
        config, size = self.blocks.config, self.packed.chunk
        rows = get_rows(config.implementation, config.compute_capability)
        chunk = Chunk.make(self.packed.slots(index * size, size), self.operands, rows.alignment)
        columns, block = self.blocks.block(self.blocks.full_span, chunk)
        product = logits_product(config, chunk.hidden, columns.kernel, chunk.adapted, columns.adapter)
        logit_map = config.logit_map(self.operands.kernel.shape[self.config.vocab_dim])
        coefficients = chunk.take(self.coefficients)
        stats, logit_grads = rows.row_stats_and_grads(
            product, block, logit_map, config.stats_wanted, coefficients, dtype=chunk.hidden.dtype
        )
        assert config.skip_below is not None
        # Like the gradients, times the derivative of the logits by the product.
        weights = jnp.abs(coefficients.label * config.logit_scale)
        if chunk.inverse_temperature is not None:
            weights *= chunk.inverse_temperature
        return Evaluated(chunk, index * size, columns, stats, logit_grads, weights, config.skip_below * weights)

    def add(
        self,
        carry: Carry,
        evaluated: Evaluated,
        for_hidden: Float[Array, "C V"] | None,
        for_kernel: Float[Array, "C V"] | None,
        skipped: Float[Array, " C"],
    ) -> Carry:
        """The carry after a chunk.

        Args:
          carry: the one before.
          evaluated: the chunk.
          for_hidden: the logit gradients for hidden states; None to leave that product to the caller.
          for_kernel: the same for the kernel.
          skipped: the sum of each token's sizes of skipped gradients.
        """
        wanted, grads, columns = self.wanted, carry.grads, evaluated.columns
        rest = wanted._replace(hidden=None, kernel=None), grads._replace(hidden=None, kernel=None)
        # Bias and adapter take all logit gradients.
        result = add_chunk(self.config, *rest, evaluated.chunk, columns, evaluated.logit_grads)
        if for_hidden is not None:
            of_hidden = GradientDtypes(), Gradients(hidden=grads.hidden)
            part = add_chunk(self.blocks.config, *of_hidden, evaluated.chunk, columns, for_hidden)
            result = result._replace(hidden=part.hidden)
        if for_kernel is not None:
            of_kernel = GradientDtypes(kernel=wanted.kernel), Gradients(kernel=grads.kernel)
            part = add_chunk(self.config, *of_kernel, evaluated.chunk, columns, for_kernel)
            result = result._replace(kernel=part.kernel)
        weights = evaluated.weights
        share = jnp.where(skipped == 0, 0, skipped / jnp.where(weights == 0, 1, weights))
        return Carry(write_stats(carry.written, (evaluated.stats, share), evaluated.start), result)


def skipping_pass(
    config: HeadConfig, wanted: GradientDtypes, operands: Operands, coefficients: Coefficients
) -> tuple[RowStats, Gradients, Float[Array, " T"]]:
    """Statistics and gradients as of the fused pass, and how much is skipped.

    The last result is, for each token, the sum of the sizes of skipped gradients, divided by the token's weight. The
    two products skip different gradients; it is the larger of both sums.
    """
    num_tokens, vocab = operands.labels.shape[0], operands.kernel.shape[config.vocab_dim]
    if is_symbolic(num_tokens):
        raise NotImplementedError("skip_gradients_below got a symbolic number of tokens; export with a fixed one.")
    packed = PackedTokens.of(operands, forward_chunk(config, num_tokens, vocab))
    head, of_blocks, run = operands.head, config, _run
    if config.implementation == "triton":
        from jliger.ops.linear_head.chunks.skipping_triton import run

        if config.kernel_layout == "hv":
            head, of_blocks = head._replace(kernel=head.kernel.T), dataclasses.replace(config, kernel_layout="vh")
    alignment = get_rows(config.implementation, config.compute_capability).alignment
    blocks = Blocks.make(of_blocks, head, operands.hidden.dtype, alignment)
    written, grads = run(SkippingPass(config, wanted, operands, coefficients, packed, blocks))
    stats, skipped = packed.restore(written)
    return stats, after_chunks(wanted, grads, operands.head), skipped


def _run(skipping: SkippingPass) -> Carry:
    def step(size: int, index: Int[Array, ""] | int, carry: Carry) -> Carry:
        evaluated = skipping.evaluate(index)
        return skipping.add(carry, evaluated, *_approximated(evaluated))

    return skipping.packed.loop(step, skipping.initial(), sizes=(skipping.packed.chunk,))


def _approximated(
    evaluated: Evaluated,
) -> tuple[Float[Array, "C V"], Float[Array, "C V"], Float[Array, " C"]]:
    """Logit gradients for both products, with segments replaced, and each token's sum of the sizes of those."""
    grads, limits = evaluated.logit_grads, evaluated.limits
    rows, columns = grads.shape
    # Not `>`, which is false for NaN.
    matters = ~(jnp.abs(grads).astype(limits.dtype) <= limits[:, None])
    matters |= jnp.arange(columns)[None] == evaluated.chunk.labels[:, None]
    padded = (0, -rows % SEGMENT), (0, -columns % SEGMENT)
    grads, matters = jnp.pad(grads, padded), jnp.pad(matters, padded)

    def blocks(array: Array) -> Array:
        return array.reshape(-1, SEGMENT, array.shape[1] // SEGMENT, SEGMENT)

    tiles = blocks(matters)
    of_columns = blocks(jnp.broadcast_to(tiles.any(axis=1, keepdims=True), tiles.shape).reshape(grads.shape))
    of_tokens = blocks(jnp.broadcast_to(tiles.any(axis=3, keepdims=True), tiles.shape).reshape(grads.shape))
    for_hidden, skipped_of_columns = _rank_one(blocks(grads), of_columns, (2, 3), (1,))
    for_kernel, skipped_of_tokens = _rank_one(blocks(grads), of_tokens, (3,), (0, 1))
    skipped = jnp.maximum(skipped_of_columns, skipped_of_tokens)
    for_hidden, for_kernel = (part.reshape(grads.shape)[:rows, :columns] for part in (for_hidden, for_kernel))
    return for_hidden, for_kernel, skipped.reshape(-1)[:rows]


def _rank_one(
    grads: Float[Array, "B 128 J 128"],
    kept: Bool[Array, "B 128 J 128"],
    along: tuple[int, ...],
    across: tuple[int, ...],
) -> tuple[Float[Array, "B 128 J 128"], Float[Array, "B 128"]]:
    """Gradients that are kept, the others replaced; and each token's sum of the sizes of those."""
    skipped = jnp.where(kept, 0, grads.astype(accumulator_dtype(grads.dtype)))
    # All of a token's skipped gradients have the sign of its weight. Sizes, so that signs of different tokens do not
    # make the total 0: the sums over columns are then not kept, but those over tokens are.
    by_column = jnp.abs(skipped).sum(across, keepdims=True)
    total = by_column.sum(along, keepdims=True)
    shares = by_column / jnp.where(total == 0, 1, total)
    replaced = skipped.sum(along, keepdims=True) * shares
    return jnp.where(kept, grads, replaced.astype(grads.dtype)), jnp.abs(skipped).sum((2, 3))
