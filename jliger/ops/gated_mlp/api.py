"""`gated_mlp`: a gated feed-forward block, computed in chunks of tokens whose intermediate values are not saved."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core import checks, partitioned
from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import sharded_like, sum_to_type
from jliger.core.partitioned import Operation
from jliger.core.second_derivatives import once_differentiable
from jliger.ops.gated_mlp.products import ACTIVATIONS, Activation, gated_product, product, product_grads

_CHUNK_VALUES = 2**26  # of the intermediate array of a chunk, [tokens, F]


class _Config(NamedTuple):
    activation: Activation
    chunk_size: int


class _Kernels(NamedTuple):
    """The kernels `[H, F]`, `[H, F]` and `[F, H]`, or their gradients."""

    gate: Array
    up: Array
    down: Array


def gated_mlp(
    x: Float[Array, "*B H"],
    gate_kernel: Float[Array, "H F"],
    up_kernel: Float[Array, "H F"],
    down_kernel: Float[Array, "F H"],
    *,
    activation: Activation = "silu",
    chunk_size: int | None = None,
) -> Float[Array, "*B H"]:
    r"""A gated feed-forward block, without the arrays `[tokens, F]` ever existing whole.

    $$(\mathrm{activation}(x \cdot \mathrm{gate\_kernel}) \odot (x \cdot \mathrm{up\_kernel})) \cdot
      \mathrm{down\_kernel}$$

    (Shazeer, 2020, arXiv:2002.05202). Tokens are computed in chunks, and only `x` is saved for the backward pass, which
    computes each chunk's intermediate values again (as the tiled MLP of Arctic Long Sequence Training, 2025,
    arXiv:2506.13996). The additional memory does not grow with the number of tokens; the price is two more matrix
    products, 11 instead of 9. Products are in x's dtype; activation, and sums over chunks and devices, in float32.
    With `C` tokens per chunk and `b` bytes per value of `x`, the backward pass needs about `5·b·C·F` bytes for a chunk,
    and `12·H·F` for float32 sums of the kernels' gradients.

    On a mesh, tokens may be sharded over any axes, and `F` over others (tensor parallelism): the devices then add their
    parts of the result. Kernels that are sharded over the tokens' axes (FSDP) are gathered.

    Args:
      x: `[*B, H]`: float32, bfloat16, float16 or float64.
      gate_kernel: `[H, F]`, of x's dtype or float32.
      up_kernel: `[H, F]`, of x's dtype or float32.
      down_kernel: `[F, H]`, of x's dtype or float32.
      activation: `"silu"` (SwiGLU), `"gelu_tanh"` (GEGLU, as in Gemma) or `"gelu"` (with the exact gelu).
      chunk_size: tokens per chunk on each device. None: as many as make `2²⁶ / F`, rounded down to a power of two, and
        at least 256.

    Returns:
      `[*B, H]`, in x's dtype.

    Raises:
      ValueError: a shape that does not fit, or an option out of its range.
      TypeError: something that is no array, or a dtype that is not supported.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> x = jax.random.normal(keys[0], (2, 5, 8))
      >>> gate, up = (jax.random.normal(key, (8, 32)) for key in keys[1:3])
      >>> down = jax.random.normal(keys[3], (32, 8))
      >>> result = jliger.gated_mlp(x, gate, up, down, chunk_size=4)
      >>> print(bool(jnp.allclose(result, jliger.swiglu(x @ gate, x @ up) @ down, atol=1e-3)))
      True
    """
    x = checks.as_array("x", x)
    names = {"gate_kernel": gate_kernel, "up_kernel": up_kernel, "down_kernel": down_kernel}
    kernels = _Kernels(*(checks.as_array(name, kernel) for name, kernel in names.items()))
    checks.check_floating("x", x)
    checks.check_choice("activation", activation, tuple(ACTIVATIONS))
    if not x.ndim or kernels.gate.ndim != 2 or kernels.gate.shape[0] != x.shape[-1]:
        raise ValueError(f"gate_kernel got shape {kernels.gate.shape} for an x of {x.shape}; pass [H, F] for [*B, H].")
    checks.check_shape("up_kernel", kernels.up, kernels.gate.shape, "a kernel of gate_kernel's shape")
    checks.check_shape("down_kernel", kernels.down, kernels.gate.shape[::-1], "a kernel [F, H]")
    for name, kernel in zip(names, kernels, strict=True):
        if kernel.dtype not in (x.dtype, jnp.dtype("float32")):
            raise TypeError(f"{name} got dtype {kernel.dtype}; pass x's, {x.dtype}, or float32.")
    if chunk_size is None:
        chunk_size = max(256, 2 ** max(0, (_CHUNK_VALUES // max(1, kernels.gate.shape[1])).bit_length() - 1))
    checks.check_integer("chunk_size", chunk_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size got {chunk_size}; pass a number of tokens of at least 1, or None for the rule.")
    return _mlp(_Config(activation, int(chunk_size)), x, kernels)


def feed_forward(
    x: Array, *kernels: Array, activation: Activation, chunked: bool, chunk_size: int | None, dtype: Any
) -> Array:
    """The block as a Flax module computes it, in chunks or not. `dtype` None is what x and the kernels promote to."""
    x = checks.as_array("x", x)
    dtype = jnp.dtype(dtype or jnp.result_type(x, *kernels))
    # Float32 kernels are cast inside, so that their gradients are not rounded.
    gate, up, down = (kernel if kernel.dtype == jnp.float32 else kernel.astype(dtype) for kernel in kernels)
    if chunked:
        return gated_mlp(x.astype(dtype), gate, up, down, activation=activation, chunk_size=chunk_size)
    gate, up, down, x = (array.astype(dtype) for array in (gate, up, down, x))
    return gated_product(activation, x @ gate, x @ up) @ down


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(config: _Config, x: Array, kernels: _Kernels) -> Array:
    return _forward(config, x, kernels)


def _forward(config: _Config, x: Array, kernels: _Kernels) -> Array:
    kernels = _Kernels(*(kernel.astype(x.dtype) for kernel in kernels))
    operation = Operation(_forward_here, config, ("th", "hf", "hf", "fh"), ("th",), (x.dtype,), whole="h")
    (result,) = _run(operation, x, *kernels)
    return result


def _mlp_fwd(config: _Config, x: Array, kernels: _Kernels) -> tuple[Array, Any]:
    return _forward(config, x, kernels), (x, kernels)


def _mlp_bwd(config: _Config, residuals: Any, grad: Array) -> tuple[Array, _Kernels]:
    x, kernels = residuals
    cast = [kernel.astype(x.dtype) for kernel in kernels]
    sums = accumulator_dtype(x.dtype)
    operation = Operation(
        _grads_here, config, ("th", "hf", "hf", "fh", "th"), ("th", "hf", "hf", "fh"), (x.dtype, sums, sums, sums), "h"
    )
    x_grad, *kernel_grads = _run(operation, x, *cast, grad)

    def like(grad: Array, primal: Array) -> Array:
        return sharded_like(sum_to_type(grad, primal).astype(primal.dtype), primal)

    return like(x_grad, x), _Kernels(*map(like, kernel_grads, kernels))


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _run(operation: Operation, *operands: Array) -> tuple[Array, ...]:
    def run_differentiably(*operands: Array) -> tuple[Array, ...]:
        # custom_partitioning has no derivative: tangents are computed without it.
        return operation.function(operation.config, operation.dtypes, *operands)

    return once_differentiable(run_differentiably, functools.partial(partitioned.run, operation), "xla")(*operands)


def _forward_here(config: _Config, dtypes: Any, x: Array, *kernels: Array) -> tuple[Array]:
    gate, up, down = kernels

    def of_chunk(x: Array) -> Array:
        hidden = product(config.activation, x @ gate, x @ up)
        return jnp.dot(hidden, down, preferred_element_type=dtypes[0])

    rows = x.reshape(-1, x.shape[-1])
    whole = _whole(config, rows.shape[0])
    parts = [jax.lax.map(of_chunk, chunks).reshape(-1, x.shape[-1]) for chunks in _chunks(config, rows[:whole])]
    if whole < rows.shape[0] or not rows.shape[0]:
        parts.append(of_chunk(rows[whole:]))
    return (jnp.concatenate(parts).reshape(x.shape),)


def _grads_here(config: _Config, dtypes: Any, x: Array, *others: Array) -> tuple[Array, ...]:
    gate, up, down, grad = others

    def of_chunk(sums: _Kernels, chunk: tuple[Array, Array]) -> tuple[_Kernels, Array]:
        x, grad = chunk
        gated, upped = x @ gate, x @ up
        hidden = product(config.activation, gated, upped)
        gated_grad, upped_grad = (
            one.astype(x.dtype) for one in product_grads(config.activation, gated, upped, _dot(grad, down, 1, 1))
        )
        x_grad = _dot(gated_grad, gate, 1, 1, dtypes[1]) + _dot(upped_grad, up, 1, 1, dtypes[1])
        sums = _Kernels(
            sums.gate + _dot(x, gated_grad, 0, 0, dtypes[1]),
            sums.up + _dot(x, upped_grad, 0, 0, dtypes[2]),
            sums.down + _dot(hidden, grad, 0, 0, dtypes[3]),
        )
        return sums, x_grad.astype(dtypes[0])

    rows, row_grads = (array.reshape(-1, x.shape[-1]) for array in (x, grad))
    whole = _whole(config, rows.shape[0])
    sums = _Kernels(
        *(jnp.zeros_like(kernel, dtype) for kernel, dtype in zip((gate, up, down), dtypes[1:], strict=True))
    )
    parts = []
    for chunks in zip(_chunks(config, rows[:whole]), _chunks(config, row_grads[:whole]), strict=True):
        sums, x_grads = jax.lax.scan(of_chunk, sums, chunks)
        parts.append(x_grads.reshape(-1, x.shape[-1]))
    if whole < rows.shape[0] or not rows.shape[0]:
        sums, x_grad = of_chunk(sums, (rows[whole:], row_grads[whole:]))
        parts.append(x_grad)
    return (jnp.concatenate(parts).reshape(x.shape), *sums)


def _dot(left: Array, right: Array, left_dim: int, right_dim: int, dtype: Any = None) -> Array:
    dimensions = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=dtype or left.dtype)


def _whole(config: _Config, rows: int) -> int:
    """The number of rows that chunks of one size cover."""
    return rows // config.chunk_size * config.chunk_size


def _chunks(config: _Config, rows: Array) -> list[Array]:
    """The rows as `[chunks, size, H]`; an empty list without rows."""
    return [rows.reshape(-1, config.chunk_size, rows.shape[-1])] if rows.shape[0] else []
