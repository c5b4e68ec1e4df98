"""What holds for any shapes, dtypes and options."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jliger.testing.oracle import DTYPES, EXAMPLES, check, fused, make_problem

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st


def examples(count):
    """Each example is a compilation; the same ones every time. .ci/exhaustive asks for more of them."""
    return settings(
        max_examples=count * EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "batch": st.lists(st.integers(1, 7), max_size=3).map(tuple),
        "hidden_size": st.integers(1, 20),
        "vocab": st.integers(2, 70),
        "kernel_layout": st.sampled_from(["hv", "vh"]),
        "chunk_size": st.none() | st.integers(1, 40),
        "where": st.sampled_from([None, "all", "some", "none"]),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
        "ignore_index": st.sampled_from([-100, -1, 0, 10**6]),
        "weights": st.booleans(),
        "bias": st.sampled_from([None, "float32"]),
    }
)
losses = st.fixed_dictionaries(
    {
        "logit_scale": st.sampled_from([1.0, 0.125, -0.5]),
        "logit_softcap": st.sampled_from([None, 1.0, 30.0]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 1e-4, 0.5]),
        "class_weights": st.booleans(),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "return_metrics": st.booleans(),
    }
)


@examples(4)
@given(shape=shapes, loss=losses, dtypes=st.sampled_from(DTYPES), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_rule_of_two(implementation, shape, loss, dtypes, scale):
    # Roundings to 16 bits are throws of dice: of a few, either side may win by more than a factor of two.
    assume(dtypes[0] == "float32" or math.prod(shape["batch"]) * shape["hidden_size"] >= 32)
    precision = "highest" if dtypes[0] == "float32" else None
    problem = make_problem(dtype=dtypes[0], kernel_dtype=dtypes[1], scale=scale, precision=precision, **shape, **loss)
    check(problem, implementation)


@pytest.mark.exhaustive
@examples(3)
@given(seed=st.integers(0, 2**16), tokens=st.integers(2, 30), reduction=st.sampled_from(["mean", "none"]))
def test_the_order_of_tokens_is_nothing(implementation, seed, tokens, reduction):
    problem = make_problem(
        seed, batch=(tokens,), ignored=0.3, bias="float32", chunk_size=8, reduction=reduction, precision="highest"
    )
    order = np.random.default_rng(seed).permutation(tokens)
    cotangent = problem.cotangent[order] if reduction == "none" else problem.cotangent
    permuted = problem.replace(
        inputs={**problem.inputs, "hidden": problem.inputs["hidden"][order]},
        labels=problem.labels[order],
        cotangent=cotangent,
    )
    one, other = fused(problem, implementation), fused(permuted, implementation)
    one["hidden"] = one["hidden"][order]
    if reduction == "none":
        one["loss"] = one["loss"][order]
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=3e-6, err_msg=name)


@pytest.mark.exhaustive
@examples(3)
@given(seed=st.integers(0, 2**16), vocab=st.integers(2, 60), reduction=st.sampled_from(["mean", "none"]))
def test_the_order_of_columns_is_nothing(implementation, seed, vocab, reduction):
    problem = make_problem(
        seed, vocab=vocab, bias="float32", class_weights=True, label_smoothing=0.1, reduction=reduction,
        precision="highest",
    )  # fmt: skip
    order = np.random.default_rng(seed).permutation(vocab)
    permuted = problem.replace(
        inputs={
            **problem.inputs,
            "kernel": problem.inputs["kernel"][:, order],
            "bias": problem.inputs["bias"][order],
        },
        labels=jnp.asarray(np.argsort(order))[problem.labels],
        class_weights=problem.options["class_weights"][order],
    )
    one, other = fused(problem, implementation), fused(permuted, implementation)
    one["kernel"], one["bias"] = one["kernel"][:, order], one["bias"][order]
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=3e-6, err_msg=name)


@examples(3)
@given(seed=st.integers(0, 2**16), shift=st.floats(-30, 30, width=16))
def test_a_shift_of_all_logits_is_nothing(implementation, seed, shift):
    problem = make_problem(seed, bias="float32", label_smoothing=0.2, precision="highest")
    shifted = problem.replace(inputs={**problem.inputs, "bias": problem.inputs["bias"] + shift})
    one, other = fused(problem, implementation), fused(shifted, implementation)
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=2e-5, err_msg=name)
    # Gradients of each token's logits sum to 0.
    np.testing.assert_allclose(one["bias"].sum(), 0, atol=1e-5)
