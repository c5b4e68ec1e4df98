"""The Triton kernel of rotary embeddings: one program per token, float32 arithmetic, a separate output."""

from typing import NamedTuple

import triton
import triton.language as tl


class Shape(NamedTuple):
    """Compile-time shape of one token.

    Attributes:
      heads: the number of heads.
      width: the features of a head.
      pairs: the pairs that are rotated; the features after them are copied.
      padded_heads: the power of two that holds the heads. What is beyond the real size is masked.
      padded_pairs: the same for the pairs.
      padded_rest: the same for the features after them.
      interleaved: whether pairs are neighbours.
    """

    heads: int
    width: int
    pairs: int
    padded_heads: int
    padded_pairs: int
    padded_rest: int
    interleaved: bool


@triton.jit
def _load(pointers, inside):
    if inside is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=inside, other=0.0)
    return values


@triton.jit
def _inside(heads, columns, COLUMNS: tl.constexpr, SHAPE: tl.constexpr):
    """A mask of the first `COLUMNS` columns; None if nothing is padded, so that loads and stores have no mask."""
    if SHAPE.heads == SHAPE.padded_heads and SHAPE.pairs == SHAPE.padded_pairs:
        inside = None
    else:
        inside = (heads < SHAPE.heads) & (columns < COLUMNS)
    return inside


@triton.jit
def _rotate_neighbours(x_ptr, out_ptr, cos, sin, SHAPE: tl.constexpr):
    heads = tl.arange(0, SHAPE.padded_heads)[:, None]
    columns = tl.arange(0, 2 * SHAPE.padded_pairs)[None, :]
    index = heads * SHAPE.width + columns
    inside = _inside(heads, columns, 2 * SHAPE.pairs, SHAPE)
    # Loaded and stored as whole rows, whose columns are contiguous; the pairs are taken apart in registers.
    features = _load(x_ptr + index, inside).to(tl.float32)
    first, second = tl.split(tl.reshape(features, [SHAPE.padded_heads, SHAPE.padded_pairs, 2]))
    rotated = tl.join(first * cos - second * sin, second * cos + first * sin)
    rotated = tl.reshape(rotated, [SHAPE.padded_heads, 2 * SHAPE.padded_pairs])
    tl.store(out_ptr + index, rotated.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_halves(x_ptr, out_ptr, cos, sin, SHAPE: tl.constexpr):
    heads = tl.arange(0, SHAPE.padded_heads)[:, None]
    pairs = tl.arange(0, SHAPE.padded_pairs)[None, :]
    index = heads * SHAPE.width + pairs
    inside = _inside(heads, pairs, SHAPE.pairs, SHAPE)
    first = _load(x_ptr + index, inside).to(tl.float32)
    second = _load(x_ptr + index + SHAPE.pairs, inside).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + index, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(out_ptr + index + SHAPE.pairs, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def rope_kernel(
    x_ptr,  # [T, heads, width]
    cos_ptr,  # [T, pairs]
    sin_ptr,  # [T, pairs]
    out_ptr,  # [T, heads, width], written
    SHAPE: tl.constexpr,
):
    # 64 bits: the offset of a token exceeds 32 bits for more than 2³¹ elements.
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * (SHAPE.heads * SHAPE.width)
    out_ptr += token * (SHAPE.heads * SHAPE.width)
    pairs = tl.arange(0, SHAPE.padded_pairs)[None, :]
    is_pair = pairs < SHAPE.pairs
    cos = tl.load(cos_ptr + token * SHAPE.pairs + pairs, mask=is_pair, other=0.0)
    sin = tl.load(sin_ptr + token * SHAPE.pairs + pairs, mask=is_pair, other=0.0)
    if SHAPE.interleaved:
        _rotate_neighbours(x_ptr, out_ptr, cos, sin, SHAPE)
    else:
        _rotate_halves(x_ptr, out_ptr, cos, sin, SHAPE)
    if 2 * SHAPE.pairs < SHAPE.width:
        heads = tl.arange(0, SHAPE.padded_heads)[:, None]
        columns = 2 * SHAPE.pairs + tl.arange(0, SHAPE.padded_rest)[None, :]
        inside = (heads < SHAPE.heads) & (columns < SHAPE.width)
        index = heads * SHAPE.width + columns
        tl.store(out_ptr + index, tl.load(x_ptr + index, mask=inside, other=0.0), mask=inside)
