"""Tests the reference-free losses against published formulas in float64, and against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger import losses

CHOSEN, REJECTED = np.random.default_rng(0).uniform(-4, -0.05, (2, 40)).astype(np.float32)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def orpo_formula(chosen, rejected, beta=0.1, alpha=1.0):
    odds_ratio = np.exp(chosen) / (1 - np.exp(chosen)) * (1 - np.exp(rejected)) / np.exp(rejected)
    return -alpha * chosen - beta * log_sigmoid(np.log(odds_ratio))


def cpo_formula(chosen, rejected, beta=0.1, smoothing=0.0, alpha=1.0):
    z = beta * (chosen - rejected)
    return -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z) - alpha * chosen


def simpo_formula(chosen, rejected, beta=2.0, gamma=0.5, smoothing=0.0, alpha=0.0):
    z = beta * chosen - beta * rejected - gamma
    return -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z) - alpha * chosen


@pytest.mark.parametrize(
    ("function", "formula", "options", "named"),
    [
        (losses.orpo, orpo_formula, {}, {}),
        (losses.orpo, orpo_formula, {"beta": 0.7, "nll_weight": 0.3}, {"beta": 0.7, "alpha": 0.3}),
        (losses.orpo, orpo_formula, {"nll_weight": 0}, {"alpha": 0}),
        (losses.cpo, cpo_formula, {}, {}),
        (
            losses.cpo,
            cpo_formula,
            {"beta": 0.7, "label_smoothing": 0.2, "nll_weight": 0.3},
            {"beta": 0.7, "smoothing": 0.2, "alpha": 0.3},
        ),
        (losses.simpo, simpo_formula, {}, {}),
        (
            losses.simpo,
            simpo_formula,
            {"beta": 3.0, "gamma": 1.2, "label_smoothing": 0.2, "nll_weight": 0.3},
            {"beta": 3.0, "gamma": 1.2, "smoothing": 0.2, "alpha": 0.3},
        ),
    ],
)
def test_the_published_formula_and_its_gradient(function, formula, options, named):
    chosen, rejected = float64(CHOSEN, REJECTED)
    result, metrics = function(CHOSEN, REJECTED, reduction="none", **options)
    np.testing.assert_allclose(result, formula(chosen, rejected, **named), rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(result, metrics.preference_loss + metrics.nll)

    step = 1e-6
    by_chosen = (formula(chosen + step, rejected, **named) - formula(chosen - step, rejected, **named)) / (2 * step)
    by_rejected = (formula(chosen, rejected + step, **named) - formula(chosen, rejected - step, **named)) / (2 * step)
    grads = jax.grad(lambda *pair: function(*pair, reduction="sum", **options)[0], argnums=(0, 1))(CHOSEN, REJECTED)
    np.testing.assert_allclose(grads, [by_chosen, by_rejected], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "beta"), [(losses.orpo, 0.1), (losses.cpo, 0.1), (losses.simpo, 2.0)], ids=lambda f: str(f)[:20]
)
def test_metrics(function, beta):
    where = np.arange(40) % 3 > 0
    chosen, rejected = float64(CHOSEN[where], REJECTED[where])
    loss, metrics = function(CHOSEN, REJECTED, where=where, nll_weight=0.25)
    assert metrics.count == where.sum()
    np.testing.assert_allclose(metrics.nll, -0.25 * chosen.mean(), rtol=1e-6)
    np.testing.assert_allclose(loss, metrics.preference_loss + metrics.nll, rtol=1e-6)
    np.testing.assert_allclose(metrics.chosen_rewards, beta * chosen.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics.rejected_rewards, beta * rejected.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics.margins, beta * (chosen - rejected).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics.accuracy, (chosen > rejected).mean(), rtol=1e-6)


# ---- certainty: log-probabilities near 0 ---------------------------------------------------------------------


def orpo_term(chosen, rejected):
    """Of one pair."""
    chosen, rejected = (jnp.reshape(logprob, 1) for logprob in (chosen, rejected))
    return losses.orpo(chosen, rejected, beta=1.0, nll_weight=0.0, reduction="sum")[0]


@pytest.mark.parametrize("nearness", [1e-1, 1e-3, 1e-5, 1e-6, 2e-7])
@pytest.mark.parametrize("who", ["chosen", "rejected", "both"])
def test_odds_near_certainty(nearness, who):
    pair = np.float32([-nearness if who != "rejected" else -1.3, -nearness * 1.5 if who != "chosen" else -1.3])
    chosen, rejected = float64(*pair)
    # With odds o, probabilities p and s = σ(log o_l − log o_w), the derivatives are −s/(1 − p_w) and s/(1 − p_l).
    odds = [np.exp(logprob) / -np.expm1(logprob) for logprob in (chosen, rejected)]
    share = odds[1] / (odds[0] + odds[1])
    value, grads = jax.value_and_grad(orpo_term, argnums=(0, 1))(*pair)
    np.testing.assert_allclose(value, np.log1p(odds[1] / odds[0]), rtol=2e-6)
    np.testing.assert_allclose(grads, [share / np.expm1(chosen), -share / np.expm1(rejected)], rtol=5e-6)


def test_certainty_itself_is_as_far_from_it_as_float32_can_tell():
    eps = float(np.finfo(np.float32).eps)
    for logprob in (0.0, -1e-12, 1e-6):
        # Chosen: the derivative tends to −o_l. Rejected: the loss is log(1 + o_l/o_w), with o_l about 1/eps.
        by_chosen = jax.grad(orpo_term, argnums=0)(jnp.float32(logprob), jnp.float32(np.log(0.25)))
        np.testing.assert_allclose(by_chosen, -1 / 3, rtol=1e-5)
        value, by_rejected = jax.value_and_grad(orpo_term, argnums=1)(jnp.float32(np.log(0.5)), jnp.float32(logprob))
        np.testing.assert_allclose(value, np.log1p(1 / eps), rtol=1e-6)
        np.testing.assert_allclose(by_rejected, 1 / eps, rtol=1e-5)


@pytest.mark.parametrize("logprob", [-88.0, -104.0, -1e4])
def test_odds_of_what_is_as_good_as_impossible(logprob):
    value, grads = jax.value_and_grad(orpo_term, argnums=(0, 1))(jnp.float32(logprob), jnp.float32(np.log(0.5)))
    np.testing.assert_allclose(value, -logprob, rtol=1e-6)
    np.testing.assert_allclose(grads, [-1, 2], rtol=1e-6)


# ---- sequences without a counted token -----------------------------------------------------------------------


@pytest.mark.parametrize("function", [losses.orpo, losses.simpo, losses.cpo])
def test_pairs_with_a_fully_masked_sequence(function):
    reduction = "sum" if function is losses.cpo else "mean"
    tokens = np.random.default_rng(1).uniform(-3, -0.1, (2, 6, 5)).astype(np.float32)
    where = np.random.default_rng(2).random((2, 6, 5)) < 0.7
    where[..., 0] = True
    # The empty sequence is the chosen one, the rejected one, or both.
    where[0, 1] = where[1, 2] = where[:, 4] = False

    def loss(tokens, where, exclude):
        chosen, rejected = (
            losses.sequence_logprobs(*both, reduction=reduction) for both in zip(tokens, where, strict=True)
        )
        counted = (chosen.counts > 0) & (rejected.counts > 0)
        return function(chosen.logprobs, rejected.logprobs, where=counted if exclude else None)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(tokens, where, True)
    others, masked = [0, 3, 5], [1, 2, 4]
    (wanted, _), wanted_grads = jax.value_and_grad(loss, has_aux=True)(tokens[:, others], where[:, others], True)
    assert metrics.count == 3
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(grads[:, others], wanted_grads, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(grads[:, masked], 0)
    # A user who does not exclude the pair gets a loss with a constant error, but no NaN.
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(tokens, where, False)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal(grads[~where], 0)


def test_the_likelihood_term_over_all_tokens_of_the_batch():
    # TRL's likelihood term, which docs/preferences.md says how to add.
    tokens = np.random.default_rng(3).uniform(-3, -0.1, (2, 3, 4)).astype(np.float32)
    where = np.random.default_rng(4).random((2, 3, 4)) < 0.7
    where[..., 0] = True
    chosen, rejected = (losses.sequence_logprobs(*both) for both in zip(tokens, where, strict=True))
    preference, _ = losses.cpo(chosen.logprobs, rejected.logprobs, nll_weight=0.0)
    result = preference - (chosen.logprobs.sum() / float(chosen.counts.sum()))
    sums = [np.where(mask, array, 0).sum(axis=-1, dtype=np.float64) for array, mask in zip(tokens, where, strict=True)]
    np.testing.assert_allclose(
        result, np.mean(-log_sigmoid(0.1 * (sums[0] - sums[1]))) - tokens[0][where[0]].mean(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (losses.orpo, {"beta": -0.1}, "beta got -0.1; pass a finite number of at least 0"),
        (losses.orpo, {"nll_weight": np.nan}, "nll_weight got nan; pass a finite number of at least 0"),
        (losses.cpo, {"label_smoothing": 0.7}, r"label_smoothing got 0.7; pass a finite number in \[0, 0.5\]"),
        (losses.simpo, {"label_smoothing": -0.1}, r"label_smoothing got -0.1; pass a finite number in \[0, 0.5\]"),
        (losses.simpo, {"gamma": -1.0}, "gamma got -1.0; pass a finite number of at least 0"),
        (losses.simpo, {"gamma": np.ones(40)}, r"gamma got shape \(40,\); pass one number"),
    ],
)
def test_what_is_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(CHOSEN, REJECTED, **options)


def test_coefficients_may_be_traced():
    @jax.jit
    def loss(beta, gamma, nll_weight):
        return losses.simpo(CHOSEN, REJECTED, beta=beta, gamma=gamma, nll_weight=nll_weight)[0]

    wanted = losses.simpo(CHOSEN, REJECTED, beta=1.5, gamma=0.25, nll_weight=0.5)[0]
    np.testing.assert_allclose(loss(1.5, 0.25, 0.5), wanted, rtol=1e-6)
