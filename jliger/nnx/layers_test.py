"""Norms and gated blocks of Flax NNX and Linen give what Flax's own give, with the same parameters and dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jliger
from jliger.testing.operations import random
from jliger.testing.oracle import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="is about the code around the kernels")

WIDTH = 8
NORMS = [("RMSNorm", {}), ("RMSNorm", {"use_scale": False}), ("LayerNorm", {}), ("LayerNorm", {"use_bias": False})]
# The input, dtype and param_dtype.
DTYPES = [
    ("bfloat16", None, "float32"),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", None, "bfloat16"),
]
X = 2 * random(0, 3, 4, WIDTH) + 0.5


@pytest.fixture(autouse=True)
def float32_products():
    """On GPUs too, where TensorFloat-32 would be further off than what is allowed here."""
    with jax.default_matmul_precision("highest"):
        yield


def in_nnx(library, name, options, x):
    """The result, and gradients by input and parameters."""
    module = getattr(library, name)(WIDTH, rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(module)
    params = jax.tree.map(lambda param: param + random(1, WIDTH, dtype=param.dtype), params)

    def call(x, params):
        return nnx.merge(graphdef, params)(x)

    return results(call, x, nnx.to_pure_dict(params), params)


def in_linen(library, name, options, x):
    module = getattr(library, name)(**options)
    params = module.init(jax.random.key(0), x)
    params = jax.tree.map(lambda param: param + random(1, WIDTH, dtype=param.dtype), params)
    return results(lambda x, params: module.apply(params, x), x, params, params)


def results(call, x, names, params):
    result, pull_back = jax.vjp(call, x, params)
    return result, jax.tree.leaves(pull_back(random(2, *x.shape, dtype=result.dtype))), list(map(str, names))


@pytest.mark.parametrize(
    ("name", "more", "dtypes"),
    [
        pytest.param(*norm, dtypes, marks=[] if (number + turn) % 3 == 0 else [pytest.mark.exhaustive])
        for number, norm in enumerate(NORMS)
        for turn, dtypes in enumerate(DTYPES)
    ],
)
@pytest.mark.parametrize(("run", "ours", "flax"), [(in_nnx, jliger.nnx, nnx), (in_linen, jliger.linen, nn)])
def test_norms_are_those_of_flax(run, ours, flax, name, more, dtypes):
    options = {"dtype": dtypes[1], "param_dtype": jnp.dtype(dtypes[2]), **more}
    x = X.astype(dtypes[0])
    result, grads, names = run(ours, name, options, x)
    expected, expected_grads, expected_names = run(flax, name, options, x)
    assert (result.dtype, names) == (expected.dtype, expected_names)
    # Flax's variance, E[x²] − E[x]², loses some bits.
    rounding = 8 * float(jnp.finfo(result.dtype).eps)
    for one, other in zip([result, *grads], [expected, *expected_grads], strict=True):
        assert one.dtype == other.dtype
        # Gradients may also be rounded where Flax rounds values in between.
        least = rounding if one is result else max(rounding, 8 * float(jnp.finfo(other.dtype).eps))
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= least * np.linalg.norm(other)


@pytest.mark.parametrize(("ours", "flax"), [(jliger.nnx, nnx), (jliger.linen, nn)])
def test_what_only_flax_computes(ours, flax):
    mask = jnp.arange(WIDTH) < 5
    arguments = (WIDTH,) if flax is nnx else ()
    rngs = {"rngs": nnx.Rngs(0)} if flax is nnx else {}
    results = []
    for library in (ours, flax):
        norm = library.RMSNorm(*arguments, **rngs)
        call = norm if flax is nnx else functools.partial(norm.apply, norm.init(jax.random.key(0), X))
        results.append(call(X, mask=mask))
    np.testing.assert_array_equal(*results)


def test_a_narrow_input_is_saved_narrow():
    norm = jliger.nnx.RMSNorm(WIDTH, rngs=nnx.Rngs(0))
    saved = jax.eval_shape(lambda x: jax.vjp(norm, x)[1], X.astype("bfloat16"))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved)]
    assert max(sizes) == X.size * 2


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_gated_blocks_in_chunks_or_not(dtype):
    found = []
    for chunked in (True, False):
        options = {"activation": "gelu_tanh", "chunked": chunked, "chunk_size": 5, "dtype": dtype}
        block = jliger.nnx.GatedMLP(WIDTH, 16, rngs=nnx.Rngs(0), **options)
        in_linen = jliger.linen.GatedMLP(16, **options)
        kernels = {name: {"kernel": getattr(block, name).kernel[...]} for name in ("gate_proj", "up_proj", "down_proj")}
        shapes = jax.eval_shape(in_linen.init, jax.random.key(0), X)
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, {"params": kernels})

        def in_nnx(x, kernels, block=block):
            graphdef, state = nnx.split(block)
            nnx.replace_by_pure_dict(state, kernels)
            return nnx.merge(graphdef, state)(x)

        def of_linen(x, kernels, module=in_linen):
            return module.apply({"params": kernels}, x)

        for call in (in_nnx, of_linen):
            result, pull_back = jax.vjp(call, X, kernels)
            assert result.dtype == (dtype or "float32")
            found.append(jax.tree.leaves((result, pull_back(random(3, *X.shape, dtype=result.dtype)))))
    least = 2e-2 if dtype else 1e-5
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert one.dtype == another.dtype
            one, another = np.asarray(one, np.float64), np.asarray(another, np.float64)
            assert np.linalg.norm(one - another) <= least * np.linalg.norm(one)
