"""The log-probability benchmark: `linear_logprobs` with and without gradients, and losses fused with the head."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jliger
from jliger import losses, reference
from jliger.bench.head import CPU_SHAPE, MAIN, problem
from jliger.bench.methods import DTYPES, forward_bound, loss_and_gradients, recomputed_bound
from jliger.bench.problem import ONE, THREE, Bound, Method, Problem, Shape

RANK = 16


def problems() -> list[Problem]:
    shape = MAIN if jax.default_backend() == "gpu" else CPU_SHAPE
    return [problem(shape, _methods(shape))]


def _methods(shape: Shape) -> list[Method]:
    result: list[Method] = []
    on_gpu = jax.default_backend() == "gpu"
    dtypes = DTYPES if on_gpu else DTYPES[:1]
    for dtype in dtypes:
        recomputed = recomputed_bound(shape, dtype)
        both = f"forward and backward, {dtype} kernel"
        # The head frozen: logits are read by statistics and by gradients, and these written.
        frozen = Bound((ONE, ONE), 3 * shape.logit_bytes + (shape.cast_bytes if dtype == "float32" else 0))
        # With kept logits, these are read twice, and their gradients written once; no product is computed twice.
        kept = Bound((THREE,), 3 * shape.logit_bytes + shape.cast_bytes)
        result += [
            Method(f"forward alone, {dtype} kernel", _forward, dtype, ONE, forward_bound(shape, dtype)),
            Method(both, _and_gradients(_logprobs), dtype, bound=recomputed),
            Method(f"logits kept, {dtype} kernel", _and_gradients(_logprobs, keep_logits=True), dtype, bound=kept),
            # Statistics and logit gradients are computed in two launches, so logits are read twice here, too.
            Method(f"fused GRPO, {dtype} kernel", loss_and_gradients(_fused_grpo), dtype, bound=kept),
            Method(f"fused ORPO, {dtype} kernel", loss_and_gradients(_fused_orpo), dtype, bound=kept),
            Method(f"frozen head, {dtype} kernel", _hidden_gradients(_logprobs), dtype, None, frozen, both),
        ]
    return [
        *result,
        *_budgets(),
        *(_wide(shape) if on_gpu else []),
        Method(
            f"frozen head, with the entropy's gradient, {dtypes[-1]} kernel",
            _hidden_gradients(_logprobs_and_entropy),
            dtypes[-1],
            None,
            baseline=f"forward and backward, {dtypes[-1]} kernel",
        ),
        Method("with the entropy's gradient, float32 kernel", _and_gradients(_logprobs_and_entropy)),
        Method(f"an adapter of rank {RANK}, kernel frozen", _adapter_gradients),
        Method("plain JAX (jliger.reference)", _and_gradients(_plain)),
    ]


def _budgets() -> list[Method]:
    """Logits kept within five budgets, in eighths of all their bytes."""
    return [
        Method(
            f"logits kept, {eighths}/8 of their bytes, float32 kernel",
            _and_gradients(functools.partial(_kept_in_part, eighths=eighths)),
            about={"line": "keep_logits=BYTES, float32 kernel", "setting": f"{eighths}/8 of all"},
        )
        for eighths in (0, 2, 4, 6, 8)
    ]


def _wide(shape: Shape) -> list[Method]:
    """Float32 logits of bfloat16 operands; they are twice as large, and their gradients are not."""
    wide = {"logits_dtype": jnp.float32}
    dtype = DTYPES[-1]
    steps = {
        "forward and backward": (_and_gradients(_logprobs, **wide), Bound((THREE, ONE), 5 * shape.logit_bytes)),
        "fused GRPO": (
            loss_and_gradients(functools.partial(_fused_grpo, **wide)),
            Bound((THREE,), 5 * shape.logit_bytes + shape.cast_bytes),
        ),
    }
    return [
        Method(f"{what}, float32 logits, {dtype} kernel", step, dtype, bound=bound, baseline=f"{what}, {dtype} kernel")
        for what, (step, bound) in steps.items()
    ]


def _forward(hidden: Array, kernel: Array, labels: Array) -> Any:
    return jliger.linear_logprobs(hidden, kernel, labels).logprobs


def _logprobs(hidden: Array, kernel: Array, labels: Array, **options: Any) -> Any:
    return jliger.linear_logprobs(hidden, kernel, labels, **options).logprobs


def _kept_in_part(hidden: Array, kernel: Array, labels: Array, *, eighths: int) -> Any:
    size = labels.size * kernel.shape[1] * hidden.dtype.itemsize
    return _logprobs(hidden, kernel, labels, keep_logits=size * eighths // 8)


def _logprobs_and_entropy(hidden: Array, kernel: Array, labels: Array) -> Any:
    result = jliger.linear_logprobs(hidden, kernel, labels)
    return result.logprobs, result.entropy


def _fused_grpo(hidden: Array, kernel: Array, labels: Array, **options: Any) -> Array:
    """Sequences of at most 1024 tokens."""
    length = min(1024, labels.size)
    tokens, advantages = labels.reshape(-1, length), jnp.linspace(-1.0, 1.0, labels.size // length)
    old_logprobs = jnp.full(tokens.shape, -jnp.log(kernel.shape[1]), jnp.float32)
    hidden = hidden.reshape(*tokens.shape, -1)
    return losses.fused_linear_grpo(hidden, kernel, tokens, advantages, old_logprobs=old_logprobs, **options)[0]


def _fused_orpo(hidden: Array, kernel: Array, labels: Array) -> Array:
    """Pairs of two sequences of at most 1024 tokens."""
    tokens = labels.reshape(-1, 2, min(1024, labels.size // 2))
    return losses.fused_linear_orpo(hidden.reshape(*tokens.shape, -1), kernel, tokens)[0]


def _plain(hidden: Array, kernel: Array, labels: Array) -> Any:
    return reference.linear_logprobs(hidden, kernel, labels).logprobs


def _and_gradients(function: Callable[..., Any], **options: Any) -> Callable[[Array, Array, Array], Any]:
    """Values, and gradients with a different cotangent for each token."""

    def result(hidden: Array, kernel: Array, labels: Array) -> Any:
        values, pull_back = jax.vjp(lambda *args: function(*args, labels, **options), hidden, kernel)
        return values, pull_back(jax.tree.map(_cotangent, values))

    return result


def _hidden_gradients(function: Callable[..., Any]) -> Callable[[Array, Array, Array], Any]:
    """Values, and gradients of hidden states alone."""

    def result(hidden: Array, kernel: Array, labels: Array) -> Any:
        values, pull_back = jax.vjp(lambda hidden: function(hidden, kernel, labels), hidden)
        return values, pull_back(jax.tree.map(_cotangent, values))

    return result


def _adapter_gradients(hidden: Array, kernel: Array, labels: Array) -> Any:
    """Gradients with respect to hidden states and an adapter, but not the kernel."""
    keys = jax.random.split(jax.random.key(1))
    a = jax.random.normal(keys[0], (hidden.shape[1], RANK)) * hidden.shape[1] ** -0.5
    b = jax.random.normal(keys[1], (RANK, kernel.shape[1]))

    def logprobs(hidden: Array, a: Array, b: Array) -> Array:
        return _logprobs(hidden, kernel, labels, adapter=jliger.LinearAdapter(a, b, 0.1))

    values, pull_back = jax.vjp(logprobs, hidden, a, b)
    return values, pull_back(_cotangent(values))


def _cotangent(values: Array) -> Array:
    return jnp.linspace(0.5, 1.5, values.size, dtype=values.dtype).reshape(values.shape)
