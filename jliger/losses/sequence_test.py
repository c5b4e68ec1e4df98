import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger import losses

LOGPROBS = np.random.default_rng(0).uniform(-5, 0, (3, 4, 6)).astype(np.float32)
WHERE = np.random.default_rng(1).random((3, 4, 6)) < 0.5
WHERE[0, 1], WHERE[2, 3] = False, True


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sums_and_means_over_the_tokens_that_count(reduction):
    dirty = np.where(WHERE, LOGPROBS, np.nan)
    result = losses.sequence_logprobs(dirty, WHERE, reduction=reduction)
    wanted = np.where(WHERE, LOGPROBS, 0).astype(np.float64).sum(axis=-1)
    if reduction == "mean":
        wanted = wanted / np.maximum(WHERE.sum(axis=-1), 1)
    assert result.logprobs.dtype == jnp.float32
    np.testing.assert_allclose(result.logprobs, wanted, rtol=1e-6)
    np.testing.assert_array_equal(result.counts, WHERE.sum(axis=-1))
    assert result.logprobs[0, 1] == 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_with_any_cotangent(reduction):
    cotangent = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    _, pull_back = jax.vjp(
        lambda logprobs: losses.sequence_logprobs(logprobs, WHERE, reduction=reduction).logprobs,
        np.where(WHERE, LOGPROBS, np.inf),
    )
    wanted = np.where(WHERE, cotangent[..., None], 0)
    if reduction == "mean":
        wanted = wanted / np.maximum(WHERE.sum(axis=-1), 1)[..., None]
    np.testing.assert_allclose(pull_back(cotangent)[0], wanted, rtol=1e-6)


def test_without_a_mask_all_count():
    result = losses.sequence_logprobs(LOGPROBS)
    np.testing.assert_array_equal(result.counts, np.full((3, 4), 6))
    np.testing.assert_allclose(result.logprobs, LOGPROBS.astype(np.float64).sum(axis=-1), rtol=1e-6)


def test_long_sequences_are_summed_in_float32():
    # In bfloat16 a sum of ones would stop at 256.
    result = losses.sequence_logprobs(jnp.full((2, 5000), -1, jnp.bfloat16))
    np.testing.assert_array_equal(result.logprobs, [-5000, -5000])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_sequences_and_no_tokens(shape, reduction):
    result = losses.sequence_logprobs(np.zeros(shape, np.float32), reduction=reduction)
    np.testing.assert_array_equal(result.logprobs, np.zeros(shape[:1]))
    np.testing.assert_array_equal(result.counts, np.zeros(shape[:1]))


def test_what_is_refused():
    with pytest.raises(ValueError, match="reduction got 'none'"):
        losses.sequence_logprobs(LOGPROBS, reduction="none")
    with pytest.raises(ValueError, match=r"logprobs got a scalar; pass an array \[\*B, T\]"):
        losses.sequence_logprobs(0.0)
    with pytest.raises(ValueError, match=r"where got shape \(3, 4\)"):
        losses.sequence_logprobs(LOGPROBS, WHERE[..., 0])
    with pytest.raises(TypeError, match="logprobs got dtype int32"):
        losses.sequence_logprobs(np.zeros((2, 3), np.int32))
    result = jliger.linear_logprobs(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), jnp.zeros((2, 3), int))
    with pytest.raises(TypeError, match=r"logprobs got a LinearLogprobs; pass its field `\.logprobs`"):
        losses.sequence_logprobs(result)
    with pytest.raises(TypeError, match=r"entropy got a LinearLogprobs; pass its field `\.entropy`"):
        losses.grpo(result.logprobs, jnp.ones(2), entropy=result)


def test_a_masked_token_makes_the_sequence_impossible():
    for reduction, slope in (("sum", 1), ("mean", 0.5)):
        value, grad = jax.value_and_grad(
            lambda logprobs, reduction=reduction: losses.sequence_logprobs(logprobs, reduction=reduction).logprobs
        )(jnp.array([-1.0, -jnp.inf]))
        assert value == -jnp.inf
        np.testing.assert_array_equal(grad, [slope, slope])
