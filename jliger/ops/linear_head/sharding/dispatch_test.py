"""Tests of meshes that need only one device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import jliger


@pytest.mark.parametrize(
    "axis_types", [(AxisType.Auto, AxisType.Auto), (AxisType.Explicit, AxisType.Explicit)], ids=str
)
def test_a_mesh_of_one_device_changes_nothing(axis_types):
    hidden = jax.random.normal(jax.random.key(0), (6, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, 16))
    labels = jnp.arange(6)
    function = jax.value_and_grad(jliger.fused_linear_cross_entropy, (0, 1))
    expected = function(hidden, kernel, labels)
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), axis_types=axis_types)):
        result = jax.jit(function)(hidden, kernel, labels)
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert jnp.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_axes_of_two_types_are_refused():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match=r"'data'.*'model'.*one type"):
        jliger.fused_linear_cross_entropy(jnp.ones((4, 8)), jnp.ones((8, 16)), jnp.zeros((4,), jnp.int32))
