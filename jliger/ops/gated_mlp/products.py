"""`swiglu` and `geglu`: an activation of one array times another, in plain JAX."""

import functools
import math
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from jliger.core import checks
from jliger.core.backend import Implementation
from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import sum_to_type

Activation = Literal["silu", "gelu", "gelu_tanh"]


def _gelu_tanh(x: Array) -> Array:
    """`x · (1 + tanh(u)) / 2`, written with `sigmoid(2u)`: XLA then computes its gradient in one kernel."""
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": _gelu_tanh,
}


def swiglu(
    gate: Float[Array, "*B F"], up: Float[Array, "*B F"], *, implementation: Implementation | None = None
) -> Float[Array, "*B F"]:
    r"""$\mathrm{silu}(\mathrm{gate}) \cdot \mathrm{up}$, with $\mathrm{silu}(x) = x / (1 + e^{-x})$.

    This is the gated product of SwiGLU (Shazeer, 2020, arXiv:2002.05202), as in Llama. Arithmetic is in float32, and
    the result is rounded once. For the backward pass, only `gate` and `up` are saved.

    Args:
      gate: any shape: float32, bfloat16, float16 or float64. It may be sharded over a mesh in any way.
      up: of the same shape and dtype.
      implementation: `"xla"` or None. There is no Triton kernel, because XLA was measured to be as fast.

    Returns:
      The product, of the same shape and dtype.

    Raises:
      ValueError: shapes that differ, or `"triton"`.
      TypeError: something that is no array, or a dtype that is not supported.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> print(jliger.swiglu(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0])).round(1))
      [0.  1.5]
    """
    checks.check_choice("implementation", implementation, ("xla", None))
    return gated_product("silu", gate, up)


def geglu(
    gate: Float[Array, "*B F"],
    up: Float[Array, "*B F"],
    *,
    approximate: bool = True,
    implementation: Implementation | None = None,
) -> Float[Array, "*B F"]:
    r"""$\mathrm{gelu}(\mathrm{gate}) \cdot \mathrm{up}$, with $\mathrm{gelu}(x) = x\,\Phi(x)$.

    This is the gated product of GEGLU (Shazeer, 2020, arXiv:2002.05202), as in Gemma. Arithmetic is in float32, and the
    result is rounded once. For the backward pass, only `gate` and `up` are saved.

    Args:
      gate: any shape: float32, bfloat16, float16 or float64. It may be sharded over a mesh in any way.
      up: of the same shape and dtype.
      approximate: whether `Φ` is approximated with a hyperbolic tangent (Hendrycks and Gimpel, 2016, arXiv:1606.08415).
      implementation: `"xla"` or None. There is no Triton kernel, because XLA was measured to be as fast.

    Returns:
      The product, of the same shape and dtype.

    Raises:
      ValueError: shapes that differ, or `"triton"`.
      TypeError: something that is no array, or a dtype that is not supported.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> print(jliger.geglu(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0])).round(1))
      [0.  1.7]
    """
    checks.check_choice("implementation", implementation, ("xla", None))
    return gated_product("gelu_tanh" if approximate else "gelu", gate, up)


def gated_product(activation: Activation, gate: Array, up: Array) -> Array:
    """`activation(gate) · up`, after checks of the two arrays."""
    gate, up = checks.as_array("gate", gate), checks.as_array("up", up)
    checks.check_floating("gate", gate)
    checks.check_shape("up", up, gate.shape, "an array of gate's shape")
    if up.dtype != gate.dtype:
        raise TypeError(f"up got dtype {up.dtype}; cast it to gate's, {gate.dtype}, or gate to its dtype.")
    return activated(activation, gate, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activated(activation: Activation, gate: Array, up: Array) -> Array:
    """`product`, which saves only its operands for the backward pass."""
    return product(activation, gate, up)


def product(activation: Activation, gate: Array, up: Array) -> Array:
    """`activation(gate) · up` in the accumulator's dtype, rounded once."""
    return _wide_product(activation, *_wide(gate, up)).astype(gate.dtype)


def _wide_product(activation: Activation, gate: Array, up: Array) -> Array:
    return ACTIVATIONS[activation](gate) * up


def product_grads(activation: Activation, gate: Array, up: Array, grad: Array) -> tuple[Array, Array]:
    """The gradients by `gate` and `up`, in the accumulator's dtype."""
    _, pull_back = jax.vjp(functools.partial(_wide_product, activation), *_wide(gate, up))
    return pull_back(*_wide(grad))


def _activated_fwd(activation: Activation, gate: Array, up: Array) -> tuple[Array, Any]:
    return product(activation, gate, up), (gate, up)


def _activated_bwd(activation: Activation, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, ...]:
    grads = product_grads(activation, *residuals, grad)
    return tuple(sum_to_type(grad.astype(one.dtype), one) for grad, one in zip(grads, residuals, strict=True))


activated.defvjp(_activated_fwd, _activated_bwd)


def _wide(*arrays: Array) -> tuple[Array, ...]:
    return tuple(array.astype(accumulator_dtype(array.dtype)) for array in arrays)
