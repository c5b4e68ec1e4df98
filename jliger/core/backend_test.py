"""Which backend runs where, and compiling for a GPU that is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.core import backend as platform
from jliger.testing.oracle import ON_GPU, equations


def loss(hidden, kernel):
    return jliger.fused_linear_cross_entropy(hidden, kernel, jnp.zeros(hidden.shape[0], jnp.int32))


def kernels_in(function, *args):
    """The Triton kernels that a program calls, interpreted or not."""
    names = [e.primitive.name for e in equations(jax.make_jaxpr(function)(*args))]
    return sum(name in ("triton_kernel_call", "pure_callback") for name in names)


ARGS = jnp.ones((3, 4)), jnp.ones((4, 5))


def test_the_default_fits_the_device():
    assert platform.fitting_implementation() == ("triton" if ON_GPU else "xla")
    assert bool(kernels_in(loss, *ARGS)) == ON_GPU


def test_on_a_default_device_of_another_kind():
    with jax.default_device(jax.devices("cpu")[0]):
        assert platform.fitting_implementation() == "xla"


def test_a_compute_capability_means_triton():
    assert platform.target_compute_capability() is None
    with jliger.compute_capability(90):
        assert platform.fitting_implementation() == "triton"
        assert platform.target_compute_capability() == 90
        with jliger.compute_capability(100):
            assert platform.target_compute_capability() == 100
        assert platform.target_compute_capability() == 90
    assert platform.target_compute_capability() is None


def test_what_was_traced_outside_is_not_reused_inside():
    jitted = jax.jit(loss)
    before = jitted(*ARGS)
    with jliger.compute_capability(80):
        assert kernels_in(jitted, *ARGS) == 1
    assert bool(kernels_in(jitted, *ARGS)) == ON_GPU
    np.testing.assert_array_equal(jitted(*ARGS), before)


@pytest.mark.parametrize("capability", [9.0, "90", 9, 79, 1000, None])
def test_what_is_no_compute_capability(capability):
    with pytest.raises(ValueError, match=rf"compute_capability got {capability!r}; .*90 for an H100"):
        jliger.compute_capability(capability)


def test_without_triton_the_default_is_xla(monkeypatch):
    monkeypatch.setattr(platform, "has_triton", lambda: False)
    assert platform.fitting_implementation() == "xla"
