"""`rms_norm` and `layer_norm`: their checks and defaults."""

from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jliger.core import checks
from jliger.core.backend import (
    Choice,
    Implementation,
    check_implementation,
    fitting_implementation,
    target_compute_capability,
)
from jliger.core.meshes import is_explicit, mesh_of, with_features_of
from jliger.ops.norms.gradients import norm
from jliger.ops.norms.types import NormConfig, NormInputs

_TRITON_DTYPES = ("float32", "bfloat16", "float16")
_MOST_COLUMNS = 2**14  # a row is held in registers


@overload
def rms_norm(
    x: Float[Array, "*B H"],
    scale: Float[Array, " H"],
    *,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    residual: None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B H"]: ...


@overload
def rms_norm(
    x: Float[Array, "*B H"],
    scale: Float[Array, " H"],
    *,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    residual: Float[Array, "*B H"],
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*B H"], Float[Array, "*B H"]]: ...


def rms_norm(
    x: Float[Array, "*B H"],
    scale: Float[Array, " H"],
    *,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    residual: Float[Array, "*B H"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B H"] | tuple[Float[Array, "*B H"], Float[Array, "*B H"]]:
    r"""Root-mean-square norm of each row, with an optional residual that is added first.

    With $h = x + \mathrm{residual}$, `scale_offset` $o$ and `epsilon` $\epsilon$,

    $$\mathrm{norm} = \frac{h}{\sqrt{\frac{1}{H} \sum_i h_i^2 + \epsilon}} \cdot (o + \mathrm{scale})$$

    (Zhang and Sennrich, 2019, arXiv:1910.07467). Arithmetic is in float32, and the result is rounded once to x's dtype.
    There is one exception: if `scale_offset` is 0 and scale has x's dtype, the normalized values are also rounded
    before the scale multiplies them. This is what Llama does. Gemma has `scale_offset=1` and no such rounding.

    For the backward pass, only `h` and one float32 number per row are saved. The gradient of `scale` is summed in
    float32, in the same order in every run.

    On a mesh, rows may be sharded over any axes. Features may be sharded too, with `implementation="xla"`; inside a
    `jax.shard_map`, each device must have whole rows.

    Args:
      x: `[*B, H]`: float32, bfloat16, float16, or float64 (XLA only).
      scale: `[H]`, of any of these dtypes.
      epsilon: `ε`, a Python number of at least 0.
      scale_offset: `o`, a Python number: 0 for Llama, 1 for Gemma.
      residual: added to `x` before the norm, of x's shape and dtype. The norm is that of the rounded sum.
      implementation: `"triton"` for NVIDIA GPUs from sm_80 on, `"xla"` for any device. None chooses the one that was
        measured to be faster.

    Returns:
      The norm, `[*B, H]` in x's dtype. With `residual`, the norm and the sum `x + residual`, both in x's dtype.

    Raises:
      ValueError: a shape that does not fit, an option out of its range, or `"triton"` where there is no GPU.
      TypeError: something that is no array, a dtype that is not supported, or an option that is not a Python number.
      NotImplementedError: `"triton"` with features that are sharded over Explicit axes.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> x, scale = jnp.array([[3.0, 4.0], [6.0, 8.0]]), jnp.ones(2)
      >>> print(jliger.rms_norm(x, scale).round(1))
      [[0.8 1.1]
       [0.8 1.1]]
      >>> norm, total = jliger.rms_norm(x, scale, residual=x)
      >>> print(bool(jnp.allclose(norm, jliger.rms_norm(x + x, scale))), bool(jnp.all(total == x + x)))
      True True
    """
    checks.check_number("scale_offset", scale_offset)
    x, scale = checks.as_array("x", x), checks.as_array("scale", scale)
    if residual is not None:
        residual = checks.as_array("residual", residual)
        checks.check_shape("residual", residual, x.shape, "an array of x's shape")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual got dtype {residual.dtype}; cast it to x's, {x.dtype}, or x to its dtype.")
    return normalize(
        NormInputs(x, residual, scale, None),
        epsilon=epsilon,
        scale_offset=scale_offset,
        round_first=scale_offset == 0 and scale.dtype == x.dtype,
        implementation=implementation,
    )


def layer_norm(
    x: Float[Array, "*B H"],
    scale: Float[Array, " H"],
    offset: Float[Array, " H"] | None = None,
    *,
    epsilon: float = 1e-6,
    implementation: Implementation | None = None,
) -> Float[Array, "*B H"]:
    r"""Layer norm of each row.

    With mean $\mu = \frac{1}{H} \sum_i x_i$, variance $v = \frac{1}{H} \sum_i (x_i - \mu)^2$ and `epsilon` $\epsilon$,

    $$\mathrm{norm} = \frac{x - \mu}{\sqrt{v + \epsilon}} \cdot \mathrm{scale} + \mathrm{offset}$$

    (Ba et al., 2016, arXiv:1607.06450). Arithmetic is in float32, and the result is rounded once to x's dtype. For the
    backward pass, only `x` and two float32 numbers per row are saved. The gradients of `scale` and `offset` are summed
    in float32, in the same order in every run.

    On a mesh, rows may be sharded over any axes. Features may be sharded too, with `implementation="xla"`; inside a
    `jax.shard_map`, each device must have whole rows.

    Args:
      x: `[*B, H]`: float32, bfloat16, float16, or float64 (XLA only).
      scale: `[H]`, of any of these dtypes.
      offset: `[H]`, of any of these dtypes, or None for 0.
      epsilon: `ε`, a Python number of at least 0.
      implementation: `"triton"` for NVIDIA GPUs from sm_80 on, `"xla"` for any device. None chooses the one that was
        measured to be faster.

    Returns:
      The norm, `[*B, H]` in x's dtype.

    Raises:
      ValueError: a shape that does not fit, an option out of its range, or `"triton"` where there is no GPU.
      TypeError: something that is no array, a dtype that is not supported, or an option that is not a Python number.
      NotImplementedError: `"triton"` with features that are sharded over Explicit axes.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> x = jnp.array([[1.0, 2.0, 3.0]])
      >>> print(jliger.layer_norm(x, jnp.ones(3), jnp.full(3, 10.0)).round(1))
      [[ 8.8 10.  11.2]]
    """
    x, scale = checks.as_array("x", x), checks.as_array("scale", scale)
    if offset is not None:
        offset = checks.as_array("offset", offset)
    inputs = NormInputs(x, None, scale, offset)
    return normalize(inputs, epsilon=epsilon, centered=True, implementation=implementation)


def normalize_as(
    dtype: Any, x: Array, scale: Array | None, offset: Array | None, *, epsilon: float, centered: bool
) -> Array:
    """The norm in another dtype than x's, rounded once, with or without a scale: what Flax's modules need."""
    scale = jnp.ones(x.shape[-1:], x.dtype) if scale is None else scale
    return normalize(NormInputs(x, None, scale, offset), epsilon=epsilon, centered=centered, dtype=dtype)


def normalize(
    inputs: NormInputs,
    *,
    epsilon: float,
    scale_offset: float = 0.0,
    centered: bool = False,
    round_first: bool = False,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> Any:
    """Checks the arguments, and returns the norm; with a residual, the norm and the sum. `dtype` None means x's."""
    checks.check_number("epsilon", epsilon, least=0)
    x = inputs.x
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"x got shape {x.shape}; pass rows of at least one feature, [*B, H].")
    parameters = {"scale": inputs.scale, "offset": inputs.offset}
    parameters = {name: array for name, array in parameters.items() if array is not None}
    for name, array in {"x": x, **parameters}.items():
        checks.check_floating(name, array)
    for name, array in parameters.items():
        checks.check_shape(name, array, x.shape[-1:], "one number per feature of x")
    config = NormConfig(
        float(epsilon),
        float(scale_offset),
        centered,
        round_first,
        inputs.offset is not None,
        np.dtype(dtype or x.dtype),
        _choice(implementation, x, *parameters.values()),
        target_compute_capability(),
    )
    # Sharded as x's features are, and whole elsewhere. The gradients get back the sharding of the parameters.
    parameters = {name: with_features_of(x, array) for name, array in parameters.items()}
    result = norm(config, inputs._replace(**parameters))
    return result.output if result.total is None else (result.output, result.total)


def _choice(implementation: Implementation | None, x: jax.Array, *parameters: jax.Array) -> Choice:
    check_implementation(implementation)
    mesh_axes = jax.typeof(x).sharding.spec[-1] if is_explicit(mesh_of(x)) else None
    dtypes = sorted({str(array.dtype) for array in (x, *parameters)})
    can_run = mesh_axes is None and x.shape[-1] <= _MOST_COLUMNS and set(dtypes) <= set(_TRITON_DTYPES)
    if implementation is None:
        return fitting_implementation(x, *parameters) if can_run else "xla"
    if implementation == "triton" and mesh_axes is not None:
        raise NotImplementedError(
            f"implementation got 'triton' for an x whose features are sharded over {mesh_axes}; pass 'xla', or shard x "
            "by rows alone."
        )
    if implementation == "triton" and not can_run:
        raise ValueError(
            f"implementation got 'triton' for rows of {x.shape[-1]} features in {', '.join(dtypes)}; pass 'xla'. The "
            f"kernels take at most {_MOST_COLUMNS} features, in float32, bfloat16 or float16."
        )
    return implementation
