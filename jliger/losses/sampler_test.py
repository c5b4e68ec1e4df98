"""Tests the correction for the sampler's mismatch against float64 formulas, and against values computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger import losses

RANDOM = np.random.default_rng(0)
SAMPLER = RANDOM.uniform(-3, 0, (5, 6)).astype(np.float32)
LOGPROBS = (SAMPLER + RANDOM.normal(size=(5, 6)) * 0.6).astype(np.float32)
WHERE = RANDOM.random((5, 6)) < 0.7
WHERE[1], WHERE[2] = False, True
LOG_RATIOS = LOGPROBS.astype(np.float64) - SAMPLER

corrected = functools.partial(jax.jit, static_argnames=("level", "mode"))(losses.sampler_correction)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_the_formula(level, mode):
    low, high = 0.6, 1.5
    dirty = [np.where(WHERE, array, fill) for array, fill in ((LOGPROBS, np.nan), (SAMPLER, -np.inf))]
    weights, metrics = corrected(*dirty, level=level, mode=mode, low=low, high=high, where=WHERE)
    per_token = np.exp(LOG_RATIOS)
    if level == "sequence":
        per_token = np.broadcast_to(np.prod(per_token, axis=-1, where=WHERE, keepdims=True), WHERE.shape)
    bounded = np.clip(per_token, low, high)
    wanted = bounded if mode == "truncate" else np.where(bounded == per_token, per_token, 0)
    np.testing.assert_allclose(weights, np.where(WHERE, wanted, 0), rtol=1e-5)

    ratios, units = (per_token[WHERE], wanted[WHERE])
    if level == "sequence":
        ratios, units = (array[WHERE.any(axis=-1), 0] for array in (per_token, wanted))
    below, above = (ratios < low).mean(), (ratios > high).mean()
    assert below > 0
    assert above > 0
    found = [metrics.count, metrics.mean_ratio, metrics.min_ratio, metrics.max_ratio, metrics.mean_weight]
    np.testing.assert_allclose(found, [ratios.size, ratios.mean(), ratios.min(), ratios.max(), units.mean()], rtol=1e-5)
    np.testing.assert_allclose([metrics.fraction_low, metrics.fraction_high], [below, above], rtol=1e-6)
    np.testing.assert_allclose(
        metrics.effective_fraction, units.sum() ** 2 / (units.size * (units**2).sum()), rtol=1e-5
    )
    x = LOG_RATIOS[WHERE]
    np.testing.assert_allclose([metrics.kl, metrics.kl_k1], [(np.exp(x) - 1 - x).mean(), -x.mean()], rtol=1e-4)


@pytest.mark.parametrize(
    ("level", "mode", "logprobs", "sampler_logprobs", "wanted"),
    [
        ("token", "truncate", [-np.inf, 0], [-1, -np.inf], [0.5, 2]),
        ("token", "mask", [-np.inf, 0], [-1, -np.inf], [0, 0]),
        ("token", "mask", [-np.inf, -1], [-np.inf, -1], [1, 1]),
        ("sequence", "mask", [-np.inf, -1], [-np.inf, -1], [1, 1]),
        ("sequence", "truncate", [-np.inf, 0], [-1, -np.inf], [0.5, 0.5]),
        ("sequence", "truncate", [-1e4, -50], [0, 0], [0.5, 0.5]),
        ("sequence", "truncate", [0, 0], [-1e4, -1e4], [2, 2]),
    ],
)
def test_infinite_and_extreme_log_ratios_by_hand(level, mode, logprobs, sampler_logprobs, wanted):
    arrays = np.float32([logprobs]), np.float32([sampler_logprobs])
    weights, metrics = corrected(*arrays, level=level, mode=mode, low=0.5, high=2.0)
    np.testing.assert_array_equal(weights, [wanted])
    assert not np.isnan([metrics.mean_ratio, metrics.max_ratio, metrics.effective_fraction, metrics.kl]).any()


@pytest.mark.parametrize(
    ("level", "shape"), [("token", (2, 3)), ("token", (0, 3)), ("sequence", (2, 3)), ("sequence", (2, 0))]
)
def test_nothing_counts(level, shape):
    nothing = np.full(shape, np.nan, np.float32)
    for leaf in jax.tree.leaves(corrected(nothing, nothing, level=level, where=np.zeros(shape, bool))):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_there_is_no_gradient():
    def summed(arrays):
        # Bounds of a schedule, which is traced.
        weights, metrics = losses.sampler_correction(*arrays, low=jnp.zeros(()), high=jnp.ones(()))
        return weights.sum() + metrics.kl + metrics.mean_ratio

    for grad in jax.jit(jax.grad(summed))((LOGPROBS, SAMPLER)):
        np.testing.assert_array_equal(grad, 0)


def test_a_corrected_loss_is_that_of_the_tokens_that_are_left():
    weights, _ = losses.sampler_correction(LOGPROBS, SAMPLER, mode="mask", low=0.5, high=1.5, where=WHERE)
    advantages = np.float32([1, -1, 2, -2, 0.5])
    loss, _ = losses.grpo(LOGPROBS, advantages, weights=weights, where=WHERE & (weights > 0))
    ratios = np.exp(LOG_RATIOS)
    left = WHERE & (ratios >= 0.5) & (ratios <= 1.5)
    np.testing.assert_allclose(loss, -(ratios * advantages[:, None])[left].mean(), rtol=1e-5)
    assert left.sum() < WHERE.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, "level got 'word'; pass one of 'token', 'sequence'"),
        ({"mode": "clip"}, "mode got 'clip'; pass one of 'truncate', 'mask'"),
        ({"low": -0.1}, "low got -0.1; pass a finite number of at least 0"),
        ({"high": 0.0}, "high got 0.0; pass a finite number above 0"),
        ({"low": 3.0}, "low got 3.0, which is above high = 2.0; pass low <= high"),
        ({"where": WHERE[0]}, r"where got shape \(6,\)"),
        ({"sampler_logprobs": SAMPLER[:, :1]}, r"sampler_logprobs got shape \(5, 1\); pass one number per token"),
        ({"logprobs": np.float32(0), "sampler_logprobs": np.float32(0)}, "logprobs got a scalar"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        losses.sampler_correction(**{"logprobs": LOGPROBS, "sampler_logprobs": SAMPLER, **options})
