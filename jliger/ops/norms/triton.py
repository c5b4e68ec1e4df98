"""Norms as calls of Triton kernels, on rows `[T, H]`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton

from jliger.core.triton_call import call_kernel
from jliger.ops.norms import triton_kernels as kernels
from jliger.ops.norms.types import NormConfig, NormGrads, NormInputs, NormResult, NormSaved


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
      warps: warps per program.
      programs: programs of the backward pass; each writes one row of partial sums.
      stages: how many rows the backward pass loads ahead.
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
    launch = launch or backward_launch(rows, width)
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
    """32 columns a thread: four loads of 16 bytes in flight, of bfloat16."""
    return Launch(_warps(width, 32))


def backward_launch(rows: int, width: int) -> Launch:
    """Two programs for each multiprocessor of an H100. A multiple of them would write more partial sums."""
    return Launch(_warps(width, 16), min(rows, 264))


def _warps(width: int, columns_per_thread: int) -> int:
    return max(1, min(32, triton.next_power_of_2(width) // (32 * columns_per_thread)))


def _constexprs(config: NormConfig, width: int) -> dict[str, Any]:
    return {
        "WIDTH": kernels.Width(width, triton.next_power_of_2(width)),
        "OPTIONS": kernels.Options(config.epsilon, config.scale_offset, config.round_first),
    }
