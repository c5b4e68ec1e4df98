"""Losses of tokens and rows for tests, and `jliger.fused_linear_loss` over full logits. Not part of the wheel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jliger
from jliger.testing.oracle import assert_rule_of_two


def token_loss(result: jliger.LinearLogprobs, weight: Array, more: Array) -> Any:
    """Depends on everything in `result`, and on arguments `[]` and `[2]`."""
    loss = weight * jnp.exp(result.logprobs / 2) * result.logsumexp + jax.nn.softplus(more[0] * result.logprobs)
    return loss + more[1] * result.entropy**2, {"logprobs": result.logprobs, "flags": result.predictions == 3}


def row_loss(result: jliger.LinearLogprobs, weight: Array, more: Array) -> Any:
    """Depends on everything in `result`, and on arguments `[]` and `[*row]`; its tokens depend on each other."""
    mask = result.predictions >= 0
    mean = result.logprobs.sum() / jnp.maximum(mask.sum(), 1)
    largest = jnp.where(mask, result.logsumexp, -10).max()
    loss = weight * jax.nn.softplus(-mean) + jnp.tanh(result.entropy * more).sum() * mean + largest
    return loss, (mean, mask)


def reference_loss(loss_fn: Any, hidden: Any, kernel: Any, labels: Any, args: Any, **options: Any) -> Any:
    """`jliger.fused_linear_loss` with `has_aux`, in plain JAX over full logits."""
    units = options.pop("units")
    result = jliger.reference.linear_logprobs(hidden, kernel, labels, **options)
    mapped = loss_fn
    for _ in range(labels.ndim if units == "tokens" else 1):
        mapped = jax.vmap(mapped)
    losses, aux = mapped(result, *args)
    counted = (result.predictions >= 0).reshape(*losses.shape, -1).any(axis=-1)

    def masked(array: Array) -> Array:
        return jnp.where(jnp.expand_dims(counted, range(counted.ndim, array.ndim)), array, 0)

    return masked(losses).sum(), jax.tree.map(masked, aux)


def values_and_grads(function: Any, loss_fn: Any, inputs: Any, labels: Any, args: Any, **options: Any) -> Any:
    """The loss, the auxiliary arrays and every input's gradient, by name; the loss's cotangent is 0.7."""

    def loss(inputs: Any) -> Any:
        adapter = jliger.LinearAdapter(inputs["a"], inputs["b"], 0.5) if "a" in inputs else None
        return function(
            loss_fn,
            inputs["hidden"],
            inputs["kernel"],
            labels,
            args,
            bias=inputs.get("bias"),
            adapter=adapter,
            **options,
        )

    value, pull_back, aux = jax.vjp(loss, inputs, has_aux=True)
    return {"loss": value, **{f"aux {index}": leaf for index, leaf in enumerate(jax.tree.leaves(aux))}} | {
        f"d {name}": grad for name, grad in pull_back(jnp.asarray(0.7, value.dtype))[0].items()
    }


def fused(*arguments: Any, **options: Any) -> Any:
    return jliger.fused_linear_loss(*arguments, has_aux=True, **options)


def make(
    shape: tuple[int, ...], units: str, dtype: str = "float32", *, seed: int = 0, rank: int = 0, **sizes: int
) -> Any:
    """Inputs, labels, arguments and a mask of which six in ten are true. The second row has no token that counts."""
    random = np.random.default_rng(seed)
    features, vocab = sizes.get("features", 6), sizes.get("vocab", 11)
    shapes = {"hidden": (*shape, features), "kernel": (features, vocab), "bias": (vocab,)}
    if rank:
        shapes |= {"a": (features, rank), "b": (rank, vocab)}
    inputs = {name: jnp.asarray(random.normal(size=size) / 2, dtype) for name, size in shapes.items()}
    of_units = (shape, (*shape, 2)) if units == "tokens" else (shape[:1], shape)
    args = tuple(jnp.asarray(random.normal(size=size), jnp.float32) for size in of_units)
    where = jnp.asarray(random.random(shape) < 0.6)
    where = where.at[1:2].set(False) if shape else where
    return inputs, jnp.asarray(random.integers(0, vocab, shape)), args, where


def check(loss_fn: Any, inputs: Any, labels: Any, args: Any, *, units: str, implementation: Any, **options: Any) -> Any:
    """The rule of two, for values and gradients; `chunk_size` is not the reference's."""

    def results(function: Any, *arrays: Any, **options: Any) -> Any:
        jitted = jax.jit(lambda *arrays: values_and_grads(function, loss_fn, *arrays, units=units, **options))
        return jitted(*arrays)

    ours = results(fused, inputs, labels, args, implementation=implementation, **options)
    options = {name: value for name, value in options.items() if name != "chunk_size"}
    theirs = results(reference_loss, inputs, labels, args, **options)
    with jax.enable_x64(True):
        in_float64 = jax.tree.map(lambda array: jnp.asarray(np.asarray(array), jnp.float64), (inputs, args))
        oracle = results(reference_loss, in_float64[0], labels, in_float64[1], **options)
        oracle = {name: np.asarray(value, np.float64) for name, value in oracle.items()}
    half_unit = float(jnp.finfo(inputs["hidden"].dtype).eps) / 2
    assert_rule_of_two(ours, theirs, oracle, str(options), {"d bias": 2 * half_unit * labels.size**0.5})
    return ours
