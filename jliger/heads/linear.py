"""A linear head: its parameters and the computation of logits, independent of the framework that holds them.

`jliger.nnx` and `jliger.linen` convert their modules to a `LinearHead`, so that the computation is implemented once.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from jliger.core import checks
from jliger.core.dtypes import promoted_dtype
from jliger.ops.linear_head.adapter import LinearAdapter
from jliger.ops.linear_head.arguments import HeadOptions
from jliger.ops.linear_head.cross_entropy import (
    CrossEntropyMetrics,
    CrossEntropyOptions,
    Loss,
    fused_linear_cross_entropy,
)
from jliger.ops.linear_head.logprob_loss import LossFn, LossOptions, fused_linear_loss
from jliger.ops.linear_head.logprobs import LinearLogprobs, LogprobsOptions, linear_logprobs
from jliger.ops.linear_head.top_k import LinearTopK, linear_top_k
from jliger.ops.linear_head.top_k_kl import fused_linear_top_k_kl
from jliger.ops.linear_head.types import KernelLayout

Promote = Callable[[Array, Array, Array | None], tuple[Array, Array, Array | None]]


class HeadMethods:
    """The operations of what makes a `LinearHead` of itself: modules of both of flax's libraries, and that itself."""

    def linear_head(self, hidden: Any) -> "LinearHead":
        """The parameters, and how logits of such hidden states are computed from them."""
        raise NotImplementedError

    @overload
    def loss(
        self,
        hidden: Float[Array, "*B H"],
        labels: Int[Array, "*B"],
        *,
        return_metrics: Literal[False] = False,
        **options: Unpack[CrossEntropyOptions],
    ) -> Loss: ...

    @overload
    def loss(
        self,
        hidden: Float[Array, "*B H"],
        labels: Int[Array, "*B"],
        *,
        return_metrics: Literal[True],
        **options: Unpack[CrossEntropyOptions],
    ) -> tuple[Loss, CrossEntropyMetrics]: ...

    @overload
    def loss(
        self,
        hidden: Float[Array, "*B H"],
        labels: Int[Array, "*B"],
        *,
        return_metrics: bool,
        **options: Unpack[CrossEntropyOptions],
    ) -> Loss | tuple[Loss, CrossEntropyMetrics]: ...

    # Options without defaults of their own: `nnx.grad` refuses a function that has keywords with defaults.
    def loss(self, hidden: Float[Array, "*B H"], labels: Int[Array, "*B"], **options: Any) -> Any:
        """The loss of `self(hidden)`. Options, results and errors are those of `jliger.fused_linear_cross_entropy`."""
        hidden, kernel, arguments = self.linear_head(hidden).arguments(hidden, options)
        return fused_linear_cross_entropy(hidden, kernel, labels, **arguments)

    def logprobs(
        self, hidden: Float[Array, "*B H"], labels: Int[Array, "*B"], **options: Unpack[LogprobsOptions]
    ) -> LinearLogprobs:
        """Log-probabilities and entropies of `self(hidden)`, a token each, as `jliger.linear_logprobs` gives them."""
        hidden, kernel, arguments = self.linear_head(hidden).arguments(hidden, options)
        return linear_logprobs(hidden, kernel, labels, **arguments)

    def top_k(self, hidden: Float[Array, "*B H"], k: int, **options: Unpack[HeadOptions]) -> LinearTopK:
        """The k most likely columns of `self(hidden)` for each token, as `jliger.linear_top_k` gives them."""
        hidden, kernel, arguments = self.linear_head(hidden).arguments(hidden, options)
        return linear_top_k(hidden, kernel, k, **arguments)

    def top_k_kl(
        self,
        hidden: Float[Array, "*B H"],
        teacher_ids: Integer[Array, "*B K"],
        teacher_logprobs: Float[Array, "*B K"],
        **options: Any,
    ) -> Any:
        """The divergence from a teacher's columns, as `jliger.losses.fused_linear_top_k_kl` gives it."""
        hidden, kernel, arguments = self.linear_head(hidden).arguments(hidden, options)
        return fused_linear_top_k_kl(hidden, kernel, teacher_ids, teacher_logprobs, **arguments)

    def logprob_loss(
        self,
        loss_fn: LossFn,
        hidden: Float[Array, "*B H"],
        labels: Int[Array, "*B"],
        args: tuple[Any, ...] = (),
        **options: Unpack[LossOptions],
    ) -> Any:
        """The sum of any loss of `self(hidden)`'s log-probabilities, as `jliger.fused_linear_loss` gives it."""
        hidden, kernel, arguments = self.linear_head(hidden).arguments(hidden, options)
        return fused_linear_loss(loss_fn, hidden, kernel, labels, args, **arguments)


_ARRAYS = ("kernel", "bias", "adapter")
_STATIC = (
    "kernel_layout",
    "logit_scale",
    "logit_softcap",
    "vocab_size",
    "dtype",
    "promote",
    "logits_dtype",
    "precision",
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=_STATIC)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearHead(HeadMethods):
    """A head with logits `softcap(logit_scale · (hidden · (kernel + adapter) + bias))`, and its dtypes.

    Attributes:
      kernel: `[H, V]`, or `[V, H]` with `kernel_layout="vh"`.
      bias: `[V]`, or None.
      adapter: a low-rank adapter of the kernel, or None.
      kernel_layout: `"hv"` or `"vh"`.
      logit_scale: multiplies the logits.
      logit_softcap: `c` in `c · tanh(z / c)`, or None.
      vocab_size: how many columns exist, if the kernel is padded; None for all.
      dtype: the dtype of the products' operands; None for the promoted dtype of hidden states and parameters, as in
        flax.
      promote: a function that casts hidden states, kernel and bias, instead of `dtype`.
      logits_dtype: the dtype that products are rounded to; None for that of their operands.
      precision: the precision of the products.
    """

    # Heads that are stacked, such as Medusa's, have a leading dimension.
    kernel: Float[Array, "*N H V"] | Float[Array, "*N V H"]
    bias: Float[Array, "*N V"] | None = None
    adapter: LinearAdapter | None = None
    kernel_layout: KernelLayout = "hv"
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    vocab_size: int | None = None
    dtype: Any = None
    promote: Promote | None = None
    logits_dtype: Any = None
    precision: jax.lax.PrecisionLike = None

    def logits(self, hidden: Float[Array, "*B H"], out_sharding: Any = None) -> Float[Array, "*B V"]:
        """All logits, computed as in the layer that this head was made from, then scaled and capped.

        They are −∞ in columns from `vocab_size` on, so that these are not sampled.
        """
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
        if self.logit_softcap is not None:
            logits = self.logit_softcap * jnp.tanh(logits / self.logit_softcap)
        if self.vocab_size is not None:
            padding = jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, 0, -jnp.inf).astype(logits.dtype)
            logits += jnp.expand_dims(padding, range(logits.ndim - 1))
        return logits

    def linear_head(self, hidden: Any) -> "LinearHead":
        """Itself."""
        del hidden
        return self

    def product_dtype(self, hidden: Array) -> Any:
        """The dtype that hidden states and parameters are cast to, by flax's rule."""
        arrays = [array for array in (hidden, self.kernel, self.bias) if array is not None]
        return promoted_dtype(*arrays) if self.dtype is None else jnp.dtype(self.dtype)

    def _promoted(self, hidden: Array) -> tuple[Array, Array, Array | None]:
        """Hidden states in the products' dtype, and parameters in a dtype that the operation accepts with it."""
        if self.promote is not None:
            return self.promote(hidden, self.kernel, self.bias)
        dtype = self.product_dtype(hidden)
        return hidden.astype(dtype), _cast(self.kernel, dtype), self.bias

    def arguments(self, hidden: Array, options: Mapping[str, Any]) -> tuple[Array, Array, dict[str, Any]]:
        """Hidden states, kernel and options as the operations take them."""
        hidden, kernel, bias = self._promoted(checks.as_array("hidden", hidden))
        own: dict[str, Any] = {"bias": bias, "kernel_layout": self.kernel_layout}
        if self.adapter is not None:
            a, b = (_cast(side, hidden.dtype) for side in (self.adapter.a, self.adapter.b))
            own["adapter"] = self.adapter._replace(a=a, b=b)
        for name in ("kernel", *own):
            if name in options:
                raise TypeError(f"{name} comes with the head; leave it out.")
        of_logits = ("logit_scale", "logit_softcap", "vocab_size", "logits_dtype", "precision")
        how = {name: getattr(self, name) for name in of_logits}
        return hidden, kernel, {**own, **how, **options}


def _cast(parameter: Array, dtype: Any) -> Array:
    """Casts a parameter, except from float32: the operation casts it, and sums and returns its gradient in float32."""
    return parameter if parameter.dtype == jnp.float32 else parameter.astype(dtype)


def hidden_of(module: Any, hidden: Any) -> Array:
    """The hidden states as an array; raises if an array was passed as the module."""
    if checks.is_array(module):
        raise TypeError(
            f"module got an array of shape {jnp.shape(module)}; the order is (module, hidden, ...). Pass arrays to "
            "the function of the same name in jliger: (hidden, kernel, ...)."
        )
    return checks.as_array("hidden", hidden)


# ---- which layers are linear heads ---------------------------------------------------------------------------


def check_embed(embed: Any, layer: type, package: str) -> None:
    """Raises unless `embed` is an embedding layer."""
    if not isinstance(embed, layer):
        raise TypeError(
            f"embed got a {type(embed).__name__}; pass a flax.{package}.Embed. Pass other layers to "
            f"jliger.{package}.fused_linear_cross_entropy(module, hidden, labels)."
        )


def check_own_method(module: Any, layer: type, method: str) -> None:
    """Raises for a subclass that overrides the method that computes logits: it may compute something else."""
    if getattr(type(module), method) is not getattr(layer, method):
        raise NotImplementedError(
            f"module got a {type(module).__name__} that overrides {layer.__name__}.{method}; pass its arrays to "
            "jliger.fused_linear_cross_entropy."
        )


def check_product(module: Any, *functions: Any) -> None:
    """Raises for a custom product function, which the fused operation would not call."""
    if any(function not in (None, jax.lax.dot_general, jnp.einsum) for function in functions):
        raise NotImplementedError(
            f"module got a {type(module).__name__} with a product of its own (dot_general, einsum_op), which the fused "
            "operation cannot use; leave it at the default."
        )


def check_one_last_axis(module: Any, axis: Any, batch_axes: Any, kernel_shape: tuple[int, ...]) -> None:
    """Raises unless a general linear layer maps the last axis to one axis."""
    axis, batch_axes = tuple(map(int, axis)), tuple(batch_axes)
    if axis != (-1,) or batch_axes or len(kernel_shape) != 2:
        raise NotImplementedError(
            f"module got a {type(module).__name__} of kernel {kernel_shape}, axis {axis} and batch axes {batch_axes}; "
            "a head maps the last axis to one axis: kernel [H, V], axis (-1,), no batch axes."
        )


def einsum_layout(equation: str) -> KernelLayout:
    """The layout of the kernel in an einsum of hidden states `[*B, H]` and a kernel, with logits `[*B, V]`."""
    letter = "[A-Za-z]"
    batch = rf"{letter}*(?:\.\.\.)?{letter}*"
    match = re.fullmatch(rf"({batch})({letter}),({letter}{{2}})->\1({letter})", equation.replace(" ", ""))
    if match:
        rows, feature, kernel, column = match.groups()
        letters = rows.replace(".", "") + feature + column
        if len(set(letters)) == len(letters) and kernel in (feature + column, column + feature):
            return "hv" if kernel == feature + column else "vh"
    raise NotImplementedError(
        f"module got an Einsum of {equation!r}; a head maps the last axis to one axis, as '...h,hv->...v' and "
        "'bth,vh->btv' do."
    )
