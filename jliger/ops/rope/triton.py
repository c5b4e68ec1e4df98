"""The rotation as a call of a Triton kernel, on tokens `[T, heads, head_dim]`."""

import jax
import triton
from jaxtyping import Array, Float

from jliger.core.triton_call import call_kernel
from jliger.ops.rope.triton_kernels import Shape, rope_kernel


def rotate(
    x: Float[Array, "T heads head_dim"],
    cos: Float[Array, "T R/2"],
    sin: Float[Array, "T R/2"],
    *,
    interleaved: bool,
    compute_capability: int | None,
) -> Float[Array, "T heads head_dim"]:
    tokens, heads, width = x.shape
    pairs = cos.shape[-1]
    padded = [triton.next_power_of_2(size) for size in (heads, pairs, max(1, width - 2 * pairs))]
    shape = Shape(heads, width, pairs, padded[0], padded[1], padded[2], interleaved)
    (result,) = call_kernel(
        rope_kernel,
        [x, cos, sin],
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        name="jliger_rope",
        grid=(tokens,),
        # 32 features a thread: 16 pairs.
        num_warps=max(1, min(16, shape.padded_heads * shape.padded_pairs // (32 * 16))),
        num_stages=1,
        compute_capability=compute_capability,
        flops=3 * x.size,
        bytes_accessed=2 * x.nbytes + cos.nbytes + sin.nbytes,
        SHAPE=shape,
    )
    return result
