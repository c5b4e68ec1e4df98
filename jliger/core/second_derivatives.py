"""Second derivatives: forward mode over the gradients works with XLA; reverse mode raises."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jliger.core.backend import Choice

_WHAT_WORKS = (
    "The operation is differentiable once, in reverse mode. For second derivatives use forward mode over reverse mode, "
    "with implementation='xla' and on one device: jax.jvp of jax.grad, or jax.hessian."
)


def once_differentiable(
    operation: Callable[..., Any], vmappable_operation: Callable[..., Any], implementation: Choice
) -> Callable[..., Any]:
    """`vmappable_operation` with the derivatives of `operation`, in forward mode only.

    Without this wrapper, second derivatives raise errors from inside JAX that do not say what to do.
    """
    function = jax.custom_jvp(vmappable_operation)

    @function.defjvp
    def jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
        if implementation == "triton":
            raise NotImplementedError(f"a gradient of implementation='triton' got differentiated. {_WHAT_WORKS}")
        # The values are computed separately, not taken from `jax.jvp`: `jax.linearize` must be able to separate the
        # primal computation from the tangents.
        return vmappable_operation(*primals), jax.tree.map(_forward_only, jax.jvp(operation, primals, tangents)[1])

    return function


def _forward_only(tangent: Any) -> Any:
    """The tangent, which raises if reverse mode transposes it."""
    return tangent if tangent.dtype == jax.dtypes.float0 else _forward_only_p.bind(tangent)


def _refuse(*_: Any) -> NoReturn:
    raise NotImplementedError(f"a gradient got differentiated in reverse mode. {_WHAT_WORKS}")


# A primitive, because JAX's functions with a custom transpose (jax 0.12) have no batching rule. `jax.interpreters` and
# `jax.extend` are not covered by JAX's compatibility promise.
_forward_only_p = Primitive("forward_only")
_forward_only_p.def_impl(lambda tangent: tangent)
_forward_only_p.def_abstract_eval(lambda tangent: tangent)
ad.deflinear2(_forward_only_p, _refuse)
batching.primitive_batchers[_forward_only_p] = lambda args, dims: (_forward_only_p.bind(*args), *dims)
mlir.register_lowering(_forward_only_p, lambda _, tangent: [tangent])
