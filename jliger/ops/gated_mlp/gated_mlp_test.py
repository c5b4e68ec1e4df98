"""Tests gated products and the block in chunks against float64, and what they save."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.testing.operations import check_operation, random, results_and_grads, saved_bytes
from jliger.testing.oracle import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="has no kernel")

PLAIN = {
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "gelu": lambda x: x * (1 + jax.lax.erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


@pytest.fixture(autouse=True)
def float32_products():
    """On GPUs too, where TensorFloat-32 would be further off than what is allowed here."""
    with jax.default_matmul_precision("highest"):
        yield


def plain_product(gate, up, *, activation):
    wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
    return (PLAIN[activation](wide) * up.astype(wide.dtype)).astype(gate.dtype)


def plain_mlp(x, gate_kernel, up_kernel, down_kernel, *, activation):
    gate, up, down = (kernel.astype(x.dtype) for kernel in (gate_kernel, up_kernel, down_kernel))
    return plain_product(x @ gate, x @ up, activation=activation) @ down


def mlp_inputs(dtype="float32", kernel_dtype="float32", lead=(3, 5), width=6, inner=10):
    return {
        "x": random(0, *lead, width, dtype=dtype),
        "gate_kernel": random(1, width, inner, dtype=kernel_dtype) / width**0.5,
        "up_kernel": random(2, width, inner, dtype=kernel_dtype) / width**0.5,
        "down_kernel": random(3, inner, width, dtype=kernel_dtype) / inner**0.5,
    }


OFTEN = [("silu", "bfloat16"), ("gelu", "float32"), ("gelu_tanh", "float16")]
RARE = [("silu", "float32"), ("gelu", "bfloat16"), ("gelu_tanh", "float32"), ("gelu_tanh", "bfloat16")]


@pytest.mark.parametrize(
    ("activation", "dtype"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in RARE)]
)
def test_products_are_as_exact_as_plain_jax(activation, dtype):
    approximate = {"approximate": activation == "gelu_tanh"} if activation != "silu" else {}
    ours = functools.partial(jliger.swiglu if activation == "silu" else jliger.geglu, **approximate)
    inputs = {"gate": 2 * random(0, 3, 7, dtype=dtype), "up": random(1, 3, 7, dtype=dtype)}
    check_operation(ours, functools.partial(plain_product, activation=activation), inputs)


@pytest.mark.parametrize(
    ("dtypes", "chunk_size", "activation"),
    [
        (("float32", "float32"), 4, "silu"),  # 15 tokens: three chunks and a rest
        (("bfloat16", "float32"), 5, "gelu_tanh"),
        pytest.param(("float16", "float16"), 100, "gelu", marks=pytest.mark.exhaustive),
    ],
)
def test_the_block_is_as_exact_as_plain_jax(dtypes, chunk_size, activation):
    ours = functools.partial(jliger.gated_mlp, chunk_size=chunk_size, activation=activation)
    check_operation(ours, functools.partial(plain_mlp, activation=activation), mlp_inputs(*dtypes))


@pytest.mark.parametrize("lead", [(0,), ()])
def test_no_token_and_one(lead):
    inputs = mlp_inputs(lead=lead)
    cotangent = random(5, *lead, 6)
    ours = results_and_grads(jliger.gated_mlp, inputs, cotangent)
    plain = results_and_grads(functools.partial(plain_mlp, activation="silu"), inputs, cotangent)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, plain)


def test_only_operands_are_saved():
    gate = random(0, 32, 64, dtype="bfloat16")
    assert saved_bytes(jliger.swiglu, gate, gate) == 2 * gate.nbytes
    inputs = mlp_inputs("bfloat16", "bfloat16", (64,))
    assert saved_bytes(lambda inputs: jliger.gated_mlp(**inputs), inputs) == sum(a.nbytes for a in inputs.values())


def test_memory_does_not_grow_with_tokens():
    def extra(tokens):
        inputs = mlp_inputs(lead=(tokens,), inner=256)
        grads = jax.grad(lambda inputs: (jliger.gated_mlp(**inputs, chunk_size=64) ** 2).sum())
        return jax.jit(grads).lower(inputs).compile().memory_analysis().temp_size_in_bytes

    # The result and its cotangent grow, `[tokens, 6]`, but no array `[tokens, 256]` exists.
    assert extra(2048) - extra(256) < 2 * (2048 - 256) * 4 * 8


# Kernels are shared by the examples of a vmap, or not.
@pytest.mark.parametrize("axis", [None, 0])
def test_a_batch_is_a_loop(axis):
    inputs = mlp_inputs(lead=(2, 5))
    if axis == 0:
        inputs["gate_kernel"] = jnp.stack([inputs["gate_kernel"], 2 * inputs["gate_kernel"]])
    in_axes = {"x": 0, "gate_kernel": axis, "up_kernel": None, "down_kernel": None}
    of_one = functools.partial(results_and_grads, functools.partial(jliger.gated_mlp, chunk_size=2))
    cotangent = random(5, 5, 6)
    result = jax.vmap(of_one, (in_axes, None))(inputs, cotangent)
    for index in range(2):
        own = {name: value if in_axes[name] is None else value[index] for name, value in inputs.items()}
        of_batch = jax.tree.map(lambda value, index=index: value[index], result)
        expected = of_one(own, cotangent)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), of_batch, expected)


def test_second_derivatives():
    inputs = mlp_inputs(lead=(3,), inner=2)

    def times_hessian(mlp):
        grad = jax.grad(lambda x: (mlp(**{**inputs, "x": x}) ** 2).sum())
        return jax.jit(lambda x, tangent: jax.jvp(grad, (x,), (tangent,))[1])(inputs["x"], random(5, 3, 6))

    plain = times_hessian(functools.partial(plain_mlp, activation="silu"))
    ours = times_hessian(functools.partial(jliger.gated_mlp, chunk_size=2))
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": jnp.ones((3, 7))}, ValueError, r"gate_kernel got shape \(6, 10\) for an x of \(3, 7\)"),
        ({"up_kernel": jnp.ones((6, 9))}, ValueError, "up_kernel got shape"),
        ({"down_kernel": jnp.ones((6, 10))}, ValueError, "down_kernel got shape"),
        ({"down_kernel": jnp.ones((10, 6), "bfloat16")}, TypeError, "down_kernel got dtype bfloat16"),
        ({"activation": "relu"}, ValueError, "activation got 'relu'"),
        ({"chunk_size": 0}, ValueError, "chunk_size got 0"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        jliger.gated_mlp(**{**mlp_inputs(), **changes})


def test_products_name_the_argument():
    with pytest.raises(ValueError, match=r"up got shape \(3,\)"):
        jliger.swiglu(jnp.ones(2), jnp.ones(3))
    with pytest.raises(TypeError, match="up got dtype bfloat16"):
        jliger.geglu(jnp.ones(2), jnp.ones(2, "bfloat16"))
