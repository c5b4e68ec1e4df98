"""The largest logits of each row as calls of Triton kernels."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core.triton_call import call_kernel
from jliger.ops.logits import top_k_triton_kernels as kernels
from jliger.ops.logits.top_k_types import TopLogits
from jliger.ops.logits.triton_tiles import Shape, Tile
from jliger.ops.logits.types import Block, LogitMap

_GROUP = 32  # columns per group
_MOST_GROUPS = 2**13  # as many maxima as a program can hold in registers


def top_logits(
    product: Float[Array, "T V"],
    block: Block,
    logit_map: LogitMap,
    k: int,
    *,
    compute_capability: int | None = None,
) -> TopLogits:
    """The k largest logits, in no order: the best groups of columns by their maxima, then the best of these columns.

    The k groups with the largest maxima contain the k largest logits: see `jliger.ops.logits.top_k_xla`.
    """
    rows, stride = product.shape
    group = _GROUP
    while -(-logit_map.width // group) > _MOST_GROUPS:
        group *= 2
    num_groups = -(-logit_map.width // group)
    shape = Shape(stride, logit_map.width, logit_map.scale, logit_map.softcap)
    tile = Tile.make(logit_map.width, most_warps=4, unroll=1, vector=group)
    of_groups, of_columns = (kernels.Selection.make(k, least, group, num_groups) for least in (num_groups, k * group))
    operands = [product, block.bias, block.inverse_temperature, block.width]

    def selected(dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, k), dtype)

    launch: dict[str, Any] = {"grid": (rows,), "num_stages": 1, "compute_capability": compute_capability}
    (maxima,) = call_kernel(
        kernels.group_maxima_kernel,
        operands,
        [jax.ShapeDtypeStruct((rows, num_groups), jnp.float32)],
        name="jliger_group_maxima",
        flops=2 * product.size,
        bytes_accessed=product.nbytes,
        num_warps=tile.lanes // 32,
        SHAPE=shape,
        TILE=tile,
        **launch,
    )
    (groups,) = call_kernel(
        kernels.select_groups_kernel,
        [maxima],
        [selected(jnp.int32)],
        name="jliger_select_groups",
        flops=2 * (32 + of_groups.index_bits) * rows * of_groups.size,
        bytes_accessed=maxima.nbytes,
        num_warps=of_groups.num_warps,
        SELECT=of_groups,
        **launch,
    )
    result = call_kernel(
        kernels.select_columns_kernel,
        [*operands, groups],
        [selected(jnp.int32), selected(jnp.float32)],
        name="jliger_select_columns",
        flops=2 * (32 + of_columns.index_bits) * rows * of_columns.size,
        bytes_accessed=rows * k * group * product.dtype.itemsize,
        num_warps=of_columns.num_warps,
        SHAPE=shape,
        SELECT=of_columns,
        **launch,
    )
    return TopLogits(*result)
