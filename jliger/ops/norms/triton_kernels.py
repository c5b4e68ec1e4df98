"""The Triton kernels of norms: float32 arithmetic, separate outputs, no atomics.

A row is held in registers, so that it is read once: `WIDTH.padded` columns, the next power of two, of which those from
`WIDTH.width` on are masked. If the width is a power of two there is no mask.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Width(NamedTuple):
    """Compile-time size of a row: `padded` is the power of two that holds its `width` columns."""

    width: int
    padded: int


class Options(NamedTuple):
    """Compile-time options, as in `jliger.ops.norms.types.NormConfig`."""

    epsilon: float
    scale_offset: float
    round_first: bool


@triton.jit
def _load(pointers, columns, WIDTH: tl.constexpr):
    """Values of a row in float32, 0 in the padding."""
    if WIDTH.width == WIDTH.padded:
        values = tl.load(pointers + columns)
    else:
        values = tl.load(pointers + columns, mask=columns < WIDTH.width, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(pointers, columns, values, WIDTH: tl.constexpr):
    values = values.to(pointers.dtype.element_ty)
    if WIDTH.width == WIDTH.padded:
        tl.store(pointers + columns, values)
    else:
        tl.store(pointers + columns, values, mask=columns < WIDTH.width)


@triton.jit
def _mean(values, WIDTH: tl.constexpr):
    return tl.sum(values, axis=0) / WIDTH.width


@triton.jit
def _centered(values, mean, columns, WIDTH: tl.constexpr):
    """`values − mean`, 0 in the padding."""
    values -= mean
    if WIDTH.width != WIDTH.padded:
        values = tl.where(columns < WIDTH.width, values, 0.0)
    return values


@triton.jit
def norm_kernel(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H] or None
    scale_ptr,  # [H]
    offset_ptr,  # [H] or None
    output_ptr,  # [T, H], written
    total_ptr,  # [T, H], written, or None
    mean_ptr,  # [T], written, or None for an RMS norm
    inverse_ptr,  # [T], written
    WIDTH: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """One program per row."""
    # 64 bits: row · width exceeds 32 bits for more than 2³¹ elements.
    row = tl.program_id(0).to(tl.int64)
    start = row * WIDTH.width
    columns = tl.arange(0, WIDTH.padded)
    # Loaded first, so that its latency overlaps with that of the row.
    scale = _load(scale_ptr, columns, WIDTH) + OPTIONS.scale_offset
    values = _load(x_ptr + start, columns, WIDTH)
    if residual_ptr is not None:
        values += _load(residual_ptr + start, columns, WIDTH)
        # The sum is rounded, and what is normalized is the rounded sum.
        total = values.to(total_ptr.dtype.element_ty)
        _store(total_ptr + start, columns, total, WIDTH)
        values = total.to(tl.float32)
    if mean_ptr is not None:
        mean = _mean(values, WIDTH)
        tl.store(mean_ptr + row, mean)
        values = _centered(values, mean, columns, WIDTH)
    inverse = tl.rsqrt(_mean(values * values, WIDTH) + OPTIONS.epsilon)
    tl.store(inverse_ptr + row, inverse)
    values *= inverse
    if OPTIONS.round_first:
        values = values.to(x_ptr.dtype.element_ty).to(tl.float32)
    values *= scale
    if offset_ptr is not None:
        values += _load(offset_ptr, columns, WIDTH)
    _store(output_ptr + start, columns, values, WIDTH)


@triton.jit
def norm_grads_kernel(
    total_ptr,  # [T, H]
    scale_ptr,  # [H]
    mean_ptr,  # [T], or None for an RMS norm
    inverse_ptr,  # [T]
    grad_ptr,  # [T, H]
    total_grad_ptr,  # [T, H] or None
    rows_ptr,  # [1], T
    x_grad_ptr,  # [T, H], written
    scale_grad_ptr,  # [P, H], written
    offset_grad_ptr,  # [P, H], written, or None
    WIDTH: tl.constexpr,
    OPTIONS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each of `PROGRAMS` programs takes every `PROGRAMS`-th row, and adds up its part of the parameters' gradients.

    Which rows a program adds up, and in which order, depends on nothing but the number of rows: results are the same
    from run to run.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH.padded)
    scale = _load(scale_ptr, columns, WIDTH) + OPTIONS.scale_offset
    scale_grad = tl.zeros([WIDTH.padded], tl.float32)
    if offset_grad_ptr is not None:
        offset_grad = tl.zeros([WIDTH.padded], tl.float32)
    for row in tl.range(program, tl.load(rows_ptr).to(tl.int64), PROGRAMS, num_stages=STAGES):
        start = row * WIDTH.width
        grad = _load(grad_ptr + start, columns, WIDTH)
        normalized = _load(total_ptr + start, columns, WIDTH)
        inverse = tl.load(inverse_ptr + row)
        if mean_ptr is not None:
            normalized = _centered(normalized, tl.load(mean_ptr + row), columns, WIDTH)
        normalized *= inverse
        scale_grad += grad * normalized
        if offset_grad_ptr is not None:
            offset_grad += grad
        scaled = grad * scale
        x_grad = scaled - normalized * _mean(scaled * normalized, WIDTH)
        if mean_ptr is not None:
            x_grad -= _mean(scaled, WIDTH)
        x_grad *= inverse
        if total_grad_ptr is not None:
            x_grad += _load(total_grad_ptr + start, columns, WIDTH)
        _store(x_grad_ptr + start, columns, x_grad, WIDTH)
    _store(scale_grad_ptr + program * WIDTH.width, columns, scale_grad, WIDTH)
    if offset_grad_ptr is not None:
        _store(offset_grad_ptr + program * WIDTH.width, columns, offset_grad, WIDTH)
