"""Norms as calls of Triton kernels, on rows `[T, H]`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton

from jliger.core.triton_call import call_kernel
from jliger.ops.norms import triton_kernels as kernels
from jliger.ops.norms.types import NormConfig, NormGrads, NormInputs, NormResult, NormSaved

_MULTIPROCESSORS = 132  # of an H100
_SHARED_MEMORY = 96 * 2**10  # bytes per program; GPUs from sm_80 on have at least 99 KiB


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
      warps: warps per program.
      programs: programs of the backward pass; each writes one row of partial sums.
      stages: the depth of the backward pass's software pipeline, which is one more than the rows that it loads ahead.
    """

    warps: int
    programs: int = 0
    stages: int = 1


def norm(config: NormConfig, inputs: NormInputs, *, launch: Launch | None = None) -> NormResult:
    x, residual = inputs.x, inputs.residual
    rows, width = x.shape
    launch = launch or forward_launch(width)
    per_row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    outputs = call_kernel(
        kernels.norm_kernel,
        [*inputs],
        [
            jax.ShapeDtypeStruct(x.shape, config.dtype),
            None if residual is None else jax.ShapeDtypeStruct(x.shape, x.dtype),
            per_row if config.centered else None,
            per_row,
        ],
        name="jliger_norm",
        grid=(rows,),
        num_warps=launch.warps,
        num_stages=1,
        compute_capability=config.compute_capability,
        flops=8 * x.size,
        bytes_accessed=(1 if residual is None else 3) * x.nbytes + x.size * jnp.dtype(config.dtype).itemsize,
        **_constexprs(config, width),
    )
    return NormResult(*outputs)


def norm_grads(config: NormConfig, saved: NormSaved, *, launch: Launch | None = None) -> NormGrads:
    total, grad, total_grad = saved.total, saved.grad, saved.total_grad
    rows, width = total.shape
    loaded = [total, grad, *([] if total_grad is None else [total_grad])]
    launch = launch or backward_launch(rows, width, sum(array.dtype.itemsize for array in loaded) * width)
    parts = jax.ShapeDtypeStruct((launch.programs, width), jnp.float32)
    # The number of rows is an array, so that one compiled kernel serves all numbers of rows.
    x_grad, scale_grad, offset_grad = call_kernel(
        kernels.norm_grads_kernel,
        [*saved, jnp.full((1,), rows, jnp.int32)],
        [jax.ShapeDtypeStruct(total.shape, total.dtype), parts, parts if config.with_offset else None],
        name="jliger_norm_grads",
        grid=(launch.programs,),
        num_warps=launch.warps,
        num_stages=1,
        compute_capability=config.compute_capability,
        flops=14 * total.size,
        bytes_accessed=(2 if total_grad is None else 3) * total.nbytes + grad.nbytes,
        PROGRAMS=launch.programs,
        STAGES=launch.stages,
        **_constexprs(config, width),
    )
    return NormGrads(x_grad, scale_grad.sum(axis=0), None if offset_grad is None else offset_grad.sum(axis=0))


def forward_launch(width: int) -> Launch:
    return Launch(_warps(width))


def backward_launch(rows: int, width: int, row_bytes: int) -> Launch:
    """The launch that was fastest on an H100 (docs/other_kernels.md).

    Programs are a multiple of an H100's 132 multiprocessors. There are fewer for wide rows: each program writes partial
    sums as wide as a row. Loads of the next rows keep enough bytes in flight, if shared memory holds them.

    Args:
      rows: the number of rows.
      width: the number of columns.
      row_bytes: the bytes of one row in all arrays that are loaded.
    """
    padded = triton.next_power_of_2(width)
    ahead = 2
    fits = ahead * row_bytes * padded // width <= _SHARED_MEMORY
    return Launch(_warps(width), min(rows, _MULTIPROCESSORS * max(1, 8192 // padded)), 1 + ahead if fits else 1)


def _warps(width: int) -> int:
    """Threads with two loads of 8 columns each, or four where part of the padded row is masked."""
    padded = triton.next_power_of_2(width)
    return max(1, min(32, padded // (32 * (16 if padded == width else 32))))


def _constexprs(config: NormConfig, width: int) -> dict[str, Any]:
    return {
        "WIDTH": kernels.Width(width, triton.next_power_of_2(width)),
        "OPTIONS": kernels.Options(config.epsilon, config.scale_offset, config.round_first),
    }
