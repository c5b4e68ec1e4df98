"""Methods that compute a head's loss in JAX: jliger, plain JAX and tokamax."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import jliger
from jliger.bench.problem import ONE, THREE, Bound, Method, Shape

Loss = Callable[..., Array]
DTYPES = ("float32", "bfloat16")
# XLA flags that may help, by their description in a method's name.
FLAGS = {
    "loops in command buffers": {
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
        )
    },
    "cuBLAS alone": {"xla_gpu_enable_triton_gemm": False},
}


def fused(hidden: Array, kernel: Array, labels: Array, **options: Any) -> Array:
    """The measured operation, without metrics."""
    loss = jliger.fused_linear_cross_entropy(hidden, kernel, labels, **options)
    assert isinstance(loss, jax.Array)
    return loss


def loss_and_gradients(loss: Loss, wrt: tuple[int, ...] = (0, 1)) -> Callable[[Array, Array, Array], Any]:
    """Loss and gradients with respect to hidden states (0), kernel (1), or both."""

    def function(hidden: Array, kernel: Array, labels: Array) -> Any:
        return jax.value_and_grad(lambda *args: loss(*args, labels), wrt)(hidden, kernel)

    return function


def token_losses_and_gradients(hidden: Array, kernel: Array, labels: Array, **options: Any) -> Any:
    """Per-token losses, and gradients with a different cotangent for each token."""
    losses, pullback = jax.vjp(lambda h, k: fused(h, k, labels, reduction="none", **options), hidden, kernel)
    return losses, pullback(jnp.linspace(0.5, 1.5, losses.size, dtype=losses.dtype))


def half_counted(hidden: Array, kernel: Array, labels: Array) -> Any:
    """Loss and gradients if every other token is uncounted."""
    labels = jnp.where(jnp.arange(labels.size) % 2 == 0, labels, -100)
    return loss_and_gradients(fused)(hidden, kernel, labels)


def checkpointed_chunks(hidden: Array, kernel: Array, labels: Array, chunk: int = 2048) -> Array:
    """Plain JAX with `jax.checkpoint`, in a scan over chunks of tokens."""

    @jax.checkpoint
    def chunk_sum(total: Float[Array, ""], chunk: tuple[Array, Int[Array, " C"]]) -> tuple[Array, None]:
        hidden, labels = chunk
        return total + labels.size * plain_loss(hidden, kernel, labels, str(hidden.dtype)), None

    chunk = min(chunk, hidden.shape[0])
    chunks = (hidden.reshape(-1, chunk, hidden.shape[1]), labels.reshape(-1, chunk))
    return jax.lax.scan(chunk_sum, jnp.zeros(()), chunks)[0] / labels.size


def bound(shape: Shape) -> Bound:
    """The bound of loss and gradients: logits are read once, their gradients written once, and the kernel is cast.

    A float32 kernel is cast to hidden's dtype. For a bfloat16 kernel, the float32 sum of its gradient is cast instead.
    """
    return Bound((THREE,), 2 * shape.logit_bytes + shape.cast_bytes)


def recomputed_bound(shape: Shape, kernel_dtype: str) -> Bound:
    """The bound of the recompute pass: logits are computed and read twice, and a float32 kernel is cast twice."""
    casts = 2 if kernel_dtype == "float32" else 0
    return Bound((THREE, ONE), 3 * shape.logit_bytes + casts * shape.cast_bytes)


def forward_bound(shape: Shape, kernel_dtype: str) -> Bound:
    """The bound of a loss without gradients: logits are read once."""
    return Bound((ONE,), shape.logit_bytes + (shape.cast_bytes if kernel_dtype == "float32" else 0))


def own_name(kernel_dtype: str = "float32", what: str = "") -> str:
    return f"jliger, {what + ', ' if what else ''}{kernel_dtype} kernel"


def own(shape: Shape, dtypes: Sequence[str] = DTYPES) -> list[Method]:
    """Loss and gradients, for kernels of these dtypes."""
    step = loss_and_gradients(fused)
    return [Method(own_name(dtype), step, dtype, bound=bound(shape), first_call=dtype == "float32") for dtype in dtypes]


def flagged(shape: Shape) -> list[Method]:
    """Loss and gradients with XLA flags that may help."""
    step = loss_and_gradients(fused)
    return [
        Method(own_name("float32", what), step, bound=bound(shape), baseline=own_name(), flags=flags)
        for what, flags in FLAGS.items()
    ]


def per_token(shape: Shape, dtypes: Sequence[str] = DTYPES) -> list[Method]:
    return [
        Method(
            own_name(dtype, "per token"),
            token_losses_and_gradients,
            dtype,
            bound=recomputed_bound(shape, dtype),
            first_call=dtype == "float32",
        )
        for dtype in dtypes
    ]


def options(shape: Shape) -> list[Method]:
    """The loss without gradients, other chunk sizes, masked tokens, and frozen operands."""
    alone = [Method(own_name(dtype, "loss alone"), fused, dtype, ONE, forward_bound(shape, dtype)) for dtype in DTYPES]
    chunks = [
        Method(
            own_name("float32", f"chunk_size={size}"),
            loss_and_gradients(functools.partial(fused, chunk_size=size)),
            bound=bound(shape),
            baseline=own_name(),
        )
        for size in (4096, 8192)
        if size <= shape.tokens
    ]
    less_work = {
        "half the tokens counted": half_counted,
        "kernel frozen": loss_and_gradients(fused, (0,)),
        "hidden states frozen": loss_and_gradients(fused, (1,)),
    }
    less = [
        Method(own_name("float32", what), step, floor=None, baseline=own_name()) for what, step in less_work.items()
    ]
    return [*alone, *chunks, *less]


def plain_loss(hidden: Array, kernel: Array, labels: Array, logits_dtype: str = "bfloat16") -> Array:
    """The mean cross entropy as a user would write it: full logits, then a log-sum-exp in float32."""
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.dtype(logits_dtype))
    labelled = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0].astype(jnp.float32)
    return jnp.mean(jax.nn.logsumexp(logits.astype(jnp.float32), axis=1) - labelled)


def plain(logits_dtype: str = "bfloat16", *, memory_only: bool = False, first_call: bool = False) -> Method:
    """Plain JAX with full logits of this dtype."""
    step = loss_and_gradients(functools.partial(plain_loss, logits_dtype=logits_dtype))
    name = f"plain JAX, {logits_dtype} logits"
    flags = {"xla_gpu_autotune_level": 0} if memory_only else {}  # autotuning would run products that do not fit
    return Method(name, step, memory_only=memory_only, first_call=first_call, flags=flags)


def checkpointed() -> Method:
    return Method("plain JAX, jax.checkpoint over chunks", loss_and_gradients(checkpointed_chunks), first_call=True)


def tokamax() -> list[Method]:
    """Tokamax's linear softmax cross entropy, if installed: its default, and its implementation with bounded memory."""
    try:
        import tokamax
    except ImportError:
        return []

    def loss(hidden: Array, kernel: Array, labels: Array, implementation: str | None) -> Array:
        return tokamax.linear_softmax_cross_entropy_loss(
            hidden, labels, kernel.astype(hidden.dtype), reduction="mean", implementation=implementation
        )

    return [
        Method(
            f"tokamax, {name}",
            loss_and_gradients(functools.partial(loss, implementation=implementation)),
            "bfloat16",
            first_call=implementation is not None,
        )
        for name, implementation in (("default", None), ("chunked_xla", "chunked_xla"))
    ]
