"""8-bit products on meshes: each device has scales of its own, and the errors are no larger."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import IMPLEMENTATION, ROUNDING

import jliger
from jliger.testing.oracle import INTERPRETED


def _loss(products, hidden, kernel, labels):
    return jliger.fused_linear_cross_entropy(hidden, kernel, labels, products=products, implementation=IMPLEMENTATION)


def _logprobs(products, hidden, kernel, labels):
    result = jliger.linear_logprobs(hidden, kernel, labels, products=products, implementation=IMPLEMENTATION)
    cotangents = jnp.sin(jnp.arange(labels.size) + 1.0)
    return jnp.sum(cotangents * result.logprobs - 0.1 * result.entropy)


@pytest.mark.skipif(jax.device_count() % 4 != 0, reason="made for 4 or 8 devices")
@pytest.mark.parametrize(
    ("mode", "spec", "loss", "products"),
    [
        (AxisType.Auto, P(None, "v"), _loss, "float8"),
        (AxisType.Explicit, P("d", "v"), _loss, "float8"),
        pytest.param(AxisType.Auto, P("d", "v"), _loss, "float8_forward", marks=pytest.mark.exhaustive),
        pytest.param(AxisType.Explicit, P(None, "v"), _loss, "float8_forward", marks=pytest.mark.exhaustive),
        (AxisType.Auto, P("d", "v"), _logprobs, "float8"),
        pytest.param(AxisType.Explicit, P(None, "v"), _logprobs, "float8", marks=pytest.mark.exhaustive),
        pytest.param(AxisType.Auto, P("d", "v"), _logprobs, "float8_forward", marks=pytest.mark.exhaustive),
    ],
)
def test_results_are_as_exact_as_on_one_device(mode, spec, loss, products):
    if INTERPRETED and mode is AxisType.Auto:
        pytest.skip("interpreted kernels don't run with Auto axes: see MODES")
    random = np.random.default_rng(0)
    arrays = (
        jnp.asarray(random.normal(size=(32, 16)), jnp.float32),
        jnp.asarray(random.normal(size=(16, 64)) / 4, jnp.float32),
        jnp.asarray(random.integers(0, 64, 32), jnp.int32),
    )
    gradients = jax.jit(jax.value_and_grad(functools.partial(loss, products), (0, 1)))
    expected = gradients(*arrays), jax.jit(jax.value_and_grad(functools.partial(loss, None), (0, 1)))(*arrays)
    mesh = jax.make_mesh((jax.device_count() // 2, 2), ("d", "v"), axis_types=(mode, mode))
    specs = P("d"), spec, P("d")
    arrays = [jax.device_put(array, NamedSharding(mesh, its)) for array, its in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh):
        found = gradients(*arrays)
    assert abs(found[0] - expected[0][0]) < ROUNDING
    for ours, on_one, exact in zip(found[1], expected[0][1], expected[1][1], strict=True):
        error = np.linalg.norm(on_one - exact)
        assert 0 < error < 0.05 * np.linalg.norm(exact)
        assert np.linalg.norm(ours - exact) < 1.3 * error
    assert found[1][1].sharding.is_equivalent_to(arrays[1].sharding, 2)
