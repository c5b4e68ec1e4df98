"""The norm as a differentiable function.

For the backward pass it saves its input (or the sum with the residual) and one or two floats per row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jliger.core import partitioned
from jliger.core.backend import Implementation, run_by_platform
from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import sum_to_type
from jliger.core.partitioned import Operation
from jliger.core.second_derivatives import once_differentiable
from jliger.ops.norms import xla
from jliger.ops.norms.types import NormConfig, NormGrads, NormInputs, NormResult, NormSaved

# The dimensions of every array, for `jliger.core.partitioned`: tokens and features.
_DIMS = {
    **dict.fromkeys(("x", "residual", "output", "total", "grad", "total_grad"), "th"),
    **dict.fromkeys(("scale", "offset"), "h"),
    **dict.fromkeys(("mean", "inverse"), "t"),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm(config: NormConfig, inputs: NormInputs) -> NormResult:
    """The norm; only its fields `output` and `total` are differentiable."""
    return _norm(config, inputs)


def _norm(config: NormConfig, inputs: NormInputs) -> NormResult:
    if config.implementation == "xla":
        return xla.norm(config, inputs)
    wide = accumulator_dtype(inputs.x.dtype)
    dtypes = {"output": config.dtype}
    if inputs.residual is not None:
        dtypes["total"] = inputs.x.dtype
    dtypes |= {"mean": wide, "inverse": wide} if config.centered else {"inverse": wide}
    run = functools.partial(_run, NormResult, dtypes, config)
    return once_differentiable(functools.partial(xla.norm, config), run, config.implementation)(inputs)


def _norm_fwd(config: NormConfig, inputs: NormInputs) -> tuple[NormResult, Any]:
    result = _norm(config, inputs)
    total = inputs.x if result.total is None else result.total
    # Arrays of size zero keep each input's dtype, and the devices of a `shard_map` that it varies over.
    like = jax.tree.map(lambda array: jnp.zeros_like(array, shape=(0,)), inputs)
    return result, (total, inputs.scale, result.mean, result.inverse, like)


def _norm_bwd(config: NormConfig, residuals: Any, cotangents: NormResult) -> tuple[NormInputs]:
    total, scale, mean, inverse, like = residuals
    saved = NormSaved(total, scale, mean, inverse, cotangents.output, cotangents.total)
    if config.implementation == "xla":
        grads = xla.norm_grads(config, saved)
    else:
        wide = accumulator_dtype(total.dtype)
        dtypes = {"x": total.dtype, "scale": wide} | ({"offset": wide} if config.with_offset else {})
        run = functools.partial(_run, NormGrads, dtypes, config)
        grads = once_differentiable(functools.partial(xla.norm_grads, config), run, config.implementation)(saved)
    of_inputs = NormInputs(grads.x, None if like.residual is None else grads.x, grads.scale, grads.offset)
    return (jax.tree.map(lambda grad, like: sum_to_type(grad, like).astype(like.dtype), of_inputs, like),)


norm.defvjp(_norm_fwd, _norm_bwd)


def _run(box: Any, results: dict[str, Any], config: NormConfig, arrays: NormInputs | NormSaved) -> Any:
    """Runs the norm, or its backward pass, on each device's rows. Arrays that are None are no operands.

    Args:
      box: the type of the result, `NormResult` or `NormGrads`; its other fields are None.
      results: the dtype of each array of the result.
      config: the norm's options.
      arrays: the operands.
    """
    operands = {name: array for name, array in arrays._asdict().items() if array is not None}
    operation = Operation(
        _run_on_rows,
        (config, type(arrays), tuple(operands)),
        tuple(_DIMS[name] for name in operands),
        tuple(_DIMS[name] for name in results),
        tuple(results.values()),
        whole="h",
    )
    values = dict(zip(results, partitioned.run(operation, *operands.values()), strict=True))
    return box(**{**dict.fromkeys(box._fields), **values})


def _run_on_rows(config: Any, dtypes: Any, *operands: Array) -> tuple[Array, ...]:
    """Runs one device's part, with tokens as one dimension of rows. Sums are in the accumulator's dtype already."""
    del dtypes
    norm_config, box, names = config
    lead = operands[0].shape[:-1]
    rows = {
        name: array.reshape(-1, *array.shape[len(lead) :]) if "t" in _DIMS[name] else array
        for name, array in zip(names, operands, strict=True)
    }

    def run(implementation: Implementation, arrays: Any) -> NormResult | NormGrads:
        backend = _backend(implementation)
        return (backend.norm if box is NormInputs else backend.norm_grads)(norm_config, arrays)

    # A grid without programs cannot be launched.
    choice = norm_config.implementation if operands[0].size else "xla"
    results = run_by_platform(run, choice, box(**{**dict.fromkeys(box._fields), **rows}))
    return tuple(
        array.reshape(*lead, *array.shape[1:]) if "t" in _DIMS[name] else array
        for name, array in results._asdict().items()
        if array is not None
    )


def _backend(implementation: Implementation) -> Any:
    """The module of a backend. Triton is imported only here, when it is chosen, so that it stays optional."""
    if implementation == "xla":
        return xla
    from jliger.ops.norms import triton

    return triton
