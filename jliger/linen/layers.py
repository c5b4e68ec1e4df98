"""layers: converts flax's own layers to `LinearHead`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.linen import dtypes
from jaxtyping import Array, Float

from jliger.heads import linear as heads
from jliger.heads.linear import LinearHead, Promote


@functools.singledispatch
def linear_head(module: Any, hidden: Float[Array, "*B H"]) -> LinearHead:
    """The head that `module` is: its parameters, and how logits are computed from them."""
    raise NotImplementedError(
        f"module got a {type(module).__name__}; pass a jliger.linen.LMHead, flax's Dense, DenseGeneral, Einsum or "
        "Embed, variables of one of them, or the head's arrays to jliger.fused_linear_cross_entropy."
    )


@linear_head.register
def _(module: nn.Dense, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nn.Dense, "__call__")
    heads.check_product(module, module.dot_general, module.dot_general_cls)
    return of_params(module, _params(module, "kernel", module.__call__, hidden))


@linear_head.register
def _(module: nn.DenseGeneral, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nn.DenseGeneral, "__call__")
    heads.check_product(module, module.dot_general, module.dot_general_cls)
    params = _params(module, "kernel", module.__call__, hidden)
    heads.check_one_last_axis(module, np.atleast_1d(module.axis), module.batch_dims, params["kernel"].shape)
    return of_params(module, params)


@linear_head.register
def _(module: nn.Einsum, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nn.Einsum, "__call__")
    layout = heads.einsum_layout(module.einsum_str or "")
    return of_params(module, _params(module, "kernel", module.__call__, hidden), kernel_layout=layout)


@linear_head.register
def _(module: nn.Embed, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nn.Embed, "attend")
    return of_embed(module, hidden)


@linear_head.register
def _(module: Mapping, hidden: Array) -> LinearHead:
    """Variables alone do not say which dtype to use: products are computed in hidden's."""
    params = meta.unbox(module.get("params", module))
    if set(params) == {"embedding"}:
        return LinearHead(kernel=params["embedding"], kernel_layout="vh", dtype=hidden.dtype)
    if set(params) in ({"kernel"}, {"kernel", "bias"}) and jnp.ndim(params["kernel"]) == 2:
        return LinearHead(kernel=params["kernel"], bias=params.get("bias"), dtype=hidden.dtype)
    shapes = {name: jax.tree.map(jnp.shape, params[name]) for name in sorted(params)}
    raise ValueError(
        f"module got variables {shapes}; pass those of a head alone: a kernel [H, V] and maybe a bias, or an embedding "
        "[V, H]."
    )


def of_embed(module: nn.Embed, hidden: Array, **changes: Any) -> LinearHead:
    kernel = _params(module, "embedding", module.attend, hidden)["embedding"]
    return of_params(module, {"kernel": kernel}, kernel_layout="vh", **changes)


def of_params(module: Any, params: Mapping[str, Array], **changes: Any) -> LinearHead:
    """The head of a layer's parameters, which are unboxed (`nn.with_partitioning`)."""
    return LinearHead(
        kernel=params["kernel"],
        bias=params.get("bias"),
        dtype=module.dtype,
        promote=_promote(module),
        logits_dtype=getattr(module, "preferred_element_type", None),
        precision=getattr(module, "precision", None),
        **changes,
    )


def _params(module: nn.Module, name: str, call: Callable[[Array], Any], hidden: Array) -> Mapping[str, Array]:
    if module.scope is None:
        raise ValueError(
            f"module got an unbound {type(module).__name__}; pass module.bind(variables), or its variables themselves."
        )
    if not module.has_variable("params", name):
        # The model is being initialised, and this layer has not been called yet.
        call(jnp.zeros((*(1,) * (hidden.ndim - 1), hidden.shape[-1]), hidden.dtype))
    return meta.unbox(module.variables["params"])


def _promote(module: Any) -> Promote | None:
    """None for flax's `promote_dtype`, whose effect is known; any other function is called."""
    if module.promote_dtype is dtypes.promote_dtype:
        return None

    def promote(hidden: Array, kernel: Array, bias: Array | None) -> Any:
        if isinstance(module, nn.Embed):
            return *module.promote_dtype(hidden, kernel, dtype=module.dtype), None
        return module.promote_dtype(hidden, kernel, bias, dtype=module.dtype)

    return promote
