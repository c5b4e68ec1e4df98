"""Tests the loss of given logits against float64: it is that of a head whose kernel is the identity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.testing.operations import check_operation, random, saved_bytes
from jliger.testing.oracle import INTERPRETED

V, LEAD = 11, (3, 5)
RANDOM = np.random.default_rng(0)
LABELS = np.where(RANDOM.random(LEAD) < 0.2, -100, RANDOM.integers(0, V, LEAD)).astype(np.int32)
WEIGHTS, CLASS_WEIGHTS = (RANDOM.uniform(0.1, 2, shape).astype(np.float32) for shape in (LEAD, V))
WHERE, TEMPERATURE = RANDOM.random(LEAD) < 0.8, RANDOM.uniform(0.3, 3, LEAD).astype(np.float32)
EVERYTHING = {
    "where": WHERE,
    "weights": WEIGHTS,
    "class_weights": CLASS_WEIGHTS,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "logit_scale": 0.5,
    "logit_softcap": 4.0,
    "temperature": TEMPERATURE,
}


@pytest.fixture(autouse=True)
def float32_products():
    """On GPUs too, where TensorFloat-32 would be further off than what is allowed here."""
    with jax.default_matmul_precision("highest"):
        yield


def plain(logits, **options):
    kernel = jnp.eye(V, dtype=logits.dtype)
    return jliger.reference.fused_linear_cross_entropy(logits, kernel, LABELS, **options)


def logits_of(dtype="float32"):
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    return 3 * random(0, *LEAD, V, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"reduction": "none", **EVERYTHING}),
        ("bfloat16", EVERYTHING),
        ("float16", {"reduction": "sum", "label_smoothing": 0.2, "class_weights": CLASS_WEIGHTS}),
        pytest.param("float32", {}, marks=pytest.mark.exhaustive),
        pytest.param(
            "float32",
            {"normalizer": np.float32(7), "z_loss": 0.1, "class_weights": CLASS_WEIGHTS},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_as_exact_as_plain_jax(dtype, options, implementation):
    ours = functools.partial(jliger.softmax_cross_entropy, labels=LABELS, implementation=implementation, **options)
    check_operation(ours, functools.partial(plain, **options), {"logits": logits_of(dtype)})


def test_metrics(implementation):
    options = {"return_metrics": True, **EVERYTHING}
    _, metrics = jliger.softmax_cross_entropy(logits_of(), LABELS, implementation=implementation, **options)
    _, expected = plain(logits_of(), **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), metrics, expected)


def test_padding_columns_do_not_exist(implementation):
    logits = logits_of()
    padded = jnp.concatenate([logits, jnp.full((*LEAD, 5), 100.0)], -1)
    options = {"label_smoothing": 0.1, "implementation": implementation}
    loss = functools.partial(jliger.softmax_cross_entropy, labels=LABELS, **options)
    value, grads = jax.value_and_grad(functools.partial(loss, vocab_size=V))(padded)
    expected, expected_grads = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads[..., :V], expected_grads, rtol=1e-5, atol=1e-7)
    assert not grads[..., V:].any()
    assert np.isnan(loss(padded, labels=np.full(LEAD, V), vocab_size=V))


def test_nothing_counts_and_one_row(implementation):
    loss = functools.partial(jliger.softmax_cross_entropy, implementation=implementation)
    value, grads = jax.value_and_grad(loss)(logits_of(), np.full(LEAD, -100))
    assert value == 0
    assert not grads.any()
    row = logits_of()[0, 0]
    np.testing.assert_allclose(loss(row, 3), jax.nn.logsumexp(row) - row[3], rtol=1e-6)
    assert loss(row[None][:0], np.zeros(0, int)) == 0


def test_only_logits_and_two_numbers_per_token_are_saved(implementation):
    logits = 3 * random(0, 64, 128, dtype="float16")
    labels = np.zeros(64, np.int32)
    saved = saved_bytes(lambda x: jliger.softmax_cross_entropy(x, labels, implementation=implementation), logits)
    # Beside them: the column, validity and weight of each token, whether it counts, and a few scalars.
    assert saved <= logits.nbytes + 64 * (6 * 4 + 1) + 64


def test_a_batch_is_a_loop(implementation):
    logits, labels = logits_of(), np.maximum(LABELS, 0)
    grad = jax.value_and_grad(functools.partial(jliger.softmax_cross_entropy, implementation=implementation))
    result = jax.vmap(grad)(logits, labels)
    for index in range(LEAD[0]):
        expected = grad(logits[index], labels[index])
        of_batch = jax.tree.map(lambda array, index=index: array[index], result)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), of_batch, expected)


X, Y = jnp.ones((2, 4)), jnp.zeros(2, int)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, Y[:1]), {}, ValueError, r"labels got shape \(1,\)"),
        ((X, Y + 0.5), {}, TypeError, "labels got dtype float32"),
        ((X.astype(int), Y), {}, TypeError, "logits got dtype int32"),
        ((X, Y), {"vocab_size": 5}, ValueError, "vocab_size got 5"),
        ((X, Y), {"class_weights": jnp.ones(3)}, ValueError, r"class_weights got shape \(3,\)"),
        ((X, Y), {"label_smoothing": 2}, ValueError, "label_smoothing got 2"),
        ((X, Y), {"reduction": "max"}, ValueError, "reduction got 'max'"),
        ((X, Y), {"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer divides a mean"),
        ((X, Y), {"normalizer": 2j}, TypeError, "normalizer got dtype complex64; pass a real number"),
        ((X, Y), {"temperature": 0.0}, ValueError, "temperature got 0.0"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jliger.softmax_cross_entropy(*arguments, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_does_not_count_may_be_anything(reduction, implementation):
    logits = jnp.zeros((4, 5)).at[:, 0].set(-jnp.inf).at[3].set(jnp.finfo(jnp.float32).min)
    labels, temperature = jnp.array([1, 2, -100, -100]), jnp.array([1.0, 2.0, 0.0, 1.0])

    def loss(logits):
        options = {"temperature": temperature, "reduction": reduction, "implementation": implementation}
        return jliger.softmax_cross_entropy(logits, labels, **options).sum()

    value, grads = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, np.log(4) * (2 if reduction == "none" else 1), rtol=1e-6)
    np.testing.assert_array_equal(grads[2:], 0)
    assert np.isfinite(grads).all()
