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


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_excess_of_the_longer_sequence_is_weighted(reduction):
    # LD-DPO (arXiv:2409.06411): the first tokens as they are, as many as the shorter sequence has.
    def loss(logprobs):
        result = losses.sequence_logprobs(logprobs, where, reduction=reduction, excess_weight=0.25)
        return (result.logprobs * cotangent).sum(), result

    logprobs, where, cotangent = LOGPROBS[:, :2].copy(), WHERE[:, :2].copy(), np.float32([[1, 2], [3, 4], [5, 6]])
    where[1], where[2] = [[0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 0, 0]], [[1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]
    logprobs[2, 1, 4] = -np.inf
    (_, result), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(np.where(where, logprobs, np.nan))
    np.testing.assert_array_equal(result.counts, where.sum(axis=-1))
    for pair, sequence in np.ndindex(3, 2):
        common = where[pair].sum(axis=-1).min()
        places = np.flatnonzero(where[pair, sequence])
        weights = np.where(np.arange(len(places)) < common, 1, 0.25)
        scale = max(weights.sum(), 1e-9) if reduction == "mean" else 1
        wanted = (weights * logprobs[pair, sequence, places].astype(np.float64)).sum() / scale
        np.testing.assert_allclose(result.logprobs[pair, sequence], wanted, rtol=1e-6)
        wanted = np.zeros(6)
        wanted[places] = weights / scale * cotangent[pair, sequence]
        np.testing.assert_allclose(grad[pair, sequence], wanted, rtol=1e-6)


def test_an_excess_without_weight_may_be_impossible():
    where = np.array([[True, True], [True, False]])
    value, grad = jax.value_and_grad(
        lambda logprobs: losses.sequence_logprobs(logprobs, where, excess_weight=0.0).logprobs.sum()
    )(jnp.array([[-1.0, -jnp.inf], [-2.0, jnp.nan]]))
    assert value == -3
    np.testing.assert_array_equal(grad, [[1, 0], [1, 0]])


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"excess_weight got 1.5; pass a finite number in \[0, 1\]"):
        losses.sequence_logprobs(LOGPROBS[:, :2], excess_weight=1.5)
    with pytest.raises(
        ValueError, match=r"logprobs got shape \(3, 4, 6\) with excess_weight; pass pairs \[\*B, 2, T\]"
    ):
        losses.sequence_logprobs(LOGPROBS, excess_weight=0.5)
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
