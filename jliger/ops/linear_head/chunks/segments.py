"""The segments of a chunk's logit gradients that matter, and products with them alone.

A segment is a run of 128 gradients: of a token in 128 adjacent columns, or of a column in 128 adjacent tokens. The
kernel's gradient is a sum over tokens, so that for each 128 columns it takes the tokens whose segment there matters.
Gradients of hidden states are sums over columns: for each 128 tokens, they take the columns whose segment matters.
After training, tokens have a few probable columns each. That leaves a few percent of the segments, but most of the
tiles of 128 tokens by 128 columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.core.triton_call import call_kernel
from jliger.ops.linear_head.chunks import segments_kernels as kernels

SEGMENT = 128


class Counts(NamedTuple):
    """How many segments of each tile matter, and how much is skipped.

    Attributes:
      of_tokens: the number of tokens' segments in each tile, `[column blocks, token blocks]`.
      of_columns: the number of columns' segments in each tile, `[token blocks, column blocks]`.
      skipped: the sum of each token's sizes of gradients in segments that do not matter, `[T]`. There are two, by
        tokens' and by columns' segments; this is the larger one.
    """

    of_tokens: Int[Array, "J B"]
    of_columns: Int[Array, "B J"]
    skipped: Float[Array, " T"]


class Segments(NamedTuple):
    """Segments ordered by block of results: blocks of columns for segments of tokens, and the other way round.

    Attributes:
      values: the gradients.
      indices: the token's slot, or the column, of each segment.
      starts: the first segment of each block, and the number of all.
    """

    values: Float[Array, "*N R 128"]
    indices: Int[Array, "*N R"]
    starts: Int[Array, "*N S"]


class Chunk(NamedTuple):
    """What the kernels read of a chunk: gradients of at most `limits` may be skipped, except in the label's column."""

    grads: Float[Array, "T V"]
    labels: Int[Array, " T"]
    limits: Float[Array, " T"]


def count(chunk: Chunk, compute_capability: int | None) -> Counts:
    grid = _grid(chunk.grads)
    by_block = (grid.column_blocks, grid.tokens)
    of_tokens, of_columns, *skipped = call_kernel(
        kernels.count_kernel,
        [*chunk],
        [
            _shape((grid.column_blocks, grid.token_blocks), jnp.int32),
            _shape((grid.token_blocks, grid.column_blocks), jnp.int32),
            _shape(by_block, jnp.float32),
            _shape(by_block, jnp.float32),
        ],
        name="jliger_count_segments",
        grid=(grid.token_blocks * grid.column_blocks,),
        num_warps=4,
        num_stages=1,
        compute_capability=compute_capability,
        flops=4 * chunk.grads.size,
        bytes_accessed=chunk.grads.nbytes,
        GRID=grid,
    )
    return Counts(of_tokens, of_columns, jnp.maximum(*(part.sum(axis=0) for part in skipped)))


def copy(
    chunk: Chunk,
    counts: Counts,
    slots: Int[Array, " T"],
    token_room: int,
    column_room: int,
    compute_capability: int | None,
) -> tuple[Segments | None, Segments | None]:
    """Copies the segments that matter, of tokens and of columns, as far as there is room; None where there is none."""
    grid, dtype = _grid(chunk.grads), chunk.grads.dtype
    firsts, starts, outputs = [], [], []
    for of_tile, room in ((counts.of_tokens, token_room), (counts.of_columns, column_room)):
        if not room:
            firsts.append(None)
            starts.append(None)
            outputs += [None, None]
            continue
        ends = jnp.cumsum(of_tile.reshape(-1), dtype=jnp.int32)
        first = (ends - of_tile.reshape(-1)).reshape(of_tile.shape)
        firsts.append(first)
        starts.append(jnp.minimum(jnp.append(first[:, 0], ends[-1]), room))
        outputs += [_shape((room, SEGMENT), dtype), _shape((room,), jnp.int32)]
    written = call_kernel(
        kernels.copy_kernel,
        [*chunk, slots, counts.of_columns, *firsts],
        outputs,
        name="jliger_copy_segments",
        grid=(grid.token_blocks * grid.column_blocks,),
        num_warps=4,
        num_stages=1,
        compute_capability=compute_capability,
        flops=0,
        bytes_accessed=chunk.grads.nbytes,
        TOKEN_ROOM=token_room,
        COLUMN_ROOM=column_room,
        GRID=grid,
    )
    of_tokens, of_columns = (
        None if start is None else Segments(*written[at : at + 2], start)
        for at, start in zip((0, 2), starts, strict=True)
    )
    return of_tokens, of_columns


def product(
    segments: Segments,
    rows: Float[Array, "R W"],
    size: int,
    dtype: jax.typing.DTypeLike,
    *,
    transposed: bool,
    precision: str,
    compute_capability: int | None,
) -> Float[Array, "size W"] | Float[Array, "W size"]:
    """The sums of `value · rows[index]` over each block's segments, `[size, W]`, or `[W, size]` if transposed.

    Sums are in float32 and in the order of the segments.
    """
    *lists, room = segments.indices.shape
    num_lists, width = lists[0] if lists else 1, rows.shape[1]
    shape = kernels.Product(
        lists=num_lists,
        room=room,
        blocks=segments.starts.shape[-1] - 1,
        segment=SEGMENT,
        size=size,
        width=width,
        transposed=transposed,
        lists_tile=1 << (num_lists - 1).bit_length(),
        step=64,
        columns=min(128, max(16, 1 << (width - 1).bit_length())),
        stages=3,
        precision=precision,
    )
    (output,) = call_kernel(
        kernels.product_kernel,
        [*segments, rows],
        [_shape((width, size) if transposed else (size, width), dtype)],
        name="jliger_segments_product",
        grid=(shape.blocks * -(-width // shape.columns),),
        num_warps=4,
        num_stages=shape.stages,
        compute_capability=compute_capability,
        flops=2 * segments.values.size * width,
        bytes_accessed=segments.values.nbytes + rows.nbytes,
        SHAPE=shape,
    )
    return output


def _grid(grads: Float[Array, "T V"]) -> kernels.Grid:
    tokens, stride = grads.shape
    return kernels.Grid(tokens, stride, -(-tokens // SEGMENT), -(-stride // SEGMENT), SEGMENT)


def _shape(dims: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)
