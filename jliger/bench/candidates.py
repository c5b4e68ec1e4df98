"""Triton kernels that are measured beside XLA and are not in the library: GEGLU."""

from typing import Any

import jax
import triton
import triton.language as tl
from jaxtyping import Array

from jliger.core.backend import target_compute_capability
from jliger.core.triton_call import call_kernel


@triton.jit
def _activation(gate):
    """The activation and its derivative."""
    sigmoid = 1 / (1 + tl.exp(-2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
    return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid) * slope)


@triton.jit
def product_kernel(gate_ptr, up_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, _ = _activation(tl.load(gate_ptr + index).to(tl.float32))
    out = value * tl.load(up_ptr + index).to(tl.float32)
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty))


@triton.jit
def product_grads_kernel(gate_ptr, up_ptr, grad_ptr, gate_grad_ptr, up_grad_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, derivative = _activation(tl.load(gate_ptr + index).to(tl.float32))
    grad = tl.load(grad_ptr + index).to(tl.float32)
    gate_grad = grad * tl.load(up_ptr + index).to(tl.float32) * derivative
    tl.store(gate_grad_ptr + index, gate_grad.to(gate_grad_ptr.dtype.element_ty))
    tl.store(up_grad_ptr + index, (grad * value).to(up_grad_ptr.dtype.element_ty))


def _call(kernel: Any, operands: list[Array], results: int, grid: int, **constexprs: Any) -> tuple[Array, ...]:
    like = jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype)
    return call_kernel(
        kernel,
        operands,
        [like] * results,
        name=f"jliger_{kernel.fn.__name__}",
        grid=(grid,),
        num_warps=4,
        num_stages=1,
        compute_capability=target_compute_capability(),
        flops=8 * like.size,
        bytes_accessed=(len(operands) + results) * like.size * like.dtype.itemsize,
        **constexprs,
    )


@jax.custom_vjp
def geglu(gate: Array, up: Array) -> Array:
    return _call(product_kernel, [gate, up], 1, gate.size // _block(gate), BLOCK=_block(gate))[0]


def _geglu_bwd(saved: tuple[Array, Array], grad: Array) -> tuple[Array, ...]:
    block = _block(grad)
    return _call(product_grads_kernel, [*saved, grad], 2, grad.size // block, BLOCK=block)


geglu.defvjp(lambda *arrays: (geglu(*arrays), arrays), _geglu_bwd)


def _block(array: Array) -> int:
    return min(2048, array.size & -array.size)
