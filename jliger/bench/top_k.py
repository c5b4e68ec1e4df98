"""The benchmark of the largest logits, and of distillation from them: time beside the products that they need."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jliger
from jliger import losses, reference
from jliger.bench.head import CPU_SHAPE, MAIN
from jliger.bench.methods import DTYPES, bound, forward_bound
from jliger.bench.problem import ONE, THREE, Method, Problem, Shape, head_floors, hidden_dtype, operands

COLUMNS = 128  # of the teacher, for each token


def problems() -> list[Problem]:
    on_gpu = jax.default_backend() == "gpu"
    shape = MAIN if on_gpu else CPU_SHAPE
    return [Problem(shape, functools.partial(_operands, shape), head_floors(shape), _methods(shape, on_gpu=on_gpu))]


def _operands(shape: Shape, kernel_dtype: str) -> tuple[Array, ...]:
    """The head's arrays, and a teacher's columns with all of its probability but a tenth."""
    keys = jax.random.split(jax.random.key(4))
    # Spread over the vocabulary, as the most likely tokens are, and each once.
    stride = shape.vocab // COLUMNS
    ids = jnp.arange(COLUMNS) * stride + jax.random.randint(keys[0], (shape.tokens, COLUMNS), 0, stride)
    logprobs = jax.nn.log_softmax(2 * jax.random.normal(keys[1], ids.shape)) + jnp.log(0.9)
    return (*operands(shape, hidden_dtype(), kernel_dtype), ids, logprobs)


def _methods(shape: Shape, *, on_gpu: bool) -> list[Method]:
    result: list[Method] = []
    for dtype in DTYPES if on_gpu else ("float32",):
        least = forward_bound(shape, dtype)
        alone = f"log-probabilities of labels, {dtype} kernel"
        result.append(Method(alone, _logprobs, dtype, ONE, least))
        result += [
            Method(f"the {k} largest logits, {dtype} kernel", _top_k(k), dtype, ONE, least, baseline=alone)
            for k in (64, 256)
        ]
    plain = functools.partial(_top_k, function=reference.linear_top_k)
    result.append(Method("the 64 largest logits, plain JAX (jliger.reference)", plain(64), floor=ONE))
    for dtype in DTYPES if on_gpu else ("float32",):
        step = _loss_and_gradients(losses.fused_linear_top_k_kl)
        result.append(Method(f"KL, {dtype} kernel", step, dtype, THREE, bound(shape)))
    for name, options in {
        "with the remainder": {"remainder": True},
        "over the top k": {"normalize": "top_k"},
        "with labels, temperature 2": {"hard_weight": 0.5, "temperature": 2.0},
    }.items():
        step = _loss_and_gradients(losses.fused_linear_top_k_kl, **options)
        result.append(Method(f"KL {name}, float32 kernel", step, bound=bound(shape)))
    step = _loss_and_gradients(reference.fused_linear_top_k_kl)
    result.append(Method("KL, plain JAX (jliger.reference)", step))
    cross_entropy = _loss_and_gradients(lambda hidden, kernel, *_, labels: _cross_entropy(hidden, kernel, labels))
    return [*result, Method("cross entropy, float32 kernel", cross_entropy, bound=bound(shape))]


def _logprobs(hidden: Array, kernel: Array, labels: Array, *teacher: Array) -> Any:
    del teacher
    return jliger.linear_logprobs(hidden, kernel, labels).logprobs


def _top_k(k: int, function: Callable[..., Any] = jliger.linear_top_k) -> Callable[..., Any]:
    return lambda hidden, kernel, *_: function(hidden, kernel, k)


def _cross_entropy(hidden: Array, kernel: Array, labels: Array | None) -> Any:
    assert labels is not None
    return jliger.fused_linear_cross_entropy(hidden, kernel, labels)


def _loss_and_gradients(loss: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Loss and gradients with respect to hidden states and kernel."""

    def function(hidden: Array, kernel: Array, labels: Array, *teacher: Array) -> Any:
        return jax.value_and_grad(lambda *student: loss(*student, *teacher, labels=labels, **options), (0, 1))(
            hidden, kernel
        )

    return function
