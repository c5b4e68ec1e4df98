"""Tests the choice of the backend, and compilation for a GPU that is not present."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jliger
from jliger.core import backend
from jliger.testing.launches import HAS_PLUGIN, launches
from jliger.testing.oracle import ON_GPU, equations

ARGS = jnp.sin(jnp.arange(12.0)).reshape(3, 4), jnp.cos(jnp.arange(20.0)).reshape(4, 5)
LABELS = jnp.array([0, 2, 4])


def loss(hidden, kernel, **options):
    return jliger.fused_linear_cross_entropy(hidden, kernel, LABELS, **options)


def value_and_grad(**options):
    return jax.jit(jax.value_and_grad(lambda *args: loss(*args, **options), (0, 1)))


def kernels_in(function, *args):
    """The number of Triton kernel calls in a program, interpreted or not."""
    # A new function, because JAX may have a cached trace of `function` from another test.
    names = [e.primitive.name for e in equations(jax.make_jaxpr(lambda *args: function(*args))(*args))]
    return sum(name in ("triton_kernel_call", "pure_callback") for name in names)


def seen_by_tracers(*args):
    """The backend that `implementation=None` means under `jit`."""
    choices = []
    jax.eval_shape(lambda *traced: choices.append(backend.fitting_implementation(*traced)), *args)
    return choices[0]


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture
def gpu(monkeypatch):
    """Sets the compute capability that the process detects, and whether Triton is installed."""

    def believe(capability, has_triton=True):
        monkeypatch.setattr(backend, "_present_capability", lambda: capability)
        monkeypatch.setattr(backend, "has_triton", lambda: has_triton)

    backend._warn_of_missing_triton.cache_clear()
    yield believe
    backend._warn_of_missing_triton.cache_clear()


def test_the_default_fits_the_device():
    assert backend.fitting_implementation(*ARGS) == ("triton" if ON_GPU else "xla")
    assert seen_by_tracers(*ARGS) == ("by platform" if ON_GPU else "xla")
    assert bool(kernels_in(loss, *ARGS)) == ON_GPU


def test_concrete_arrays_choose_by_their_device(gpu):
    gpu(90)
    on_cpu = jax.device_put(ARGS, jax.devices("cpu")[0])
    assert backend.fitting_implementation(*on_cpu) == "xla"
    assert seen_by_tracers(*ARGS) == "by platform"
    choices = []  # one of the arrays is not differentiated
    jax.grad(lambda one: choices.append(backend.fitting_implementation(one, on_cpu[1])) or one.sum())(on_cpu[0])
    assert choices == ["by platform"]


@pytest.mark.parametrize(("capability", "choice"), [(None, "xla"), (75, "xla"), (80, "by platform")])
def test_old_gpus_get_xla(gpu, capability, choice):
    gpu(capability)
    assert seen_by_tracers(*ARGS) == choice


def test_one_warning_of_a_gpu_without_triton(gpu):
    gpu(90, has_triton=False)
    with pytest.warns(UserWarning, match=r"not installed.*jliger\[cuda13\]"):
        assert kernels_in(loss, *ARGS) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels_in(loss, *ARGS) == 0
    backend._warn_of_missing_triton.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.fitting_implementation(*jax.device_put(ARGS, jax.devices("cpu")[0]))
        kernels_in(lambda *args: loss(*args, implementation="xla"), *ARGS)
        gpu(None, has_triton=False)
        kernels_in(loss, *ARGS)


@pytest.mark.skipif(ON_GPU, reason="jits for a CPU")
def test_a_program_for_a_cpu_beside_a_gpu(gpu):
    pytest.importorskip("jax_triton")
    gpu(90)
    assert kernels_in(value_and_grad(), *ARGS) == 1
    compiled = value_and_grad().lower(*ARGS).compile()
    assert "conditional" not in compiled.as_text()
    assert_equal(compiled(*ARGS), value_and_grad(implementation="xla")(*ARGS))
    # Kernels have no derivative. In a Hessian, the kernel only computes values; XLA computes the tangents.
    assert kernels_in(jax.hessian(loss), *ARGS) == 1


def test_both_branches_vary_over_the_same_axes():
    pytest.importorskip("jax_triton")
    mesh = jax.make_mesh((1, 1), ("data", "vocab"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = P("data"), P(None, "vocab")

    def step(hidden, kernel):
        def logprobs(hidden, kernel):
            result = jliger.linear_logprobs(hidden, kernel, LABELS, vocab_axis_name="vocab")
            return jax.lax.pmean((result.logprobs + result.entropy).mean(), "data")

        return jax.value_and_grad(logprobs, (0, 1))(hidden, kernel)

    sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), specs), check_vma=True)
    with jliger.compute_capability(90):
        assert kernels_in(sharded, *ARGS) == 2


def test_dtypes_that_triton_does_not_take():
    with jliger.compute_capability(90), jax.enable_x64(True):
        doubles = [array.astype(jnp.float64) for array in ARGS]
        assert kernels_in(loss, *doubles) == 0
        assert kernels_in(lambda *args: loss(*args, logits_dtype=jnp.float8_e5m2), *ARGS) == 0
        teacher = lambda *args: jliger.losses.fused_linear_kl(*ARGS, *args, logits_dtype=jnp.float8_e5m2)  # noqa: E731
        assert kernels_in(teacher, *ARGS) == 0


def export_for(platforms, **options):
    jax_triton = pytest.importorskip("jax_triton")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(jax_triton.CUSTOM_CALL_TARGET_NAME)]
    with jliger.compute_capability(90):
        return jax.export.export(value_and_grad(**options), platforms=platforms, disabled_checks=allowed)(*ARGS)


@pytest.mark.skipif(not HAS_PLUGIN, reason="lowering for a GPU needs jax-cuda13-plugin")
def test_one_export_for_cpu_and_gpu():
    kernels = {name: export_for(name.split()).mlir_module().count("@triton_kernel_call") for name in ("cpu", "cuda")}
    assert kernels == {"cpu": 0, "cuda": 1}
    exported = export_for(["cpu", "cuda"])
    module = exported.mlir_module()
    with_code = [line for line in module.splitlines() if "@triton_kernel_call" in line and "opaque" in line]
    assert [launch.name for launch in launches("\n".join(with_code))] == ["row_stats_and_grads_kernel"]
    on_cpu = jax.device_put(ARGS, jax.devices("cpu")[0])
    assert_equal(exported.call(*on_cpu), value_and_grad(implementation="xla")(*on_cpu))


@pytest.mark.skipif(not HAS_PLUGIN, reason="lowering for a GPU needs jax-cuda13-plugin")
def test_triton_by_name_does_not_run_on_a_cpu():
    with pytest.raises(NotImplementedError, match="Triton kernel got lowered for cpu; pass implementation=None"):
        export_for(["cpu"], implementation="triton")
    exported = export_for(["cpu", "cuda"], implementation="triton")
    with pytest.raises(jax.errors.JaxRuntimeError, match="triton_kernel_call"):
        exported.call(*jax.device_put(ARGS, jax.devices("cpu")[0]))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@jax.default_matmul_precision("highest")
def test_cpu_and_gpu_in_one_process():
    step = value_and_grad()
    for device in (jax.devices("cpu")[0], jax.devices("gpu")[0]):
        args = jax.device_put(ARGS, device)
        names = {"cpu": 0, "gpu": 1}
        assert step.lower(*args).as_text().count("@triton_kernel_call") == names[device.platform]
        found, expected = step(*args), value_and_grad(implementation="xla")(*args)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), found, expected)
        assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(found))
        # Without jit, the arrays' devices decide.
        np.testing.assert_allclose(loss(*args), expected[0], rtol=1e-4)


def test_a_compute_capability_means_triton():
    assert backend.target_compute_capability() is None
    with jliger.compute_capability(90):
        assert seen_by_tracers(*ARGS) == "by platform"
        assert backend.target_compute_capability() == 90
        with jliger.compute_capability(100):
            assert backend.target_compute_capability() == 100
        assert backend.target_compute_capability() == 90
    assert backend.target_compute_capability() is None


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
