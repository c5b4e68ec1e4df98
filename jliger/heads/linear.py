"""heads: a linear head's parameters and how they make logits, whichever framework holds them.

`jliger.nnx` and `jliger.linen` turn their modules into a `LinearHead`; what it computes is here, once.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.core import checks
from jliger.ops.linear_head.adapter import LinearAdapter
from jliger.ops.linear_head.cross_entropy import fused_linear_cross_entropy
from jliger.ops.linear_head.logprobs import LinearLogprobs, linear_logprobs
from jliger.ops.linear_head.types import KernelLayout

Promote = Callable[[Array, Array, Array | None], tuple[Array, Array, Array | None]]


_ARRAYS = ("kernel", "bias", "adapter")
_STATIC = ("kernel_layout", "logit_scale", "logit_softcap", "dtype", "promote", "logits_dtype", "precision")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=_STATIC)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearHead:
    """`softcap(logit_scale · (hidden · (kernel + adapter) + bias))`, and in which dtypes.

    Attributes:
      kernel: `[H, V]`, or `[V, H]` with `kernel_layout="vh"`.
      bias: `[V]`, or None.
      adapter: of the kernel, or None.
      kernel_layout: `"hv"` or `"vh"`.
      logit_scale: multiplies the logits.
      logit_softcap: `c` in `c · tanh(z / c)`, or None.
      dtype: of the products; None for what hidden states and parameters promote to, as in flax.
      promote: in place of `dtype`, a function that casts hidden states, kernel and bias in a way of its own.
      logits_dtype: what products are rounded to; None for their own dtype.
      precision: of the products.
    """

    # Heads that are stacked, such as Medusa's, have a leading dimension.
    kernel: Float[Array, "*N H V"] | Float[Array, "*N V H"]
    bias: Float[Array, "*N V"] | None = None
    adapter: LinearAdapter | None = None
    kernel_layout: KernelLayout = "hv"
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    dtype: Any = None
    promote: Promote | None = None
    logits_dtype: Any = None
    precision: jax.lax.PrecisionLike = None

    def logits(self, hidden: Float[Array, "*B H"], out_sharding: Any = None) -> Float[Array, "*B V"]:
        """All logits, as the layer that this head is made of would have them, scaled and capped."""
        hidden, kernel, bias = self._promoted(hidden)
        logits = jax.lax.dot_general(
            hidden,
            kernel.astype(hidden.dtype),
            (((hidden.ndim - 1,), (0 if self.kernel_layout == "hv" else 1,)), ((), ())),
            precision=self.precision,
            preferred_element_type=self.logits_dtype,
            out_sharding=out_sharding,
        )
        if self.adapter is not None:
            a, b = (side.astype(hidden.dtype) for side in (self.adapter.a, self.adapter.b))
            adapted = jnp.dot(jnp.dot(hidden, a, precision=self.precision), b, precision=self.precision)
            logits += (jnp.asarray(self.adapter.scale).astype(adapted.dtype) * adapted).astype(logits.dtype)
        if bias is not None:
            logits += jnp.expand_dims(bias.astype(logits.dtype), range(logits.ndim - 1))
        if self.logit_scale != 1:
            logits *= self.logit_scale
        return logits if self.logit_softcap is None else self.logit_softcap * jnp.tanh(logits / self.logit_softcap)

    def loss(self, hidden: Float[Array, "*B H"], labels: Int[Array, "*B"], **options: Any) -> Any:
        """`jliger.fused_linear_cross_entropy` of this head."""
        hidden, kernel, options = self._arguments(hidden, options)
        return fused_linear_cross_entropy(hidden, kernel, labels, **options)

    def logprobs(self, hidden: Float[Array, "*B H"], labels: Int[Array, "*B"], **options: Any) -> LinearLogprobs:
        """`jliger.linear_logprobs` of this head."""
        hidden, kernel, options = self._arguments(hidden, options)
        return linear_logprobs(hidden, kernel, labels, **options)

    def product_dtype(self, hidden: Array) -> Any:
        """What hidden states and parameters are cast to, by flax's rule."""
        arrays = [array for array in (hidden, self.kernel, self.bias) if array is not None]
        return jnp.result_type(*arrays) if self.dtype is None else jnp.dtype(self.dtype)

    def _promoted(self, hidden: Array) -> tuple[Array, Array, Array | None]:
        """Hidden states in the dtype of the products, and parameters in one that the operation takes with it."""
        if self.promote is not None:
            return self.promote(hidden, self.kernel, self.bias)
        dtype = self.product_dtype(hidden)
        return hidden.astype(dtype), _cast(self.kernel, dtype), self.bias

    def _arguments(self, hidden: Array, options: Mapping[str, Any]) -> tuple[Array, Array, dict[str, Any]]:
        hidden, kernel, bias = self._promoted(checks.as_array("hidden", hidden))
        own: dict[str, Any] = {"bias": bias, "kernel_layout": self.kernel_layout}
        if self.adapter is not None:
            a, b = (_cast(side, hidden.dtype) for side in (self.adapter.a, self.adapter.b))
            own["adapter"] = self.adapter._replace(a=a, b=b)
        for name in ("kernel", *own):
            if name in options:
                raise TypeError(f"{name} comes with the head; leave it out.")
        how = {name: getattr(self, name) for name in ("logit_scale", "logit_softcap", "logits_dtype", "precision")}
        return hidden, kernel, {**own, **how, **options}


def _cast(parameter: Array, dtype: Any) -> Array:
    """Float32 parameters stay, for the operation to cast: then their gradients are summed and returned in float32."""
    return parameter if parameter.dtype == jnp.float32 else parameter.astype(dtype)


def hidden_of(module: Any, hidden: Any) -> Array:
    """Hidden states as an array, where they are passed after a head."""
    if checks.is_array(module):
        raise TypeError(
            f"module got an array of shape {jnp.shape(module)}; the order is (module, hidden, labels). A head's arrays "
            "go to jliger.fused_linear_cross_entropy(hidden, kernel, labels)."
        )
    return checks.as_array("hidden", hidden)


# ---- which layers are such heads -----------------------------------------------------------------------------


def check_embed(embed: Any, layer: type, package: str) -> None:
    """A tied head takes an embedding alone."""
    if not isinstance(embed, layer):
        raise TypeError(
            f"embed got a {type(embed).__name__}; pass a flax.{package}.Embed. Other layers go to "
            f"jliger.{package}.fused_linear_cross_entropy(module, hidden, labels) as they are."
        )


def check_own_method(module: Any, layer: type, method: str) -> None:
    """A subclass that computes logits in its own way is not the layer that it is derived from."""
    if getattr(type(module), method) is not getattr(layer, method):
        raise NotImplementedError(
            f"module got a {type(module).__name__} that overrides {layer.__name__}.{method}; pass its arrays to "
            "jliger.fused_linear_cross_entropy."
        )


def check_product(module: Any, *functions: Any) -> None:
    """A product that is neither JAX's own nor left open is one that the fused operation knows nothing of."""
    if any(function not in (None, jax.lax.dot_general, jnp.einsum) for function in functions):
        raise NotImplementedError(
            f"module got a {type(module).__name__} with a product of its own (dot_general, einsum_op), which the fused "
            "operation cannot use; leave it at the default."
        )


def check_one_last_axis(module: Any, axis: Any, batch_axes: Any, kernel_shape: tuple[int, ...]) -> None:
    """A general linear layer is a head if it takes the last axis alone to one axis."""
    axis, batch_axes = tuple(map(int, axis)), tuple(batch_axes)
    if axis != (-1,) or batch_axes or len(kernel_shape) != 2:
        raise NotImplementedError(
            f"module got a {type(module).__name__} of kernel {kernel_shape}, axis {axis} and batch axes {batch_axes}; "
            "a head takes the last axis alone to one axis: kernel [H, V], axis (-1,), no batch axes."
        )


def einsum_layout(equation: str) -> KernelLayout:
    """The kernel's layout in an einsum of hidden states `[*B, H]` and a kernel to logits `[*B, V]`."""
    letter = "[A-Za-z]"
    batch = rf"{letter}*(?:\.\.\.)?{letter}*"
    match = re.fullmatch(rf"({batch})({letter}),({letter}{{2}})->\1({letter})", equation.replace(" ", ""))
    if match:
        rows, feature, kernel, column = match.groups()
        letters = rows.replace(".", "") + feature + column
        if len(set(letters)) == len(letters) and kernel in (feature + column, column + feature):
            return "hv" if kernel == feature + column else "vh"
    raise NotImplementedError(
        f"module got an Einsum of {equation!r}; a head takes the last axis to one axis, as '...h,hv->...v' and "
        "'bth,vh->btv' do."
    )
