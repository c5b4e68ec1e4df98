"""Tests the losses as functions of row statistics, and their coefficients, against autodiff of the full formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger.ops.logits import RowStats
from jliger.ops.logits.objectives import CrossEntropy, LabelTerms, LossWeights
from jliger.testing.promotion import with_promotion

ROWS, VOCAB = 7, 5


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def make(with_class_weights, seed=0):
    random = np.random.default_rng(seed)
    logits = jnp.asarray(random.normal(size=(ROWS, VOCAB)) * 3)
    labels = jnp.asarray(random.integers(0, VOCAB, ROWS))
    weights = LossWeights(*jnp.asarray(random.uniform(size=(2, ROWS))))
    return logits, labels, jnp.asarray(random.uniform(0.1, 2, VOCAB)) if with_class_weights else None, weights


@with_promotion
def stats_of(logits, labels, u):
    row_max = logits.max(1)
    return RowStats(
        max=row_max,
        log_sum=jax.nn.logsumexp(logits, axis=1) - row_max,
        label_logit=jnp.take_along_axis(logits, labels[:, None], 1)[:, 0],
        prediction=logits.argmax(1),
        weighted_sum=(logits * (1 if u is None else u)).sum(1),
    )


def labels_of(labels, u):
    validity = jnp.where((labels >= 0) & (labels < VOCAB), 1.0, jnp.nan)
    return LabelTerms(validity, None if u is None else u.at[labels].get(mode="clip"), VOCAB if u is None else u.sum())


@with_promotion
def formula(logits, labels, u, weights, smoothing, z_loss):
    u = jnp.ones(VOCAB) if u is None else u
    lse = jax.nn.logsumexp(logits, axis=1)
    nll = lse[:, None] - logits
    own = u[labels] * jnp.take_along_axis(nll, labels[:, None], 1)[:, 0]
    cross_entropy = (1 - smoothing) * own + smoothing / VOCAB * (u * nll).sum(1)
    return (weights.cross_entropy * cross_entropy).sum() + (weights.z_loss * z_loss * lse**2).sum()


@pytest.mark.parametrize("with_class_weights", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.2])
def test_the_loss_and_its_coefficients(z_loss, smoothing, with_class_weights):
    logits, labels, u, weights = make(with_class_weights)
    loss = CrossEntropy(smoothing, z_loss, VOCAB)
    stats = stats_of(logits, labels, u)
    value, by_logits = jax.value_and_grad(formula)(logits, labels, u, weights, smoothing, z_loss)
    np.testing.assert_allclose(loss.total(stats, labels_of(labels, u), weights), value, rtol=1e-12)

    result = loss.coefficients(labels_of(labels, u), weights)
    assert (result.smoothing is None) == (smoothing == 0)
    assert (result.probability_lse is None) == (z_loss == 0)
    lse = (stats.max + stats.log_sum)[:, None]
    factor = result.probability[:, None] + (0 if z_loss == 0 else result.probability_lse[:, None] * lse)
    grads = jnp.exp(logits - lse) * factor - result.label[:, None] * jax.nn.one_hot(labels, VOCAB)
    if smoothing:
        grads -= result.smoothing[:, None] * (1 if u is None else u[None])
    np.testing.assert_allclose(grads, by_logits, rtol=1e-10, atol=1e-12)


def test_coefficients_need_nothing_but_weights_and_labels():
    # Coefficients are known before the logits: the fused pass passes them to the launch that computes the statistics.
    _, labels, u, weights = make(True)
    loss = CrossEntropy(0.1, 0.1, VOCAB)
    result = jax.jit(loss.coefficients)(labels_of(labels, u), weights)
    assert all(np.isfinite(field).all() for field in jax.tree.leaves(result))


@pytest.mark.parametrize("label", [-1, VOCAB, 10**6])
def test_a_label_that_is_no_column_has_coefficients_of_nan(label):
    _, labels, u, weights = make(True)
    labels = labels.at[2].set(label)
    result = CrossEntropy(0.0, 0.0, VOCAB).coefficients(labels_of(labels, u), weights)
    np.testing.assert_array_equal(np.isnan(result.probability), np.arange(ROWS) == 2)
