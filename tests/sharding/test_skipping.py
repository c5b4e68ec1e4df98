"""Skipped gradients: each device approximates those of its own tokens."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import AXES, PLACES, ROUNDING

import jliger

# Only XLA's partitioner knows where Auto axes put an array; what it raises has the message of its callback.
ERRORS = {"auto": jax.errors.JaxRuntimeError, "explicit": NotImplementedError}
ROWS, LENGTH, HIDDEN, VOCAB, LIMIT = 8, 4, 16, 300, 0.02


@functools.cache
def arrays():
    """Hidden states that are near their labels' columns, the kernel, and labels."""
    random = np.random.default_rng(0)
    kernel = random.normal(size=(HIDDEN, VOCAB)).astype(np.float32)
    labels = random.integers(0, VOCAB, (ROWS, LENGTH))
    hidden = 0.6 * kernel.T[labels] + random.normal(size=(ROWS, LENGTH, HIDDEN)).astype(np.float32) / 2
    return hidden, kernel, labels


def loss(hidden, kernel, labels, **options):
    return jliger.fused_linear_cross_entropy(
        hidden,
        kernel,
        labels,
        skip_gradients_below=LIMIT,
        return_metrics=True,
        implementation="xla",
        **options,
    )


# The devices' parts don't depend on the kind of axes.
MODE = pytest.mark.parametrize("mode", [pytest.param("auto", marks=pytest.mark.exhaustive), "explicit"])


@MODE
def test_each_device_approximates_its_own_gradients(mode):
    hidden, kernel, labels = arrays()
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    mesh, tokens = PLACES["dp"].mesh(mode), P(AXES)
    with jax.set_mesh(mesh):
        placed = jax.device_put(
            (hidden, kernel, labels), tuple(NamedSharding(mesh, spec) for spec in (tokens, P(), tokens))
        )
        (_, metrics), (hidden_grad, kernel_grad) = step(*placed)
    alone = jax.jit(jax.value_and_grad(functools.partial(loss, reduction="sum"), (0, 1), has_aux=True))
    share = ROWS // jax.device_count()
    parts = [alone(hidden[i : i + share], kernel, labels[i : i + share]) for i in range(0, ROWS, share)]
    expected = np.concatenate([part[1][0] for part in parts]), np.sum([part[1][1] for part in parts], axis=0)
    for result, exact in zip((hidden_grad, kernel_grad), expected, strict=True):
        np.testing.assert_allclose(result, exact / labels.size, atol=ROUNDING * np.abs(exact).max(), rtol=0)
    skipped = np.mean([part[0][1].skipped_mass for part in parts])
    assert 0.01 < skipped < 0.9
    np.testing.assert_allclose(metrics.skipped_mass, skipped, rtol=1e-4)


@MODE
def test_a_sharded_vocabulary_is_refused(mode):
    hidden, kernel, labels = arrays()
    mesh = PLACES["tp"].mesh(mode)
    specs = P(), P(None, "model"), P()
    with jax.set_mesh(mesh):
        placed = jax.device_put((hidden, kernel, labels), tuple(NamedSharding(mesh, spec) for spec in specs))
        grad = jax.jit(jax.grad(lambda *args: loss(*args)[0], (0, 1)))
        with pytest.raises(ERRORS[mode], match="skip_gradients_below got a vocabulary that is sharded"):
            grad(*placed)
