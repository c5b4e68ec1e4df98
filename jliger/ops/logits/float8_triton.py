"""8-bit operands on NVIDIA GPUs: products by XLA, conversions by Triton kernels."""

import functools

import jax
from jaxtyping import Array, Float

from jliger.core.triton_call import call_kernel
from jliger.ops.logits import float8_triton_kernels as kernels
from jliger.ops.logits import float8_xla
from jliger.ops.logits.float8 import E4M3, E5M2
from jliger.ops.logits.float8_triton_kernels import Patch
from jliger.ops.logits.triton_tiles import Shape
from jliger.ops.logits.types import Block, Coefficients, LogitMap

# The fastest of five on an H100: rows times columns, and warps.
_GRADS, _GRADS_WARPS = Patch(64, 256), 8
_CAST, _CAST_WARPS = Patch(256, 32), 4


def product(
    left: Float[Array, "M K"], right: Float[Array, "N K"], dtype: jax.typing.DTypeLike, *, fast_sums: bool = False
) -> Float[Array, "M N"]:
    presets = jax.lax.DotAlgorithmPreset
    algorithm = presets.ANY_F8_ANY_F8_F32_FAST_ACCUM if fast_sums else presets.ANY_F8_ANY_F8_F32

    def on_gpu(left: Array, right: Array) -> Array:
        # Naming the algorithm makes XLA (jax 0.11, 0.12) call cuBLAS at once. Without, it would compile Triton products
        # of its own to compare with, which takes minutes.
        dimensions = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(left, right, dimensions, precision=algorithm, preferred_element_type=dtype)

    # Triton's interpreter runs on a CPU.
    emulated = functools.partial(float8_xla.product, dtype=dtype)
    return jax.lax.platform_dependent(left, right, cuda=on_gpu, default=emulated)


def both_layouts(
    matrix: Float[Array, "M N"], factor: Float[Array, ""], *, compute_capability: int | None = None
) -> tuple[Float[Array, "M N"], Float[Array, "N M"]]:
    rows, columns = matrix.shape
    values, transposed = call_kernel(
        kernels.both_layouts_kernel,
        [matrix, factor],
        [jax.ShapeDtypeStruct((rows, columns), E4M3), jax.ShapeDtypeStruct((columns, rows), E4M3)],
        name="jliger_float8_both_layouts",
        grid=(_CAST.count(rows, columns),),
        num_warps=_CAST_WARPS,
        num_stages=1,
        compute_capability=compute_capability,
        flops=matrix.size,
        bytes_accessed=matrix.nbytes + 2 * matrix.size,
        NUM_ROWS=rows,
        NUM_COLUMNS=columns,
        PATCH=_CAST,
    )
    return values, transposed


def row_grads(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    row_max: Float[Array, " T"],
    log_sum: Float[Array, " T"],
    coefficients: Coefficients,
    *,
    compute_capability: int | None = None,
) -> tuple[Float[Array, "T V"], Float[Array, "V T"]]:
    rows, stride = product.shape
    grads, transposed = call_kernel(
        kernels.row_grads_float8_kernel,
        [product, *block, row_max, log_sum, *coefficients],
        [jax.ShapeDtypeStruct((rows, stride), E5M2), jax.ShapeDtypeStruct((stride, rows), E5M2)],
        name="jliger_row_grads_float8",
        grid=(_GRADS.count(rows, stride),),
        num_warps=_GRADS_WARPS,
        num_stages=1,
        compute_capability=compute_capability,
        flops=5 * product.size,
        bytes_accessed=product.nbytes + 2 * product.size,
        NUM_ROWS=rows,
        SHAPE=Shape(stride, logit_map.width, logit_map.scale, logit_map.softcap, logit_map.masked),
        PATCH=_GRADS,
    )
    return grads, transposed
