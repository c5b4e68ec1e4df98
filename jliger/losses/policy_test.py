"""Tests policy losses against their published formulas in float64, and against values computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger import losses

SHAPE = (6, 8)
RANDOM = np.random.default_rng(0)
LOGPROBS = RANDOM.uniform(-4, -0.1, SHAPE).astype(np.float32)
OLD = (LOGPROBS + RANDOM.normal(size=SHAPE) * 0.4).astype(np.float32)
REF = (LOGPROBS + RANDOM.normal(size=SHAPE) * 0.8).astype(np.float32)
ENTROPY = RANDOM.uniform(0.1, 3, SHAPE).astype(np.float32)
ADVANTAGES = RANDOM.normal(size=6).astype(np.float32)
TOKEN_ADVANTAGES = RANDOM.normal(size=SHAPE).astype(np.float32)
WHERE = RANDOM.random(SHAPE) < 0.6
WHERE[1], WHERE[2] = False, True
FLOAT64 = {
    name: array.astype(np.float64)
    for name, array in {
        "logprobs": LOGPROBS,
        "old": OLD,
        "ref": REF,
        "entropy": ENTROPY,
        "tokens": TOKEN_ADVANTAGES,
    }.items()
}
PER_TOKEN = np.broadcast_to(ADVANTAGES.astype(np.float64)[:, None], SHAPE)


def aggregated(token_losses, loss_type, where=WHERE):
    """Reduces token losses as in the papers."""
    rows = [row[mask] for row, mask in zip(token_losses, where, strict=True) if mask.any()]
    if loss_type == "grpo":
        return np.mean([row.mean() for row in rows])
    if loss_type == "dr_grpo":
        return sum(row.sum() for row in rows) / (10 * len(rows))
    return sum(row.sum() for row in rows) / sum(row.size for row in rows)


def surrogate(ratios, advantages, low=0.2, high=0.2, delta=np.inf):
    """The papers' minimum, with the maximum of the dual clip where advantages are negative."""
    smaller = np.minimum(ratios * advantages, np.clip(ratios, 1 - low, 1 + high) * advantages)
    return -np.where(advantages < 0, np.maximum(smaller, delta * advantages), smaller) if delta < np.inf else -smaller


def sequence_ratios(log_ratios, where=WHERE):
    return np.exp((log_ratios * where).sum(-1, keepdims=True) / np.maximum(where.sum(-1, keepdims=True), 1))


def options_of(loss_type):
    return {"max_completion_length": 10} if loss_type == "dr_grpo" else {}


def grpo(logprobs=LOGPROBS, advantages=ADVANTAGES, **options):
    options = {"where": WHERE, "old_logprobs": OLD, **options_of(options.get("loss_type")), **options}
    return losses.grpo(logprobs, advantages, **options)


# ---- formulas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("advantages", ["sequences", "tokens"])
def test_the_published_formula(loss_type, level, advantages):
    given, exact = (ADVANTAGES, PER_TOKEN) if advantages == "sequences" else (TOKEN_ADVANTAGES, FLOAT64["tokens"])
    log_ratios = FLOAT64["logprobs"] - FLOAT64["old"]
    ratios = np.exp(log_ratios) if level == "token" else sequence_ratios(log_ratios)
    k3 = np.exp(FLOAT64["ref"] - FLOAT64["logprobs"]) - (FLOAT64["ref"] - FLOAT64["logprobs"]) - 1
    policy = surrogate(ratios, exact, 0.1, 0.3)
    loss, metrics = grpo(
        advantages=given, loss_type=loss_type, importance_sampling_level=level, ref_logprobs=REF, entropy=ENTROPY,
        epsilon_low=0.1, epsilon_high=0.3, beta=0.05, entropy_coef=0.02,
    )  # fmt: skip
    wanted = aggregated(policy + 0.05 * k3 - 0.02 * FLOAT64["entropy"], loss_type)
    np.testing.assert_allclose(loss, wanted, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(metrics.policy_loss, aggregated(policy, loss_type), rtol=2e-6, atol=1e-6)
    assert np.abs(policy - surrogate(ratios, exact, 1, np.inf))[WHERE].any(), "nothing is clipped"


@pytest.mark.parametrize("high", [0.2, 0.28])
def test_two_sided_clipping(high):
    ratios = np.exp(FLOAT64["logprobs"] - FLOAT64["old"])
    wanted = surrogate(ratios, FLOAT64["tokens"], 0.2, high, delta=1.4)
    assert (wanted != surrogate(ratios, FLOAT64["tokens"], 0.2, high))[WHERE].any()
    loss, metrics = grpo(advantages=TOKEN_ADVANTAGES, epsilon_high=high, delta=1.4)
    np.testing.assert_allclose(loss, aggregated(wanted, "dapo"), rtol=2e-6, atol=1e-6)
    held = np.where(FLOAT64["tokens"] > 0, ratios > 1 + high, ratios > 1.4)
    np.testing.assert_allclose(metrics.clip_fraction_high, held[WHERE].mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "low", "high"), [({}, 0, 5), ({"epsilon_low": 0.3, "epsilon_high": 0.5}, 0.7, 1.5)]
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cispo(options, low, high, level):
    old = LOGPROBS + (OLD - LOGPROBS) * 4
    log_ratios = FLOAT64["logprobs"] - old.astype(np.float64)
    ratios = np.exp(log_ratios) if level == "token" else np.broadcast_to(sequence_ratios(log_ratios), SHAPE)
    held = np.clip(ratios, low, high)
    options = {"loss_type": "cispo", "old_logprobs": old, "importance_sampling_level": level, **options}
    (loss, metrics), grad = jax.value_and_grad(lambda logprobs: grpo(logprobs, **options), has_aux=True)(LOGPROBS)
    np.testing.assert_allclose(loss, aggregated(-held * PER_TOKEN * FLOAT64["logprobs"], "dapo"), rtol=1e-5)
    # REINFORCE with clipped weights: every token keeps its gradient.
    np.testing.assert_allclose(grad, np.where(WHERE, -held * PER_TOKEN, 0) / WHERE.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics.clip_fraction_low, (ratios < low)[WHERE].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics.clip_fraction_high, (ratios > high)[WHERE].mean(), rtol=1e-6)


def token_gradient(ratios, advantages, low=0.2, high=0.2):
    """The derivative of each token's surrogate by its log-probability: the ratio where it is not clipped, else 0."""
    active = ratios * advantages <= np.clip(ratios, 1 - low, 1 + high) * advantages
    return np.where(WHERE & active, -ratios * advantages, 0)


@pytest.mark.parametrize("advantages", ["sequences", "tokens"])
def test_the_gradient_of_clipped_tokens_is_0(advantages):
    given, exact = (ADVANTAGES, PER_TOKEN) if advantages == "sequences" else (TOKEN_ADVANTAGES, FLOAT64["tokens"])
    ratios = np.exp(FLOAT64["logprobs"] - FLOAT64["old"])
    grad = jax.grad(lambda logprobs: grpo(logprobs, given)[0])(LOGPROBS)
    np.testing.assert_allclose(grad, token_gradient(ratios, exact) / WHERE.sum(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("advantages", ["sequences", "tokens"])
def test_the_gradient_of_gspo(advantages):
    # The gradient of GSPO-token (arXiv:2507.18071, eq. 17); with one advantage per sequence it is that of GSPO.
    given, exact = (ADVANTAGES, PER_TOKEN) if advantages == "sequences" else (TOKEN_ADVANTAGES, FLOAT64["tokens"])
    ratios = sequence_ratios(FLOAT64["logprobs"] - FLOAT64["old"])
    options = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.05}
    grad = jax.grad(lambda logprobs: grpo(logprobs, given, **options)[0])(LOGPROBS)
    wanted = token_gradient(ratios, exact, 0.05, 0.05) / np.maximum(WHERE.sum(-1, keepdims=True), 1) / 5
    np.testing.assert_allclose(grad, wanted, rtol=2e-6, atol=1e-9)
    assert (wanted != 0).any()
    assert (wanted == 0)[WHERE].any()


@pytest.mark.parametrize("level", ["token", pytest.param("sequence", marks=pytest.mark.exhaustive)])
def test_sapo(level):
    # arXiv:2511.20347: sigmoid gates, and their derivative 4 p (1 − p) r.
    log_ratios = FLOAT64["logprobs"] - FLOAT64["old"]
    ratios = np.exp(log_ratios) if level == "token" else sequence_ratios(log_ratios)
    tau = np.where(PER_TOKEN > 0, 0.7, 2.0)
    p = 1 / (1 + np.exp(-tau * (ratios - 1)))
    options = {"loss_type": "sapo", "importance_sampling_level": level, "sapo_tau_pos": 0.7, "sapo_tau_neg": 2.0}
    (loss, metrics), grad = jax.jit(jax.value_and_grad(lambda x: grpo(x, **options), has_aux=True))(LOGPROBS)
    np.testing.assert_allclose(loss, aggregated(-4 / tau * p * PER_TOKEN, "grpo"), rtol=2e-6, atol=1e-6)
    wanted = np.where(WHERE, -4 * p * (1 - p) * ratios * PER_TOKEN, 0) / np.maximum(WHERE.sum(-1, keepdims=True), 1) / 5
    np.testing.assert_allclose(grad, wanted, rtol=2e-5, atol=1e-8)
    assert metrics.clip_fraction_low == metrics.clip_fraction_high == 0


def test_temperatures_of_sapo_by_hand():
    # One ratio of 2: 4 σ(1) for the positive advantage, 4 / 1.05 σ(1.05) for the negative one.
    logprobs, old = np.log(np.float32([[0.8], [0.8]])), np.log(np.float32([[0.4], [0.4]]))
    loss, _ = losses.grpo(logprobs, np.float32([1, -1]), old_logprobs=old, loss_type="sapo")
    np.testing.assert_allclose(loss, (-4 * 0.7310586 + 4 / 1.05 * 0.7407749) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    "loss_type", ["cispo", *(pytest.param(loss_type, marks=pytest.mark.exhaustive) for loss_type in ("dapo", "sapo"))]
)
def test_weights_are_factors_of_the_policy_loss_alone(loss_type):
    weights = np.where(WHERE, np.abs(TOKEN_ADVANTAGES), np.nan).astype(np.float32)
    weights[0, np.flatnonzero(WHERE[0])[0]] = 0
    options = {"loss_type": loss_type, "ref_logprobs": REF, "beta": 0.1, "entropy": ENTROPY, "entropy_coef": 0.1}

    def loss(logprobs, weights, advantages=TOKEN_ADVANTAGES):
        return grpo(logprobs, advantages, weights=weights, **options)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(LOGPROBS, weights)
    # As if advantages were multiplied, since no weight is negative.
    unweighted = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (wanted, _), grad = unweighted(LOGPROBS, None, TOKEN_ADVANTAGES * np.nan_to_num(weights))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(grads[0], grad, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(grads[1], 0)
    assert metrics.count == WHERE.sum()
    assert metrics.clip_fraction_high == unweighted(LOGPROBS, None)[0][1].clip_fraction_high


def test_a_weight_of_0_drops_an_impossible_token():
    weights, logprobs = np.float32([[1, 0]]), np.float32([[-1, -np.inf]])
    options = {"weights": weights, "loss_type": "cispo"}
    value, grad = jax.jit(jax.value_and_grad(lambda x: losses.grpo(x, np.ones(1, np.float32), **options)[0]))(logprobs)
    assert value == 0.5
    np.testing.assert_array_equal(grad, [[-0.5, 0]])


def test_gspo_is_a_loss_of_sequences():
    # The value is −min(s A, clip(s) A), averaged over sequences of any lengths.
    ratios = sequence_ratios(FLOAT64["logprobs"] - FLOAT64["old"])[:, 0]
    loss, _ = grpo(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4)
    wanted = surrogate(ratios, ADVANTAGES.astype(np.float64), 3e-4, 4e-4)[WHERE.any(-1)].mean()
    np.testing.assert_allclose(loss, wanted, rtol=2e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("old", [None, LOGPROBS], ids=["none", "the same"])
def test_on_policy_is_reinforce(level, old):
    options = {"old_logprobs": old, "importance_sampling_level": level}
    (loss, metrics), grad = jax.value_and_grad(lambda logprobs: grpo(logprobs, **options), has_aux=True)(LOGPROBS)
    np.testing.assert_allclose(loss, -PER_TOKEN[WHERE].mean(), rtol=2e-6)
    np.testing.assert_allclose(grad, np.where(WHERE, -PER_TOKEN, 0) / WHERE.sum(), rtol=2e-6)
    assert metrics.old_kl == metrics.clip_fraction_low == metrics.clip_fraction_high == 0


def test_the_penalty_on_divergence_and_its_gradient():
    options = {"ref_logprobs": REF, "beta": 1.0}
    zero = np.zeros_like(ADVANTAGES)
    (loss, metrics), grad = jax.value_and_grad(lambda x: grpo(x, zero, **options), has_aux=True)(LOGPROBS)
    d = FLOAT64["ref"] - FLOAT64["logprobs"]
    np.testing.assert_allclose(loss, (np.exp(d) - d - 1)[WHERE].mean(), rtol=2e-6)
    np.testing.assert_allclose(metrics.kl, loss, rtol=1e-6)
    np.testing.assert_allclose(grad, np.where(WHERE, 1 - np.exp(d), 0) / WHERE.sum(), rtol=2e-6, atol=1e-8)


def test_the_penalty_on_a_small_divergence_keeps_its_digits():
    # Computed as written, e^d − d − 1 in float32 is 0 or a rounding error of 1 for |d| below 3e-4.
    d = np.float32([1e-3, -1e-4, 1e-5])
    _, metrics = losses.grpo(np.zeros((3, 1), np.float32), np.zeros(3, np.float32), ref_logprobs=d[:, None])
    np.testing.assert_allclose(metrics.kl, np.mean(np.expm1(d.astype(np.float64)) - d), rtol=1e-3)


def test_the_entropy_bonus_and_its_gradient():
    def loss(entropy):
        return grpo(entropy=entropy, entropy_coef=0.5)[0]

    np.testing.assert_allclose(loss(ENTROPY), grpo()[0] - 0.5 * FLOAT64["entropy"][WHERE].mean(), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(ENTROPY), -0.5 * WHERE / WHERE.sum(), rtol=1e-6)


def test_metrics():
    loss, metrics = grpo(ref_logprobs=REF, entropy=ENTROPY)
    log_ratios = (FLOAT64["logprobs"] - FLOAT64["old"])[WHERE]
    ratios, advantages = np.exp(log_ratios), PER_TOKEN[WHERE]
    assert metrics.count == WHERE.sum()
    assert metrics.policy_loss == loss
    np.testing.assert_allclose(metrics.entropy, FLOAT64["entropy"][WHERE].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics.old_kl, (ratios - 1 - log_ratios).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics.clip_fraction_low, ((ratios < 0.8) & (advantages < 0)).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics.clip_fraction_high, ((ratios > 1.2) & (advantages > 0)).mean(), rtol=1e-6)
    _, metrics = grpo()
    assert metrics.kl is None
    assert metrics.entropy is None


# ---- extremes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [None, 4.0])
def test_extreme_ratios_by_hand(delta):
    log_ratios, advantages = np.float32(np.meshgrid([-1e4, -50, 19.5, 20.5, 100, 1e4], [1.5, -1.5]))
    shape = (log_ratios.size, 1)
    old = np.zeros(shape, np.float32)

    def total(logprobs):
        return losses.grpo(logprobs, advantages.ravel(), old_logprobs=old, delta=delta, normalizer=1.0)[0]

    grads = jax.grad(total)(log_ratios.reshape(shape)).reshape(log_ratios.shape)
    for place, log_ratio in np.ndenumerate(log_ratios):
        advantage = advantages[place]
        value = losses.grpo(log_ratio[None, None], advantage[None], old_logprobs=old[:1], delta=delta)[0]
        log_ratio = float(log_ratio)
        ratio, slope = np.exp(min(log_ratio, 20)) * (1 + max(log_ratio - 20, 0)), np.exp(min(log_ratio, 20))
        if advantage > 0:
            wanted = (min(ratio, 1.2), slope if ratio < 1.2 else 0)
        elif delta is not None and ratio > delta:
            wanted = (delta, 0)
        else:
            wanted = (max(ratio, 0.8), slope if ratio > 0.8 else 0)
        np.testing.assert_allclose([value, grads[place]], [-advantage * part for part in wanted], rtol=1e-6)


@pytest.mark.parametrize("divergence", [-1e4, 19.9, 20.1, 1e4])
def test_extreme_divergences_by_hand(divergence):
    # In other libraries e^d overflows at 89. If d were clipped at 20, the gradient would be 0 where it matters most.
    def loss(logprob):
        return losses.grpo(logprob, np.zeros(1, np.float32), ref_logprobs=np.zeros((1, 1), np.float32), beta=1.0)[0]

    value, grad = jax.value_and_grad(loss)(np.full((1, 1), -divergence, np.float32))
    divergence = float(np.float32(divergence))
    exponential = np.exp(min(divergence, 20))
    np.testing.assert_allclose(value, exponential * (1 + max(divergence - 20, 0)) - divergence - 1, rtol=1e-5)
    np.testing.assert_allclose(grad, [[1 - exponential]], rtol=1e-5)


def test_one_fully_masked_sequence_is_left_out_of_the_mean():
    others = [0, 2, 3, 4, 5]
    for loss_type in ("grpo", "dr_grpo"):
        result, _ = grpo(loss_type=loss_type)
        alone, _ = grpo(
            LOGPROBS[others], ADVANTAGES[others], loss_type=loss_type, where=WHERE[others], old_logprobs=OLD[others]
        )
        np.testing.assert_allclose(result, alone, rtol=1e-6)


def test_an_advantage_of_a_masked_sequence_may_be_nan():
    # If all completions of a group are truncated, the standard deviation of its rewards is 0.
    advantages = ADVANTAGES.copy()
    advantages[1] = np.nan
    value, grad = jax.value_and_grad(lambda logprobs: grpo(logprobs, advantages)[0])(LOGPROBS)
    assert value == grpo()[0]
    assert np.isfinite(grad).all()


# ---- counts --------------------------------------------------------------------------------------------------


def test_a_global_token_count():
    # The average of the means of microbatches with unequal counts is not the mean of the batch.
    half = [slice(0, 2), slice(2, 6)]
    parts = [
        functools.partial(grpo, LOGPROBS[part], ADVANTAGES[part], where=WHERE[part], old_logprobs=OLD[part])
        for part in half
    ]
    whole, _ = grpo()
    np.testing.assert_allclose(sum(part(normalizer=WHERE.sum())[0] for part in parts), whole, rtol=1e-6)
    assert abs(np.mean([part()[0] for part in parts]) - whole) > 0.01 * abs(whole)


def test_bnpo_and_dapo_are_one_formula():
    assert grpo(loss_type="bnpo")[0] == grpo(loss_type="dapo")[0]


def test_ppo_is_grpo_with_advantages_of_tokens():
    options = {"where": WHERE, "entropy": ENTROPY, "entropy_coef": 0.1, "epsilon_high": 0.3, "delta": 2.0}
    ppo, ppo_metrics = losses.ppo_clip(LOGPROBS, OLD, TOKEN_ADVANTAGES, **options)
    loss, metrics = grpo(advantages=TOKEN_ADVANTAGES, **options)
    assert ppo == loss
    assert ppo_metrics == metrics
    flat = losses.ppo_clip(
        LOGPROBS.ravel(), OLD.ravel(), TOKEN_ADVANTAGES.ravel(),
        **{name: option.ravel() if isinstance(option, np.ndarray) else option for name, option in options.items()},
    )  # fmt: skip
    np.testing.assert_allclose(flat[0], ppo, rtol=1e-6)
    ratios = np.exp(FLOAT64["logprobs"] - FLOAT64["old"])
    wanted = surrogate(ratios, FLOAT64["tokens"], 0.2, 0.3, 2.0) - 0.1 * FLOAT64["entropy"]
    np.testing.assert_allclose(ppo, wanted[WHERE].mean(), rtol=2e-6)


# ---- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": "reinforce"},
            "loss_type got 'reinforce'; pass one of 'grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo'",
        ),
        ({"importance_sampling_level": "word"}, "importance_sampling_level got 'word'"),
        ({"loss_type": "cispo", "delta": 9.0}, "delta is not for loss_type='cispo'"),
        ({"loss_type": "sapo", "epsilon_low": 0.2}, "epsilon_low is not for loss_type='sapo', which does not clip"),
        ({"loss_type": "sapo", "delta": 9.0}, "delta is not for loss_type='sapo'"),
        ({"loss_type": "sapo", "sapo_tau_neg": 0.0}, "sapo_tau_neg got 0.0; pass a finite number above 0"),
        ({"sapo_tau_pos": 1.0}, "sapo_tau_pos is not for loss_type='dapo'"),
        ({"weights": ADVANTAGES}, r"weights got shape \(6,\); pass one number per token"),
        ({"delta": 1.2}, "delta got 1.2; pass a number above 1 \\+ epsilon_high = 1.2"),
        ({"epsilon_low": -0.1}, "epsilon_low got -0.1; pass a finite number of at least 0"),
        ({"epsilon_high": -0.1}, "epsilon_high got -0.1"),
        ({"beta": 0.1}, "ref_logprobs is missing; pass it, or beta=0"),
        ({"beta": jnp.float32(0)}, "ref_logprobs is missing; pass it, or beta=0"),
        ({"beta": -0.1, "ref_logprobs": REF}, "beta got -0.1"),
        ({"entropy_coef": 0.1}, "entropy is missing; pass it, or entropy_coef=0"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "'dr_grpo' needs it"),
        ({"loss_type": "dr_grpo", "max_completion_length": 0}, "max_completion_length got 0"),
        ({"loss_type": "grpo", "max_completion_length": 10}, "the other types do not use it"),
        (
            {"advantages": ADVANTAGES[:, None]},
            r"advantages got shape \(6, 1\); pass one number per token, or one per sequence",
        ),
        ({"advantages": np.float32(1)}, r"advantages got shape \(\)"),
        (
            {"old_logprobs": OLD[:, :1]},
            r"old_logprobs got shape \(6, 1\); pass one number per token, \(6, 8\) as logprobs",
        ),
    ],
    ids=str,
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grpo(**options)


def test_more_that_is_refused():
    with pytest.raises(ValueError, match=r"advantages got shape \(6,\); pass one number per token, \(6, 8\)"):
        losses.ppo_clip(LOGPROBS, OLD, ADVANTAGES)
    with pytest.raises(ValueError, match=r"logprobs got a scalar; pass an array \[\*B, T\]"):
        losses.grpo(0.0, 0.0)
    with pytest.raises(TypeError, match="delta got"):
        grpo(delta=jnp.float32(3))


def test_coefficients_may_be_traced():
    def loss(**coefficients):
        return grpo(ref_logprobs=REF, entropy=ENTROPY, **coefficients)[0]

    coefficients = {"beta": 0.1, "entropy_coef": 0.05, "epsilon_low": 0.1, "epsilon_high": 0.3}
    np.testing.assert_allclose(jax.jit(loss)(**coefficients), loss(**coefficients), rtol=1e-6)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_an_entropy_that_is_only_a_metric_is_not_differentiated(entropy_coef):
    """Not even by zeros: `linear_logprobs` then saves its part of the backward pass."""
    calls = []
    entropy_of = jax.custom_vjp(lambda x: x)
    entropy_of.defvjp(lambda x: (x, None), lambda _, cotangent: (calls.append(cotangent), (cotangent,))[1])

    def loss(x):
        return losses.grpo(-x, jnp.ones(2), entropy=entropy_of(x), entropy_coef=entropy_coef)

    (_, metrics), _ = jax.value_and_grad(loss, has_aux=True)(jnp.ones((2, 3)))
    assert metrics.entropy == 1
    assert len(calls) == (entropy_coef != 0)
