"""chunks: the loops that keep logits small. Products by XLA, rows by a backend.

Two forms compute gradients. The *forward form* takes chunks of tokens over the whole vocabulary and computes the
gradients of a loss whose coefficients are known beforehand: three products. The *recompute form* takes larger chunks of
tokens over blocks of the vocabulary, given what a first sweep (`token_stats`) found: four products, the least memory.

Tokens that don't count are not computed: those that do are gathered, chunk by chunk, and the loops are as long as
their number asks for.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jliger.config import HeadConfig
from jliger.products import hidden_grad_product, kernel_grad_product, logits_product
from jliger.rows import Block, Coefficients, RowStats, get_rows

Kernel = Float[Array, "H V"] | Float[Array, "V H"]


class Head(NamedTuple):
    """The vocabulary's side of the operation."""

    kernel: Kernel
    bias: Float[Array, " V"] | None
    class_weights: Float[Array, " V"] | None


class Tokens(NamedTuple):
    """The tokens' side of the operation."""

    hidden: Float[Array, "T H"]
    labels: Int[Array, " T"]
    counted: Bool[Array, " T"]


class GradTypes(NamedTuple):
    """The dtype that each gradient is wanted in; None where it is not wanted, and then nothing is computed for it."""

    hidden: np.dtype | None
    kernel: np.dtype | None
    bias: np.dtype | None


class Grads(NamedTuple):
    """Gradients; None where not wanted."""

    hidden: Float[Array, "T H"] | None
    kernel: Kernel | None
    bias: Float[Array, " V"] | None


def token_stats(config: HeadConfig, tokens: Tokens, head: Head) -> RowStats:
    """What the loss needs of each token's logits; one product, a block of the vocabulary at a time.

    Tokens that don't count get the stats of a row with log-sum-exp 0, label logit 0 and prediction −1.
    """
    rows = get_rows(config.implementation, config.compute_capability)
    num_tokens = tokens.labels.shape[0]
    plan = _BlockPlan.make(config, num_tokens, head)
    queue = _Queue.make(tokens.counted, plan.chunk)

    def step(size: int, start: Int[Array, ""], stats: RowStats) -> RowStats:
        chunk = _Chunk.make(queue.slots(start, size), tokens, rows.alignment)

        def block_step(index: Int[Array, ""], chunk_stats: RowStats | None) -> RowStats:
            kernel, block, offset = plan.block(index, head, chunk, rows.alignment)
            product = logits_product(config, chunk.hidden, kernel)
            found = rows.row_stats(
                product, block, config.logit_map(plan.width), with_weighted_sum=config.with_weighted_sum
            )
            found = found._replace(prediction=found.prediction + offset)
            return found if chunk_stats is None else merge_stats(found, chunk_stats)

        return _write(stats, plan.sweep(block_step), start)

    stats = queue.for_each_chunk(step, queue.empty_stats(config, tokens.hidden.dtype), plan.chunk_sizes())
    return queue.restore(stats)


def forward_form(
    config: HeadConfig, wanted: GradTypes, tokens: Tokens, head: Head, coefficients: Coefficients
) -> tuple[RowStats, Grads]:
    """Stats, and the gradients of a loss whose `coefficients` (`[T]` each) are known beforehand; three products."""
    rows = get_rows(config.implementation, config.compute_capability)
    num_tokens, width = tokens.labels.shape[0], head.kernel.shape[config.vocab_dim]
    dtype = tokens.hidden.dtype
    queue = _Queue.make(tokens.counted, token_chunk_size(config, num_tokens, width))
    kernel = _whole(_pad(head.kernel.astype(dtype), (0, 1), rows.alignment))
    head = _with_float_vectors(head, dtype, rows.alignment)

    def step(size: int, start: Int[Array, ""], carry: tuple[RowStats, Grads]) -> tuple[RowStats, Grads]:
        stats, grads = carry
        chunk = _Chunk.make(queue.slots(start, size), tokens, rows.alignment)
        product = logits_product(config, chunk.hidden, kernel)
        found, logit_grads = rows.row_stats_and_grads(
            product,
            Block(head.bias, head.class_weights, chunk.labels),
            config.logit_map(width),
            chunk.take(coefficients, 0),
            with_weighted_sum=config.with_weighted_sum,
            dtype=dtype,
        )
        if wanted.hidden is not None:
            rows_grad = hidden_grad_product(config, logit_grads, kernel, wanted.hidden)
            grads = grads._replace(hidden=chunk.put(grads.hidden, rows_grad))
        if wanted.kernel is not None:
            part = kernel_grad_product(config, chunk.hidden, logit_grads, accumulator_dtype(dtype))
            grads = grads._replace(kernel=part if grads.kernel is None else grads.kernel + part)
        if wanted.bias is not None:
            part = logit_grads.sum(axis=0, dtype=accumulator_dtype(dtype))
            grads = grads._replace(bias=part if grads.bias is None else grads.bias + part)
        return _write(stats, found, start), grads

    grads = Grads(_zeros_if_wanted(tokens.hidden.shape, wanted.hidden), None, None)
    # The first chunk stands outside the loop: what it finds starts the sums, and nothing is set to zero to add to.
    carry = step(queue.chunk, jnp.int32(0), (queue.empty_stats(config, dtype), grads))
    stats, grads = queue.for_each_chunk(step, carry, (queue.chunk,), first=1)
    hidden_size = tokens.hidden.shape[1]
    sides = (hidden_size, width) if config.kernel_layout == "hv" else (width, hidden_size)
    return queue.restore(stats), Grads(
        grads.hidden,
        None if grads.kernel is None else grads.kernel[: sides[0], : sides[1]].astype(wanted.kernel),
        None if grads.bias is None else grads.bias[:width].astype(wanted.bias),
    )


def recompute_form(
    config: HeadConfig,
    wanted: GradTypes,
    tokens: Tokens,
    head: Head,
    stats: RowStats,
    coefficients: Coefficients,
) -> Grads:
    """Gradients for any coefficients, given each row's `max` and `log_sum`; up to three products, none of them kept."""
    rows = get_rows(config.implementation, config.compute_capability)
    dtype = tokens.hidden.dtype
    accumulator = accumulator_dtype(dtype)
    plan = _BlockPlan.make(config, tokens.labels.shape[0], head)
    queue = _Queue.make(tokens.counted, plan.chunk)
    # With several chunks the kernel's gradient is a sum over them; with one, each block of it is written once.
    sums = queue.num_chunks > 1

    def step(size: int, start: Int[Array, ""], grads: Grads) -> Grads:
        chunk = _Chunk.make(queue.slots(start, size), tokens, rows.alignment)
        row_max, log_sum = chunk.take((stats.max, stats.log_sum), 0)
        chunk_coefficients = chunk.take(coefficients, 0)

        def block_step(index: Int[Array, ""], carry: Grads) -> Grads:
            kernel, block, offset = plan.block(index, head, chunk, rows.alignment)
            product = logits_product(config, chunk.hidden, kernel)
            logit_grads = rows.row_grads(
                product, block, config.logit_map(plan.width), row_max, log_sum, chunk_coefficients, dtype=dtype
            )
            if wanted.hidden is not None:
                part = hidden_grad_product(config, logit_grads, kernel, accumulator)
                carry = carry._replace(hidden=part if carry.hidden is None else carry.hidden + part)
            if wanted.kernel is not None:
                part = kernel_grad_product(config, chunk.hidden, logit_grads, accumulator)
                carry = carry._replace(kernel=plan.write_kernel(carry.kernel, part, offset, add=sums))
            if wanted.bias is not None:
                part = logit_grads.sum(axis=0, dtype=accumulator)[: plan.width]
                carry = carry._replace(bias=_write_block(carry.bias, part, (offset,), add=sums))
            return carry

        found = plan.sweep(block_step, grads._replace(hidden=None))
        if wanted.hidden is None:
            return found
        return found._replace(hidden=chunk.put(grads.hidden, found.hidden))

    width = head.kernel.shape[config.vocab_dim]
    grads = Grads(
        _zeros_if_wanted(tokens.hidden.shape, wanted.hidden),
        _zeros_if_wanted(head.kernel.shape, None if wanted.kernel is None else accumulator if sums else wanted.kernel),
        _zeros_if_wanted((width,), None if wanted.bias is None else accumulator),
    )
    grads = queue.for_each_chunk(step, grads, plan.chunk_sizes())
    return jax.tree.map(lambda grad, to: grad.astype(to), grads, Grads(*wanted))


def merge_stats(left: RowStats, right: RowStats) -> RowStats:
    """The stats of two blocks of one row together; of equal maxima the left one's prediction stands."""
    row_max = jnp.maximum(left.max, right.max)
    return RowStats(
        max=row_max,
        log_sum=jnp.log(jnp.exp(left.log_sum + (left.max - row_max)) + jnp.exp(right.log_sum + (right.max - row_max))),
        label_logit=left.label_logit + right.label_logit,
        prediction=jnp.where(right.max > left.max, right.prediction, left.prediction),
        weighted_sum=None if left.weighted_sum is None else left.weighted_sum + right.weighted_sum,
    )


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """What sums are kept in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def token_chunk_size(config: HeadConfig, num_tokens: int, width: int) -> int:
    """Tokens a chunk in the forward form; `jliger.fused_linear_cross_entropy` documents the rule."""
    if config.chunk_size is not None:
        target = config.chunk_size
    elif config.implementation == "triton":
        target = min(8192, max(2048, _floor_power_of_two(2**28 // width)))
    else:
        target = min(1024, max(128, _floor_power_of_two(2**24 // width)))
    return _even_chunk(num_tokens, target)


# ---- which tokens a chunk holds ------------------------------------------------------------------------------


class _Queue(NamedTuple):
    """The tokens that count, in their order, in chunks.

    Attributes:
      token_of: for each place in the queue its token, or a number past every token where the queue has ended.
      count: the tokens that count.
      num_tokens: all tokens.
      chunk: places a chunk.
    """

    token_of: Int[Array, " places"]
    count: Int[Array, ""]
    num_tokens: int
    chunk: int

    @classmethod
    def make(cls, counted: Bool[Array, " T"], chunk: int) -> "_Queue":
        num_tokens = counted.shape[0]
        places = jnp.arange(-(-num_tokens // chunk) * chunk, dtype=jnp.int32)
        count = counted.sum(dtype=jnp.int32)
        order = jnp.argsort(~counted, stable=True).astype(jnp.int32)
        order = jnp.pad(order, (0, places.size - num_tokens))
        # Past the end each place gets a number of its own, so that gathers and scatters have no index twice.
        return cls(jnp.where(places < count, order, num_tokens + places), count, num_tokens, chunk)

    @property
    def num_chunks(self) -> int:
        return self.token_of.shape[0] // self.chunk

    def slots(self, start: Int[Array, ""], size: int) -> Int[Array, " size"]:
        return jax.lax.dynamic_slice(self.token_of, (start,), (size,))

    def for_each_chunk(
        self,
        step: Callable[[int, Int[Array, ""], Any], Any],
        carry: Any,
        sizes: tuple[int, ...],
        first: int = 0,
    ) -> Any:
        """`carry = step(size, start, carry)` for every chunk with tokens, in the least of `sizes` that holds them."""

        def sized_step(index: Int[Array, ""], carry: Any) -> Any:
            start = index * self.chunk
            if len(sizes) == 1:
                return step(sizes[0], start, carry)
            fitting = sum((self.count - start > size).astype(jnp.int32) for size in sizes[:-1])
            return jax.lax.switch(fitting, [functools.partial(step, size) for size in sizes], start, carry)

        if self.num_chunks <= first:
            return carry
        if self.num_chunks == 1:
            return sized_step(jnp.int32(0), carry)
        return jax.lax.fori_loop(first, (self.count + self.chunk - 1) // self.chunk, sized_step, carry)

    def empty_stats(self, config: HeadConfig, dtype: jax.typing.DTypeLike) -> RowStats:
        places = self.token_of.shape[0]
        zeros = jnp.zeros((places,), accumulator_dtype(dtype))
        return RowStats(
            max=zeros,
            log_sum=zeros,
            label_logit=zeros,
            prediction=jnp.full((places,), -1, jnp.int32),
            weighted_sum=zeros if config.with_weighted_sum else None,
        )

    def restore(self, stats: RowStats) -> RowStats:
        """From the queue's order to the tokens' own; what didn't count gets the stats of an empty row."""

        def restored(field: Array, otherwise: int) -> Array:
            full = jnp.full((self.num_tokens,), otherwise, field.dtype)
            return full.at[self.token_of].set(field, mode="drop", unique_indices=True)

        return RowStats(
            max=restored(stats.max, 0),
            log_sum=restored(stats.log_sum, 0),
            label_logit=restored(stats.label_logit, 0),
            prediction=restored(stats.prediction, -1),
            weighted_sum=None if stats.weighted_sum is None else restored(stats.weighted_sum, 0),
        )


class _Chunk(NamedTuple):
    """One chunk's tokens; places past the queue's end hold zeros and a label that is none."""

    slots: Int[Array, " C"]
    hidden: Float[Array, "C H"]
    labels: Int[Array, " C"]

    @classmethod
    def make(cls, slots: Int[Array, " C"], tokens: Tokens, alignment: int) -> "_Chunk":
        hidden = _pad(_take(tokens.hidden, slots, 0), (1,), alignment)
        return cls(slots, _whole(hidden), _take(tokens.labels, slots, -1))

    def take(self, tree: Any, fill: int) -> Any:
        return jax.tree.map(lambda array: _take(array, self.slots, fill), tree)

    def put(self, full: Float[Array, "T H"], part: Float[Array, "C H"]) -> Float[Array, "T H"]:
        part = part[:, : full.shape[1]].astype(full.dtype)
        return full.at[self.slots].set(part, mode="drop", unique_indices=True, indices_are_sorted=True)


# ---- which columns a block holds -----------------------------------------------------------------------------


class _BlockPlan(NamedTuple):
    """How the recompute form and the stats sweep tile `[T, V]`: chunks of tokens, and in each, blocks of columns.

    Blocks are all of one width. The last one starts early enough to fit, and leaves out the columns that it shares with
    the one before; blocks are taken from the last to the first, so that whole ones overwrite what it left out.
    """

    config: HeadConfig
    chunk: int
    width: int
    num_blocks: int
    vocab: int

    @classmethod
    def make(cls, config: HeadConfig, num_tokens: int, head: Head) -> "_BlockPlan":
        vocab = head.kernel.shape[config.vocab_dim]
        on_gpu = config.implementation == "triton"
        chunk = _even_chunk(num_tokens, config.chunk_size or (8192 if on_gpu else 1024))
        target = max(1024, _floor_power_of_two((2**26 if on_gpu else 2**21) // chunk))
        num_blocks = -(-vocab // target)
        width = min(vocab, _round_up(-(-vocab // num_blocks), 128))
        return cls(config, chunk, width, num_blocks, vocab)

    def chunk_sizes(self) -> tuple[int, ...]:
        """The sizes that a chunk can be computed in, so that one that is not full costs less than one that is."""
        if self.chunk < 1024:
            return (self.chunk,)
        return (*(_round_up(self.chunk * quarter // 4, 128) for quarter in (1, 2, 3)), self.chunk)

    def sweep(self, block_step: Callable[[Int[Array, ""], Any], Any], carry: Any = None) -> Any:
        carry = block_step(jnp.int32(self.num_blocks - 1), carry)
        if self.num_blocks == 1:
            return carry
        return jax.lax.fori_loop(
            1, self.num_blocks, lambda done, carry: block_step(self.num_blocks - 1 - done, carry), carry
        )

    def block(
        self, index: Int[Array, ""], head: Head, chunk: _Chunk, alignment: int
    ) -> tuple[Kernel, Block, Int[Array, ""]]:
        """The block's kernel, in the products' dtype, its other operands, and its first column."""
        start = jnp.minimum(index * self.width, self.vocab - self.width)
        first = None if self.vocab == self.num_blocks * self.width else (index * self.width - start)[None]

        def part(array: Array, dim: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, self.width, dim)

        dtype = chunk.hidden.dtype
        kernel = _whole(_pad(part(head.kernel, self.config.vocab_dim).astype(dtype), (0, 1), alignment))
        vectors = head._replace(
            bias=None if head.bias is None else part(head.bias, 0),
            class_weights=None if head.class_weights is None else part(head.class_weights, 0),
        )
        vectors = _with_float_vectors(vectors, dtype, alignment)
        return kernel, Block(vectors.bias, vectors.class_weights, chunk.labels - start, first), start

    def write_kernel(self, full: Kernel, part: Kernel, offset: Int[Array, ""], *, add: bool) -> Kernel:
        if self.config.kernel_layout == "hv":
            return _write_block(full, part[: full.shape[0], : self.width], (0, offset), add=add)
        return _write_block(full, part[: self.width, : full.shape[1]], (offset, 0), add=add)


# ---- small things --------------------------------------------------------------------------------------------


def _take(array: Array, slots: Int[Array, " C"], fill: int) -> Array:
    return array.at[slots].get(mode="fill", fill_value=fill, unique_indices=True, indices_are_sorted=True)


def _whole(operand: Array) -> Array:
    """Keeps XLA from computing an operand of several products again inside each of them."""
    return jax.lax.optimization_barrier(operand)


def _write(stats: RowStats, part: RowStats, start: Int[Array, ""]) -> RowStats:
    return jax.tree.map(lambda full, new: jax.lax.dynamic_update_slice(full, new, (start,)), stats, part)


def _write_block(full: Array, part: Array, offsets: tuple[Any, ...], *, add: bool) -> Array:
    if add:
        part = part + jax.lax.dynamic_slice(full, offsets, part.shape)
    return jax.lax.dynamic_update_slice(full, part.astype(full.dtype), offsets)


def _zeros_if_wanted(shape: tuple[int, ...], dtype: np.dtype | None) -> Array | None:
    return None if dtype is None else jnp.zeros(shape, dtype)


def _with_float_vectors(head: Head, dtype: jax.typing.DTypeLike, alignment: int) -> Head:
    """Bias and class weights as the row functions take them."""
    dtype = accumulator_dtype(dtype)

    def prepared(vector: Float[Array, " V"] | None) -> Float[Array, " V"] | None:
        return None if vector is None else _pad(vector.astype(dtype), (0,), alignment)

    return head._replace(bias=prepared(head.bias), class_weights=prepared(head.class_weights))


def _pad(array: Array, dims: tuple[int, ...], alignment: int) -> Array:
    after = [-size % alignment if dim in dims else 0 for dim, size in enumerate(array.shape)]
    return jnp.pad(array, [(0, amount) for amount in after]) if any(after) else array


def _even_chunk(num_tokens: int, target: int) -> int:
    """Chunks of at most `target` tokens, as many as that needs, all alike."""
    num_chunks = -(-num_tokens // target)
    return min(target, _round_up(-(-num_tokens // num_chunks), 8))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _floor_power_of_two(size: int) -> int:
    return 1 << (max(1, size).bit_length() - 1)
