"""Tests norms against float64, their roundings, and what they save."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.testing.operations import check_operation, random, saved_bytes
from jliger.testing.oracle import INTERPRETED


def plain_rms(x, scale, residual=None, *, scale_offset=0.0):
    total = x if residual is None else x + residual
    wide = total.astype(jnp.promote_types(x.dtype, jnp.float32))
    normalized = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    if scale_offset == 0 and scale.dtype == x.dtype:
        result = normalized.astype(x.dtype) * scale  # Llama
    else:
        result = (normalized * (scale_offset + scale.astype(wide.dtype))).astype(x.dtype)  # Gemma
    return result if residual is None else (result, total)


def plain_layer(x, scale, offset=None):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centered = wide - wide.mean(-1, keepdims=True)
    result = centered * jax.lax.rsqrt(jnp.mean(centered * centered, -1, keepdims=True) + 1e-6) * scale
    return (result if offset is None else result + offset).astype(x.dtype)


def norm_inputs(dtype="float32", scale_dtype="float32", shape=(3, 4, 12), **more):
    if INTERPRETED and "bfloat16" in (dtype, scale_dtype):
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    inputs = {"x": random(0, *shape, dtype=dtype) * 3 + 1, "scale": 1 + random(1, shape[-1], dtype=scale_dtype)}
    shapes = {"residual": (shape, dtype), "offset": (shape[-1:], scale_dtype)}
    return inputs | {name: random(2, *shapes[name][0], dtype=shapes[name][1]) for name, given in more.items() if given}


@pytest.mark.parametrize(
    ("dtypes", "scale_offset", "residual"),
    [
        (("float32", "float32"), 0.0, True),
        pytest.param(("float32", "float32"), 1.0, False, marks=pytest.mark.exhaustive),
        (("bfloat16", "bfloat16"), 0.0, False),
        (("bfloat16", "float32"), 1.0, True),
        (("float16", "float16"), 0.0, True),
        pytest.param(("float16", "float32"), 0.0, False, marks=pytest.mark.exhaustive),
    ],
)
def test_rms_norm_is_as_exact_as_plain_jax(dtypes, scale_offset, residual, implementation):
    ours = functools.partial(jliger.rms_norm, scale_offset=scale_offset, implementation=implementation)
    plain = functools.partial(plain_rms, scale_offset=scale_offset)
    check_operation(ours, plain, norm_inputs(*dtypes, residual=residual))


@pytest.mark.parametrize(
    ("dtypes", "offset"),
    [
        (("bfloat16", "float32"), True),
        (("float16", "float16"), True),
        pytest.param(("float32", "float32"), False, marks=pytest.mark.exhaustive),
    ],
)
def test_layer_norm_is_as_exact_as_plain_jax(dtypes, offset, implementation):
    ours = functools.partial(jliger.layer_norm, implementation=implementation)
    check_operation(ours, plain_layer, norm_inputs(*dtypes, offset=offset))


# With more rows than programs, each program of the backward pass adds up several rows.
@pytest.mark.parametrize(
    "shape", [(1, 37), (270, 3), *(pytest.param(one, marks=pytest.mark.exhaustive) for one in [(7,), (1, 1)])]
)
def test_ragged_sizes_and_one_row(shape, implementation):
    ours = functools.partial(jliger.layer_norm, implementation=implementation)
    check_operation(ours, plain_layer, norm_inputs(shape=shape, offset=True))


def test_no_rows(implementation):
    inputs = norm_inputs(shape=(0, 4))
    norm = functools.partial(jliger.rms_norm, implementation=implementation)
    assert norm(**inputs).shape == (0, 4)
    grads = jax.grad(lambda inputs: norm(**inputs).sum())(inputs)
    np.testing.assert_array_equal(grads["scale"], np.zeros(4))


@pytest.mark.parametrize("scale_offset", [0.0, 1.0])
def test_roundings_are_those_of_llama_and_gemma(scale_offset, implementation):
    dtype = "float16" if INTERPRETED else "bfloat16"
    inputs = norm_inputs(dtype, dtype, (64, 32))
    expected = plain_rms(**inputs, scale_offset=scale_offset)  # op by op
    result = jax.jit(functools.partial(jliger.rms_norm, scale_offset=scale_offset, implementation=implementation))
    # Sums of squares differ in their order, which may change a few last bits; a different rounding changes many.
    assert np.mean(np.asarray(result(**inputs)) != np.asarray(expected)) < 0.01
    other = plain_rms(inputs["x"], inputs["scale"].astype("float32"), scale_offset=scale_offset)
    if scale_offset == 0:
        assert np.mean(np.asarray(other) != np.asarray(expected)) > 0.05


def test_a_large_mean_does_not_cancel(implementation):
    inputs = {"x": random(0, 4, 64) + 1000, "scale": jnp.ones(64)}
    result = jliger.layer_norm(**inputs, implementation=implementation)
    wide = np.asarray(inputs["x"], np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(result, expected, atol=5e-4)


def test_only_inputs_and_two_numbers_per_row_are_saved(implementation):
    dtype = "float16" if INTERPRETED else "bfloat16"
    rows, width = 32, 64
    for norm, more, per_row in ((jliger.rms_norm, "residual", 4), (jliger.layer_norm, "offset", 8)):
        inputs = norm_inputs(dtype, dtype, (rows, width), **{more: True})
        saved = saved_bytes(lambda inputs, norm=norm: norm(**inputs, implementation=implementation), inputs)
        assert saved == rows * width * 2 + width * 2 + rows * per_row


# In a vmap, the scale is shared or not; examples that share it still have gradients of their own.
@pytest.mark.parametrize(
    "in_axes", [(0, None, None), (None, 0, 0), pytest.param((0, 0, None), marks=pytest.mark.exhaustive)]
)
def test_a_batch_is_a_loop(in_axes, implementation):
    x, scale, offset = random(0, 3, 4, 6), random(1, 3, 6), random(2, 3, 6)
    args = [array if axis == 0 else array[0] for array, axis in zip((x, scale, offset), in_axes, strict=True)]
    cotangent = random(3, 4, 6)

    def value_and_grads(*args):
        norm = functools.partial(jliger.layer_norm, implementation=implementation)
        result, pull_back = jax.vjp(norm, *args)
        return result, pull_back(cotangent)

    result = jax.jit(jax.vmap(value_and_grads, in_axes))(*args)
    for index in range(3):
        member = [array[index] if axis == 0 else array for array, axis in zip(args, in_axes, strict=True)]
        of_batch = jax.tree.map(lambda array, index=index: array[index], result)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), of_batch, value_and_grads(*member)
        )


def test_in_a_remat_and_a_scan(implementation):
    inputs = norm_inputs(residual=True)

    def steps(norm, x, scale, residual):
        def body(carry, _):
            x, scale = carry
            result, total = norm(x, scale, residual=residual)
            return (result + 0.1 * total, scale), None

        return jax.lax.scan(body, (x, scale), length=2)[0][0].sum()

    grads = []
    for wrap in (lambda norm: norm, jax.checkpoint):
        norm = wrap(functools.partial(jliger.rms_norm, implementation=implementation))
        grads.append(jax.jit(jax.grad(functools.partial(steps, norm), (0, 1, 2)))(*inputs.values()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), *grads)


def test_second_derivatives():
    inputs = norm_inputs(shape=(2, 3))

    def total(norm, scale):
        return (norm(inputs["x"], scale) ** 3).sum()

    def times_hessian(norm):
        grad = jax.grad(functools.partial(total, norm))
        return jax.jit(lambda scale: jax.jvp(grad, (scale,), (scale,))[1])(inputs["scale"])

    ours = functools.partial(jliger.rms_norm, implementation="xla")
    np.testing.assert_allclose(times_hessian(ours), times_hessian(plain_rms), rtol=1e-4, atol=1e-4)


def test_rows_are_loaded_ahead_where_they_fit():
    triton = pytest.importorskip("jliger.ops.norms.triton")
    at_most = {(8192, 6): 3, (16384, 4): 1, (8192, 8): 1, (1024, 12): 3}  # by columns and bytes per column
    assert {key: triton.backward_launch(4096, key[0], key[0] * key[1]).stages for key in at_most} == at_most
    assert triton.backward_launch(2, 1024, 4096).programs == 2


X, SCALE = jnp.ones((2, 4)), jnp.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, jnp.ones(3)), {}, ValueError, r"scale got shape \(3,\)"),
        ((X, SCALE.astype(int)), {}, TypeError, "scale got dtype int32"),
        ((X, SCALE), {"residual": X[0]}, ValueError, r"residual got shape \(4,\)"),
        ((X, SCALE), {"residual": X.astype("bfloat16")}, TypeError, "residual got dtype bfloat16"),
        ((X, SCALE), {"epsilon": -1.0}, ValueError, "epsilon got -1.0"),
        ((X, SCALE), {"scale_offset": jnp.ones(())}, TypeError, "scale_offset got"),
        ((jnp.ones(()), SCALE), {}, ValueError, r"x got shape \(\)"),
        ((X, SCALE), {"implementation": "cuda"}, ValueError, "implementation got 'cuda'"),
        (([1.0], SCALE), {}, TypeError, "x got a list"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jliger.rms_norm(*arguments, **options)


def test_what_the_kernels_do_not_take():
    wide = jnp.ones((1, 2**14 + 1))
    with jliger.compute_capability(90), jax.enable_x64(True):
        for x in (wide, jnp.ones((2, 4), "float64")):
            assert jliger.rms_norm(x, jnp.ones(x.shape[-1])).dtype == x.dtype
            with pytest.raises(ValueError, match="pass 'xla'"):
                jliger.rms_norm(x, jnp.ones(x.shape[-1]), implementation="triton")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_norm_is_that_of_the_rounded_sum(dtype, implementation):
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    random = np.random.default_rng(3)
    x, residual = (jnp.asarray(random.normal(size=(16, 128)), dtype) for _ in range(2))
    norm = jax.jit(functools.partial(jliger.rms_norm, scale=jnp.ones(128, dtype), implementation=implementation))
    result, total = norm(x, residual=residual)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_array_equal(result, norm(total))
