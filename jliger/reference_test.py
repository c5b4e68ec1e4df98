"""Tests the reference and every implementation against values computed by hand and by optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jliger
from jliger.testing.oracle import IMPLEMENTATIONS


@pytest.fixture(params=["reference", *IMPLEMENTATIONS])
def loss_fn(request):
    if request.param == "reference":
        return jliger.reference.fused_linear_cross_entropy
    return functools.partial(jliger.fused_linear_cross_entropy, implementation=request.param)


def of_logits(loss_fn, logits, labels, **options):
    """The loss of given logits, passed as hidden states with an identity kernel."""
    logits = jnp.asarray(logits, jnp.float32)
    return loss_fn(logits, jnp.eye(logits.shape[-1]), jnp.asarray(labels), precision="highest", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(dtype, loss_fn):
    # log 1000 = 6.9077…, which bfloat16 would round to 6.90625.
    hidden, kernel = jnp.ones((3, 4), dtype), jnp.zeros((4, 1000), dtype)
    for options in ({}, {"label_smoothing": 0.3}, {"logit_softcap": 5.0}, {"reduction": "none"}):
        loss = loss_fn(hidden, kernel, jnp.asarray([0, 999, 7]), **options)
        np.testing.assert_allclose(loss, np.full(loss.shape, np.log(1000)), rtol=1e-6)


def test_gradients_at_uniform_logits(loss_fn):
    # dz = 1/4 − [v = label], divided by the 2 tokens.
    hidden, kernel = jnp.asarray([[1.0, 2], [3, 4]]), jnp.zeros((2, 4))

    def loss(hidden, kernel, bias):
        return loss_fn(hidden, kernel, jnp.asarray([0, 3]), bias=bias)

    by_hidden, by_kernel, by_bias = jax.grad(loss, (0, 1, 2))(hidden, kernel, jnp.zeros(4))
    np.testing.assert_array_equal(by_hidden, np.zeros((2, 2)))
    np.testing.assert_allclose(by_kernel, [[0, 0.5, 0.5, -1], [-0.25, 0.75, 0.75, -1.25]], atol=1e-6)
    np.testing.assert_allclose(by_bias, [-0.25, 0.25, 0.25, -0.25], atol=1e-6)


def test_two_columns_are_logistic_regression(loss_fn):
    x = np.array([-30.0, -3, 0, 0.5, 20], np.float32)
    logits = np.stack([x, np.zeros_like(x)], axis=1)
    labels = [0, 1, 0, 1, 0]
    sign = np.where(np.array(labels) == 0, -1.0, 1.0)
    loss = of_logits(loss_fn, logits, labels, reduction="none")
    np.testing.assert_allclose(loss, np.log1p(np.exp(sign * x)), rtol=2e-6, atol=1e-7)
    grad = jax.grad(lambda logits: of_logits(loss_fn, logits, labels, reduction="sum"))(jnp.asarray(logits))
    expected = sign / (1 + np.exp(-sign * x))
    np.testing.assert_allclose(grad, np.stack([expected, -expected], axis=1), rtol=2e-6, atol=1e-7)


def test_smoothing_by_hand(loss_fn):
    # Probabilities 1/2, 1/4, 1/4; with α = 0.3 the label has 0.8 and the others 0.1 each.
    logits = np.log([[2.0, 1, 1]])
    loss = of_logits(loss_fn, logits, [0], label_smoothing=0.3)
    np.testing.assert_allclose(loss, 0.8 * np.log(2) + 0.2 * np.log(4), rtol=1e-6)
    grad = jax.grad(lambda logits: of_logits(loss_fn, logits, [0], label_smoothing=0.3))(jnp.asarray(logits))
    np.testing.assert_allclose(grad, [[0.5 - 0.8, 0.25 - 0.1, 0.25 - 0.1]], rtol=1e-6)


def test_z_loss_by_hand(loss_fn):
    # lse = log 8: the z-loss is 0.5 · (log 8)², its gradient 2 · 0.5 · log 8 · p.
    logits = np.log([[4.0, 2, 2]])
    loss = of_logits(loss_fn, logits, [0], z_loss=0.5)
    np.testing.assert_allclose(loss, np.log(2) + 0.5 * np.log(8) ** 2, rtol=1e-6)
    grad = jax.grad(lambda logits: of_logits(loss_fn, logits, [0], z_loss=0.5))(jnp.asarray(logits))
    p = np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(grad, [p - [1, 0, 0] + np.log(8) * p], rtol=1e-6)


def test_softcap_and_scale_by_hand(loss_fn):
    # z = 2 tanh(3 x / 2); at x = 0 the other column has slope 3.
    x = 0.4
    z, slope = 2 * np.tanh(3 * x / 2), 3 * (1 - np.tanh(3 * x / 2) ** 2)
    options = {"logit_scale": 3.0, "logit_softcap": 2.0}
    loss, grad = jax.value_and_grad(lambda logits: of_logits(loss_fn, logits, [1], **options))(jnp.asarray([[x, 0.0]]))
    np.testing.assert_allclose(loss, np.log1p(np.exp(z)), rtol=1e-6)
    p = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(grad, [[p * slope, -p * 3]], rtol=1e-6)


def test_the_bias_is_capped_and_scaled_too(loss_fn):
    hidden, kernel, bias = jnp.zeros((1, 1)), jnp.zeros((1, 2)), jnp.asarray([5.0, 0])
    loss = loss_fn(hidden, kernel, jnp.asarray([0]), bias=bias, logit_scale=2.0, logit_softcap=3.0)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-3 * np.tanh(10 / 3))), rtol=1e-6)


def test_class_weights_by_hand(loss_fn):
    # PyTorch's mean: Σ w_y · nll / Σ w_y, with nll = log 2, log 4; the z-loss is a plain mean.
    logits = np.log([[2.0, 1, 1], [2.0, 1, 1]])
    w = jnp.asarray([3.0, 1, 0.5])
    loss = of_logits(loss_fn, logits, [0, 2], class_weights=w)
    np.testing.assert_allclose(loss, (3 * np.log(2) + 0.5 * np.log(4)) / 3.5, rtol=1e-6)
    with_z = of_logits(loss_fn, logits, [0, 2], class_weights=w, z_loss=1.0)
    np.testing.assert_allclose(with_z, loss + np.log(4) ** 2, rtol=1e-6)
    # In smoothing, each column has its own class weight: α/V · Σ_v w_v · nll_v.
    smooth = of_logits(loss_fn, logits[:1], [0], class_weights=w, label_smoothing=0.6, reduction="sum")
    spread = 3 * np.log(2) + 1 * np.log(4) + 0.5 * np.log(4)
    np.testing.assert_allclose(smooth, 0.4 * 3 * np.log(2) + 0.2 * spread, rtol=1e-6)


def test_reductions_by_hand(loss_fn):
    # The nlls are log 2, log 4, log 4; the last token does not count.
    logits = np.log([[2.0, 1, 1]] * 4)
    labels, weights = [0, 1, 2, -100], jnp.asarray([1.0, 2, 0.5, 9])
    nll = np.log([2, 4, 4])
    weighted = np.array([1, 2, 0.5]) * nll
    result = {
        reduction: of_logits(loss_fn, logits, labels, reduction=reduction, weights=weights)
        for reduction in ("mean", "sum", "none")
    }
    np.testing.assert_allclose(result["none"], [*weighted, 0], rtol=1e-6)
    np.testing.assert_allclose(result["sum"], weighted.sum(), rtol=1e-6)
    np.testing.assert_allclose(result["mean"], weighted.sum() / 3.5, rtol=1e-6)
    np.testing.assert_allclose(of_logits(loss_fn, logits, labels), nll.mean(), rtol=1e-6)
    np.testing.assert_allclose(of_logits(loss_fn, logits, labels, normalizer=10), nll.sum() / 10, rtol=1e-6)
    where = jnp.asarray([True, False, True, True])
    np.testing.assert_allclose(of_logits(loss_fn, logits, labels, where=where), nll[[0, 2]].mean(), rtol=1e-6)
    other = of_logits(loss_fn, logits, [0, 1, 2, 1], ignore_index=1)
    np.testing.assert_allclose(other, nll[[0, 2]].mean(), rtol=1e-6)


def test_metrics_by_hand(loss_fn):
    logits = np.log([[2.0, 1, 1], [1, 1, 2], [1, 4, 3], [1, 1, 2]])
    loss, metrics = of_logits(
        loss_fn, logits, [0, 1, 1, -100], weights=jnp.asarray([1.0, 3, 2, 7]), z_loss=0.1, return_metrics=True
    )
    assert metrics.weight == 6
    np.testing.assert_array_equal(metrics.predictions, [0, 2, 1, -1])
    np.testing.assert_allclose(metrics.accuracy, 3 / 6, rtol=1e-6)
    np.testing.assert_allclose(metrics.cross_entropy, (np.log(2) + 3 * np.log(4) + 2 * np.log(2)) / 6, rtol=1e-6)
    squares = np.log([4, 4, 8]) ** 2
    np.testing.assert_allclose(metrics.z_loss, 0.1 * (squares * [1, 3, 2]).sum() / 6, rtol=1e-6)
    np.testing.assert_allclose(loss, metrics.cross_entropy + metrics.z_loss, rtol=1e-6)


def test_nothing_counts(loss_fn):
    loss, metrics = of_logits(loss_fn, np.eye(2), [-100, -100], return_metrics=True, z_loss=0.1)
    assert (loss, metrics.accuracy, metrics.weight) == (0, 0, 0)
    np.testing.assert_array_equal(metrics.predictions, [-1, -1])


@pytest.mark.parametrize("label", [-1, 2, 1000])
def test_a_label_that_is_no_column(label, loss_fn):
    loss = of_logits(loss_fn, np.eye(2), [0, label], reduction="none")
    np.testing.assert_array_equal(np.isnan(loss), [False, True])
    assert np.isnan(of_logits(loss_fn, np.eye(2), [0, label]))


def test_a_tied_embedding_is_the_transposed_kernel(loss_fn):
    random = np.random.default_rng(0)
    hidden, kernel = jnp.asarray(random.normal(size=(5, 3))), jnp.asarray(random.normal(size=(3, 7)))
    labels = jnp.arange(5)
    np.testing.assert_allclose(
        loss_fn(hidden, kernel.T, labels, kernel_layout="vh", precision="highest"),
        loss_fn(hidden, kernel, labels, precision="highest"),
        rtol=1e-6,
    )


def test_large_and_close_logits_keep_their_difference(loss_fn):
    # Differences of 0.5 near 10⁶, where float32 has a resolution of 1/16.
    loss = of_logits(loss_fn, [[1e6, 1e6 + 0.5]], [0])
    np.testing.assert_allclose(loss, np.log1p(np.exp(0.5)), rtol=1e-6)


def test_optax_agrees(loss_fn):
    random = np.random.default_rng(1)
    logits, labels = jnp.asarray(random.normal(size=(6, 9)), jnp.float32), random.integers(0, 9, 6)
    ours = of_logits(loss_fn, logits, labels, reduction="none")
    np.testing.assert_allclose(ours, optax.softmax_cross_entropy_with_integer_labels(logits, labels), rtol=2e-6)
    smoothed = optax.smooth_labels(jax.nn.one_hot(labels, 9), 0.2)
    ours = of_logits(loss_fn, logits, labels, reduction="none", label_smoothing=0.2)
    np.testing.assert_allclose(ours, optax.softmax_cross_entropy(logits, smoothed), rtol=2e-6)
