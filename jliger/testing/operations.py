"""The rule of two for operations that are plain functions of arrays. Not part of the wheel."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jliger.testing.oracle import assert_rule_of_two


def random(seed: int, *shape: int, dtype: Any = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def results_and_grads(function: Callable[..., Any], inputs: dict[str, Any], cotangents: Any) -> dict[str, Any]:
    """The results of `function(**inputs)`, and the gradients of its inputs by name."""
    results, pull_back = jax.vjp(lambda inputs: function(**inputs), inputs)
    like = jax.tree.map(lambda cotangent, result: cotangent.astype(result.dtype), cotangents, results)
    named = {f"result {index}": result for index, result in enumerate(jax.tree.leaves(results))}
    return {**named, **pull_back(like)[0]}


def check_operation(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: dict[str, Any], what: str = ""
) -> dict[str, Any]:
    """Holds an operation to the rule of two, with random cotangents; returns what it computed.

    `reference` runs in the inputs' dtypes and in float64. With 16-bit inputs it runs op by op, so that XLA cannot leave
    out roundings.
    """
    shapes = jax.eval_shape(lambda inputs: function(**inputs), inputs)
    cotangents = jax.tree.map(lambda shape: random(99, *shape.shape), shapes)
    ours = jax.jit(lambda *args: results_and_grads(function, *args))(inputs, cotangents)
    plain = functools.partial(results_and_grads, reference)
    has_16_bits = any(value.dtype.itemsize == 2 for value in inputs.values())
    theirs = (plain if has_16_bits else jax.jit(plain))(inputs, cotangents)
    with jax.enable_x64(True):
        in_float64 = jax.tree.map(lambda array: jnp.asarray(np.asarray(array), jnp.float64), (inputs, cotangents))
        oracle = {name: np.asarray(value) for name, value in jax.jit(plain)(*in_float64).items()}
    assert_rule_of_two(ours, theirs, oracle, what)
    for name, value in inputs.items():
        assert ours[name].dtype == value.dtype, name
    return ours


def saved_bytes(function: Callable[..., Any], *inputs: Any) -> int:
    """The bytes that `function` keeps for its backward pass."""
    saved = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *inputs)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))
