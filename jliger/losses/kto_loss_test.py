"""Tests KTO against its published formula in float64, and against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger import losses

LOGPROBS, REF_LOGPROBS = np.random.default_rng(0).uniform(-30, -20, (2, 40)).astype(np.float32)
DESIRABLE = np.random.default_rng(1).random(40) < 0.4


def formula(log_ratios, desirable, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    value = 1 / (1 + np.exp(-beta * np.where(desirable, log_ratios - kl, kl - log_ratios)))
    weight = np.where(desirable, desirable_weight, undesirable_weight)
    return weight - weight * value


@pytest.mark.parametrize("kl", ["one for all", "one a sequence"])
@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 1.33, "undesirable_weight": 0.5}], ids=len)
def test_the_published_formula_and_its_gradient(kl, weights):
    kl = np.float32(0.7) if kl == "one for all" else np.random.default_rng(2).uniform(0, 3, 40).astype(np.float32)
    log_ratios = LOGPROBS.astype(np.float64) - REF_LOGPROBS
    loss = lambda logprobs: losses.kto(logprobs, REF_LOGPROBS, DESIRABLE, kl=kl, beta=0.3, **weights)  # noqa: E731
    (result, _), grad = jax.value_and_grad(loss, has_aux=True)(LOGPROBS)
    arguments = DESIRABLE, kl.astype(np.float64), 0.3
    np.testing.assert_allclose(result, formula(log_ratios, *arguments, **weights).mean(), rtol=2e-6)
    step = 1e-5
    up, down = (formula(log_ratios + by, *arguments, **weights) for by in (step, -step))
    np.testing.assert_allclose(grad, (up - down) / (2 * step) / 40, rtol=1e-5, atol=1e-8)


def test_one_kl_a_sequence_is_not_broadcast_over_the_batch():
    # A `[B]` reference point broadcast with `[B, 1]` losses would give B times as many terms: 2.71 instead of 0.679.
    kl = np.linspace(0, 2, 4).astype(np.float32)
    whole, _ = losses.kto(LOGPROBS[:4], REF_LOGPROBS[:4], DESIRABLE[:4], kl=kl, reduction="none")
    for i in range(4):
        one, _ = losses.kto(LOGPROBS[i : i + 1], REF_LOGPROBS[i : i + 1], DESIRABLE[i : i + 1], kl=kl[i])
        np.testing.assert_allclose(whole[i], one, rtol=1e-6)
    same, _ = losses.kto(LOGPROBS, REF_LOGPROBS, DESIRABLE, kl=np.full(40, 0.5, np.float32))
    np.testing.assert_allclose(same, losses.kto(LOGPROBS, REF_LOGPROBS, DESIRABLE, kl=0.5)[0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (40, 1), (1, 40), (39,)])
def test_another_shape_of_kl_is_refused(shape):
    with pytest.raises(ValueError, match=r"kl got shape .*; pass one number, or one per sequence, \(40,\)"):
        losses.kto(LOGPROBS, REF_LOGPROBS, DESIRABLE, kl=np.zeros(shape, np.float32))


def test_extreme_log_ratios_by_hand():
    logprobs, zeros = np.float32([1e4, -1e4, 1e4, -1e4]), np.zeros(4, np.float32)
    desirable = np.array([True, True, False, False])
    result, _ = losses.kto(logprobs, zeros, desirable, kl=0.0, beta=1.0, reduction="none")
    np.testing.assert_array_equal(result, [0, 1, 1, 0])
    # 1 − σ(20) is 0 in float32, with a gradient of 0.
    value, grad = jax.value_and_grad(
        lambda logprob: losses.kto(logprob, zeros[:1], desirable[:1], kl=0.0, beta=1.0, reduction="sum")[0]
    )(np.float32([20]))
    np.testing.assert_allclose([value, -grad[0]], [np.exp(-20)] * 2, rtol=1e-6)


def test_metrics():
    where = np.arange(40) % 3 > 0
    log_ratios = LOGPROBS.astype(np.float64) - REF_LOGPROBS
    _, metrics = losses.kto(LOGPROBS, REF_LOGPROBS, DESIRABLE, kl=1.5, beta=0.3, where=where)
    good, bad = where & DESIRABLE, where & ~DESIRABLE
    assert metrics.desirable_count == good.sum()
    assert metrics.undesirable_count == bad.sum()
    np.testing.assert_allclose(metrics.desirable_rewards, 0.3 * log_ratios[good].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics.undesirable_rewards, 0.3 * log_ratios[bad].mean(), rtol=1e-5)
    margin = 0.3 * (log_ratios[good].mean() - log_ratios[bad].mean())
    np.testing.assert_allclose(metrics.margins, margin, rtol=1e-5)
    np.testing.assert_allclose(metrics.accuracy, ((log_ratios > 1.5) == DESIRABLE)[where].mean(), rtol=1e-6)


def test_a_batch_of_one_kind():
    for desirable in (True, False):
        loss, metrics = losses.kto(LOGPROBS, REF_LOGPROBS, np.full(40, desirable), kl=0.0)
        assert np.isfinite(loss)
        assert (metrics.undesirable_rewards if desirable else metrics.desirable_rewards) == 0


def test_the_reference_point():
    where = np.arange(40) % 3 > 0
    log_ratios = LOGPROBS.astype(np.float64) - REF_LOGPROBS
    mean = log_ratios[where].mean()
    assert mean != 0
    for logprobs, ref_logprobs, sign in ((LOGPROBS, REF_LOGPROBS, 1), (REF_LOGPROBS, LOGPROBS, -1)):
        result = losses.kto_kl(np.where(where, logprobs, np.nan), ref_logprobs, where=where)
        np.testing.assert_allclose(result, max(0, sign * mean), rtol=1e-5)
    assert losses.kto_kl(REF_LOGPROBS - 1, REF_LOGPROBS) == 0
    assert losses.kto_kl(LOGPROBS, REF_LOGPROBS, where=np.zeros(40, bool)) == 0
    assert losses.kto_kl(LOGPROBS[:0], REF_LOGPROBS[:0]) == 0
    np.testing.assert_array_equal(jax.grad(losses.kto_kl)(REF_LOGPROBS + 1, REF_LOGPROBS), 0)


def test_the_reference_point_over_an_axis_is_that_of_the_whole_batch():
    # Two shards of 8 and 32 sequences with means 3 and −1: separately 3 and 0, together max(0, −0.2).
    log_ratios = np.repeat(np.float32([3, -1, -1, -1, -1]), 8).reshape(5, 8)
    zeros = np.zeros_like(log_ratios)
    result = jax.vmap(lambda a, b: losses.kto_kl(a, b, axis_name="parts"), axis_name="parts")(log_ratios, zeros)
    np.testing.assert_array_equal(result, np.zeros(5))
    result = jax.vmap(lambda a, b: losses.kto_kl(a, b, axis_name="parts"), axis_name="parts")(-log_ratios, zeros)
    np.testing.assert_allclose(result, np.full(5, 0.2), rtol=1e-6)


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"desirable got dtype int32; pass bools \(`desirable != 0`\)"):
        losses.kto(LOGPROBS, REF_LOGPROBS, DESIRABLE.astype(np.int32), kl=0.0)
    with pytest.raises(ValueError, match=r"desirable got shape \(39,\)"):
        losses.kto(LOGPROBS, REF_LOGPROBS, DESIRABLE[1:], kl=0.0)
    with pytest.raises(ValueError, match="undesirable_weight got -1; pass a finite number of at least 0"):
        losses.kto(LOGPROBS, REF_LOGPROBS, DESIRABLE, kl=0.0, undesirable_weight=-1)


def test_weights_may_be_traced():
    @jax.jit
    def loss(weight, beta):
        return losses.kto(LOGPROBS, REF_LOGPROBS, DESIRABLE, kl=0.0, desirable_weight=weight, beta=beta)[0]

    wanted = losses.kto(LOGPROBS, REF_LOGPROBS, DESIRABLE, kl=0.0, desirable_weight=1.2, beta=0.5)[0]
    np.testing.assert_allclose(loss(jnp.float32(1.2), jnp.float32(0.5)), wanted, rtol=1e-6)
