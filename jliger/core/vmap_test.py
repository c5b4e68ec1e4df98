"""Tests that vmap over any of the arguments gives the results of a loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.testing.oracle import make_problem

BATCH = 3


def stacked(reduction):
    """A batch each of hidden states, kernels, biases, labels and masks."""
    problems = [
        make_problem(seed, batch=(7,), bias="float32", where="some", reduction=reduction, return_metrics=True)
        for seed in range(BATCH)
    ]
    return {
        **{name: jnp.stack([p.inputs[name] for p in problems]) for name in ("hidden", "kernel", "bias")},
        "labels": jnp.stack([p.labels for p in problems]),
        "where": jnp.stack([p.options["where"] for p in problems]),
    }


def make_loss(reduction, implementation):
    def loss(hidden, kernel, bias, labels, where):
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, labels, bias=bias, where=where, reduction=reduction, chunk_size=4, z_loss=0.1,
            label_smoothing=0.1, return_metrics=True, precision="highest", implementation=implementation,
        )  # fmt: skip

    return loss


def grad_of(loss):
    def total(hidden, kernel, bias, labels, where):
        value, metrics = loss(hidden, kernel, bias, labels, where)
        return jnp.sum(value * jnp.arange(1, 1 + value.size, dtype=value.dtype).reshape(value.shape)), metrics

    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)


@functools.cache
def of_a_member(reduction, implementation):
    """Loss, and loss with gradients, compiled once for all tests that compare with them."""
    loss = make_loss(reduction, implementation)
    return jax.jit(loss), jax.jit(grad_of(loss))


def assert_same(result, expected):
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


# Which of hidden, kernel, bias, labels and where are batched.
BATCHED = {
    "tokens": (0, None, None, 0, 0),
    "hidden states alone": (0, None, None, None, None),
    "labels alone": (None, None, None, 0, None),
    "the mask alone": (None, None, None, None, 0),
    "the kernel alone": (None, 0, None, None, None),
    "the bias alone": (None, None, 0, None, None),
    "everything": (0, 0, 0, 0, 0),
}
RARE = ("labels alone", "the mask alone", "the bias alone")


# The two forms alternate; both are tested if everything is batched.
@pytest.mark.parametrize(
    ("in_axes", "reduction"),
    [
        *(
            pytest.param(in_axes, reduction, marks=[pytest.mark.exhaustive] if name in RARE else [])
            for (name, in_axes), reduction in zip(BATCHED.items(), itertools.cycle(["mean", "none"]))
        ),
        (BATCHED["everything"], "none"),
    ],
    ids=[*BATCHED, "everything, per token"],
)
def test_a_batch_is_a_loop(in_axes, reduction, implementation):
    arrays = stacked(reduction)
    loss = make_loss(reduction, implementation)

    def member(index):
        return [a if axis is not None else b for a, b, axis in zip(
            (value[index] for value in arrays.values()), (value[0] for value in arrays.values()), in_axes, strict=True
        )]  # fmt: skip

    args = [value if axis is not None else value[0] for value, axis in zip(arrays.values(), in_axes, strict=True)]

    def stack(results):
        return jax.tree.map(lambda *parts: jnp.stack(parts), *results)

    one, one_grad = of_a_member(reduction, implementation)
    if in_axes == BATCHED["everything"]:
        # Without a gradient, too.
        assert_same(jax.jit(jax.vmap(loss, in_axes))(*args), stack([one(*member(i)) for i in range(BATCH)]))
    result = jax.jit(jax.vmap(grad_of(loss), in_axes))(*args)
    assert_same(result, stack([one_grad(*member(i)) for i in range(BATCH)]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_of_a_batch(reduction, implementation):
    # The losses of the batch share the kernel, so its gradient is their sum.
    arrays = stacked(reduction)
    loss = make_loss(reduction, implementation)
    shared = (arrays["kernel"][0], arrays["bias"][0])

    def of_batch(hidden, kernel, bias):
        values, _ = jax.vmap(loss, (0, None, None, 0, 0))(hidden, kernel, bias, arrays["labels"], arrays["where"])
        return jnp.sum(values * jnp.arange(1.0, 1 + values.size).reshape(values.shape))

    def of_loop(hidden, kernel, bias):
        values = jnp.stack(
            [loss(h, kernel, bias, y, w)[0] for h, y, w in zip(hidden, arrays["labels"], arrays["where"], strict=True)]
        )
        return jnp.sum(values * jnp.arange(1.0, 1 + values.size).reshape(values.shape))

    assert_same(*(jax.jit(jax.grad(f, (0, 1, 2)))(arrays["hidden"], *shared) for f in (of_batch, of_loop)))


def test_a_batch_of_batches(implementation):
    arrays = stacked("mean")
    loss = make_loss("mean", implementation)
    # The outer vmap batches kernels, the inner one tokens.
    inner = jax.vmap(grad_of(loss), (0, None, None, 0, 0))
    outer = jax.vmap(inner, (None, 0, 0, None, None))
    (result, _), grads = jax.jit(outer)(*arrays.values())
    _, one_grad = of_a_member("mean", implementation)
    for k, t in itertools.product(range(BATCH), repeat=2):
        member = [arrays[name][t if name in ("hidden", "labels", "where") else k] for name in arrays]
        (expected, _), expected_grads = one_grad(*member)
        assert_same((result[k, t], [grad[k, t] for grad in grads]), (expected, list(expected_grads)))


def test_other_axes(implementation):
    arrays = stacked("none")
    loss = make_loss("none", implementation)
    expected = jax.vmap(loss)(*arrays.values())[0]
    moved = [jnp.moveaxis(arrays[name], 0, -1) for name in ("hidden", "kernel")]
    rest = [arrays[name] for name in ("bias", "labels", "where")]
    result = jax.vmap(loss, (-1, -1, 0, 0, 0), out_axes=(1, 0))(*moved, *rest)[0]
    assert_same(result.T, expected)


def test_a_shared_kernel_is_read_once_for_all(implementation):
    # The batch becomes more tokens: the loss is one loop over all of them, not one loop per member.
    arrays = stacked("none")
    loss = make_loss("none", implementation)
    batch = jax.vmap(lambda h, y: loss(h, arrays["kernel"][0], arrays["bias"][0], y, jnp.full(y.shape, True))[0])
    joined = loss(
        arrays["hidden"].reshape(-1, 6), arrays["kernel"][0], arrays["bias"][0], arrays["labels"].reshape(-1),
        jnp.full((BATCH * 7,), True),
    )[0]  # fmt: skip
    assert_same(batch(arrays["hidden"], arrays["labels"]).reshape(-1), joined)
