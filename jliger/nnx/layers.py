"""layers: converts flax's own layers to `LinearHead`."""

import dataclasses
import functools
from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, Float

from jliger.core.dtypes import promoted_dtype
from jliger.heads import linear as heads
from jliger.heads.linear import LinearHead, Promote
from jliger.ops.linear_head.adapter import LinearAdapter


@functools.singledispatch
def linear_head(module: Any, hidden: Float[Array, "*B H"]) -> LinearHead:
    """The head that `module` is: its parameters, and how logits are computed from them."""
    raise NotImplementedError(
        f"module got a {type(module).__name__}; pass a jliger.nnx.LMHead or flax's Linear, LinearGeneral, Einsum, "
        "Embed, LoRALinear or LoRA, or the head's arrays to jliger.fused_linear_cross_entropy."
    )


@linear_head.register
def _(module: nnx.Linear, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nnx.Linear, "__call__")
    return of_linear(module)


@linear_head.register
def _(module: nnx.LinearGeneral, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nnx.LinearGeneral, "__call__")
    heads.check_one_last_axis(module, module.axis, module.batch_axis, module.kernel.shape)
    heads.check_product(module, module.dot_general, module.dot_general_cls)
    return _head(module, module.kernel, module.bias)


@linear_head.register
def _(module: nnx.Einsum, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nnx.Einsum, "__call__")
    heads.check_product(module, module.einsum_op)
    return _head(module, module.kernel, module.bias, kernel_layout=heads.einsum_layout(module.einsum_str))


@linear_head.register
def _(module: nnx.Embed, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nnx.Embed, "attend")
    return of_embed(module)


@linear_head.register
def _(module: nnx.LoRALinear, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nnx.LoRALinear, "__call__")
    base, adapter = of_linear(module), _adapter(module.lora)
    # The adapter's product may be more precise than the base's logits; then the sum is, too.
    dtype = promoted_dtype(base.logits_dtype or base.product_dtype(hidden), _lora_dtype(module.lora, hidden, adapter))
    return dataclasses.replace(base, adapter=adapter, logits_dtype=dtype)


@linear_head.register
def _(module: nnx.LoRA, hidden: Array) -> LinearHead:
    heads.check_own_method(module, nnx.LoRA, "__call__")
    adapter = _adapter(module)
    if module.base_module is None or isinstance(module.base_module, nnx.Embed):
        kind = type(module.base_module).__name__
        raise NotImplementedError(f"module got a LoRA with base_module {kind}; as a head it needs a linear one.")
    # The adapter casts the hidden states before the base gets them.
    hidden = hidden.astype(_lora_dtype(module, hidden, adapter))
    base = linear_head(module.base_module, hidden)
    if base.adapter is not None:
        raise NotImplementedError("module got a LoRA of a LoRA; merge one of them into the kernel.")
    return dataclasses.replace(base, adapter=adapter, dtype=base.product_dtype(hidden))


def _adapter(lora: nnx.LoRA) -> LinearAdapter:
    if lora.promote_dtype is not dtypes.promote_dtype:
        raise NotImplementedError("module got a LoRA with a promote_dtype of its own; leave it at flax's.")
    return LinearAdapter(lora.lora_a[...], lora.lora_b[...])


def _lora_dtype(lora: nnx.LoRA, hidden: Array, adapter: LinearAdapter) -> Any:
    return promoted_dtype(hidden, adapter.a, adapter.b) if lora.dtype is None else lora.dtype


def of_linear(module: nnx.Linear, **changes: Any) -> LinearHead:
    heads.check_product(module, module.dot_general)
    return _head(module, module.kernel, module.bias, **changes)


def of_embed(module: nnx.Embed, **changes: Any) -> LinearHead:
    return _head(module, module.embedding, kernel_layout="vh", **changes)


def _head(module: Any, kernel: nnx.Variable, bias: nnx.Variable | None = None, **changes: Any) -> LinearHead:
    return LinearHead(
        kernel=kernel[...],
        bias=None if bias is None else bias[...],
        dtype=module.dtype,
        promote=_promote(module),
        logits_dtype=getattr(module, "preferred_element_type", None),
        precision=getattr(module, "precision", None),
        **changes,
    )


def _promote(module: Any) -> Promote | None:
    """None for flax's `promote_dtype`, whose effect is known; any other function is called."""
    if module.promote_dtype is dtypes.promote_dtype:
        return None

    def promote(hidden: Array, kernel: Array, bias: Array | None) -> Any:
        if isinstance(module, nnx.Embed):
            return *module.promote_dtype((hidden, kernel), dtype=module.dtype), None
        return module.promote_dtype((hidden, kernel, bias), dtype=module.dtype)

    return promote
