"""The segments of a chunk's logit gradients that matter, and products with them.

For each 128 columns, the product for the kernel's gradient takes the tokens whose segment there matters. For each 128
tokens, the product for gradients of hidden states takes the columns whose segment matters. A trained model gives each
token a few probable columns. So a few percent of the segments matter, but many of the tiles of 128 tokens by 128
columns have one that does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.core.triton_call import call_kernel
from jliger.ops.linear_head.chunks import segments_kernels as kernels

SEGMENT = 128


class Counts(NamedTuple):
    """How many segments of each tile matter, and sums of the gradients in the others.

    There are `J` blocks of columns and `B` blocks of tokens. The first of both sums is of segments of tokens, the
    second of segments of columns.

    Attributes:
      of_tokens: the number of tokens' segments in each tile.
      of_columns: the number of columns' segments in each tile.
      by_token: the sum of each token's gradients in each block of columns.
      by_column: the sum of the sizes of each column's gradients in each block of tokens.
    """

    of_tokens: Int[Array, "J B"]
    of_columns: Int[Array, "B J"]
    by_token: Float[Array, "2 J T"]
    by_column: Float[Array, "2 B V"]


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
    results = call_kernel(
        kernels.count_kernel,
        [*chunk],
        [
            _shape((grid.column_blocks, grid.token_blocks), jnp.int32),
            _shape((grid.token_blocks, grid.column_blocks), jnp.int32),
            _shape((2, grid.column_blocks, grid.tokens), jnp.float32),
            _shape((2, grid.token_blocks, grid.stride), jnp.float32),
        ],
        name="jliger_count_segments",
        grid=(grid.token_blocks * grid.column_blocks,),
        num_warps=8,
        num_stages=1,
        compute_capability=compute_capability,
        flops=4 * chunk.grads.size,
        bytes_accessed=chunk.grads.nbytes,
        GRID=grid,
    )
    return Counts(*results)


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
        num_warps=8,
        num_stages=1,
        compute_capability=compute_capability,
        flops=0,
        bytes_accessed=chunk.grads.nbytes,
        TOKEN_ROOM=token_room,
        COLUMN_ROOM=column_room,
        GRID=grid,
    )
    of_tokens, of_columns = (
        None if start is None else Segments(written[at], written[at + 1], start)
        for at, start in zip((0, 2), starts, strict=True)
    )
    return of_tokens, of_columns


def product(
    segments: Segments,
    rows: Float[Array, "R W"],
    size: int,
    dtype: jax.typing.DTypeLike,
    *,
    factors: Float[Array, "*N size"] | None = None,
    means: Float[Array, "*N S W"] | None = None,
    transposed: bool = False,
    precision: str,
    compute_capability: int | None,
) -> Float[Array, "size W"] | Float[Array, "W size"]:
    """The sums of `value · rows[index]` over each block's segments, `[size, W]`, or `[W, size]` if transposed.

    Sums are in float32 and in the order of the segments. To the result `i` of a block, `factors[i] · means[block]` is
    added, of each list.
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
        step=128 // rows.dtype.itemsize,  # stages of float32 would else not fit in an A100's shared memory
        columns=min(128, max(16, 1 << (width - 1).bit_length())),
        stages=3,
        precision=precision,
    )
    (output,) = call_kernel(
        kernels.product_kernel,
        [*segments, rows, factors, means],
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
