"""Tests each DPO variant against its published formula in float64, and against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger import losses
from jliger.testing.loss_cases import DPO_OPTIONS, PAIR, REF_PAIR

BETA = 0.3
NAMES = (*PAIR, *REF_PAIR)
ARRAYS = {name: np.random.default_rng(seed).uniform(-30, -5, 40).astype(np.float32) for seed, name in enumerate(NAMES)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


# The papers' formulas as functions of the log-ratios to the reference: w of the chosen, r of the rejected.
FORMULAS = {
    "sigmoid": lambda w, r: -log_sigmoid(BETA * (w - r)),
    "hinge": lambda w, r: np.maximum(0, 1 - BETA * (w - r)),
    "ipo": lambda w, r: ((w - r) - 1 / (2 * BETA)) ** 2,
    "robust": lambda w, r: (-0.9 * log_sigmoid(BETA * (w - r)) + 0.1 * log_sigmoid(BETA * (r - w))) / 0.8,
    "exo_pair": lambda w, r: sum(
        p * (np.log(p) - np.log(q)) for p, q in ((sigmoid(BETA * (w - r)), 0.99), (1 - sigmoid(BETA * (w - r)), 0.01))
    ),
    "nca_pair": lambda w, r: -log_sigmoid(BETA * w) - 0.5 * sum(log_sigmoid(-BETA * ratio) for ratio in (w, r)),
    "bco_pair": lambda w, r: -log_sigmoid(BETA * w - 0.3) - log_sigmoid(-(BETA * r - 0.3)),
    # The squared distance to η(P(win) − 1/2) with η = 1/β and P 1 for the chosen, 0 for the rejected.
    "sppo_hard": lambda w, r: (w - (1 - 1 / 2) / BETA) ** 2 + (r - (0 - 1 / 2) / BETA) ** 2,
    "apo_zero": lambda w, r: -sigmoid(BETA * w) + sigmoid(BETA * r) + 1,
    "apo_down": lambda w, r: sigmoid(BETA * w) - sigmoid(BETA * (w - r)) + 1,
    "discopop": lambda w, r: (
        -log_sigmoid(BETA * (w - r)) * (1 - sigmoid(BETA * (w - r) / 0.05))
        + np.exp(-BETA * (w - r)) * sigmoid(BETA * (w - r) / 0.05)
    ),
}


def each(loss_type, arrays=ARRAYS, **options):
    options = {"beta": BETA, "reduction": "none", **DPO_OPTIONS.get(loss_type, {}), **options}
    return losses.dpo(**arrays, loss_type=loss_type, **options)


def log_ratios(arrays):
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    return arrays[PAIR[0]] - arrays[REF_PAIR[0]], arrays[PAIR[1]] - arrays[REF_PAIR[1]]


@pytest.mark.parametrize("loss_type", FORMULAS)
def test_the_published_formula(loss_type):
    truth = FORMULAS[loss_type](*log_ratios(ARRAYS))
    # Log-ratios up to 25 have errors of 2e-6; the derivative of an ipo loss is proportional to its square root.
    np.testing.assert_allclose(each(loss_type)[0], truth, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("loss_type", FORMULAS)
def test_the_gradient_of_the_published_formula(loss_type):
    w, r = log_ratios(ARRAYS)
    step, formula = 1e-5, FORMULAS[loss_type]
    wanted = {
        PAIR[0]: (formula(w + step, r) - formula(w - step, r)) / (2 * step),
        PAIR[1]: (formula(w, r + step) - formula(w, r - step)) / (2 * step),
    }
    grads = jax.grad(lambda arrays: each(loss_type, arrays)[0].sum())(ARRAYS)
    for name, truth in wanted.items():
        np.testing.assert_allclose(grads[name], truth, rtol=2e-5, atol=2e-6)
    for name in REF_PAIR:
        np.testing.assert_array_equal(grads[name], 0)


# The loss at margin z: the chosen reward is z, the rejected reward is 0, and β = 1.
LIMITS = {
    ("sigmoid", 1e4): 0,
    ("sigmoid", -1e4): 1e4,
    ("hinge", 1e4): 0,
    ("hinge", -1e4): 1e4 + 1,
    ("ipo", 1e4): (1e4 - 0.5) ** 2,
    ("ipo", -1e4): (1e4 + 0.5) ** 2,
    ("robust", 1e4): -0.1 / 0.8 * 1e4,
    ("robust", -1e4): 0.9 / 0.8 * 1e4,
    ("exo_pair", 1e4): -np.log(0.99),
    ("exo_pair", -1e4): -np.log(0.01),
    ("nca_pair", 1e4): (1e4 + np.log(2)) / 2,
    ("nca_pair", -1e4): 1e4 + np.log(2) / 2,
    ("bco_pair", 1e4): np.log1p(np.exp(-0.3)),
    ("bco_pair", -1e4): 1e4 + 0.3 + np.log1p(np.exp(-0.3)),
    ("sppo_hard", 1e4): (1e4 - 0.5) ** 2 + 0.25,
    ("sppo_hard", -1e4): (1e4 + 0.5) ** 2 + 0.25,
    ("apo_zero", 1e4): 0.5,
    ("apo_zero", -1e4): 1.5,
    ("apo_down", 1e4): 1,
    ("apo_down", -1e4): 1,
    ("discopop", 1e4): 0,
    ("discopop", -1e4): 1e4,
}


@pytest.mark.parametrize(("loss_type", "margin"), LIMITS)
def test_extreme_margins_by_hand(loss_type, margin):
    arrays = dict(zip(NAMES, np.float32([[margin], [0], [0], [0]]), strict=True))
    np.testing.assert_allclose(each(loss_type, arrays, beta=1.0)[0][0], LIMITS[loss_type, margin], rtol=1e-6)


def test_every_type_is_tested():
    with pytest.raises(ValueError, match="loss_type got 'nothing'") as error:
        each("nothing")
    assert str(error.value).split("pass one of ")[1] == ", ".join(map(repr, FORMULAS)) + "."
    assert {loss_type for loss_type, _ in LIMITS} == set(FORMULAS)


# ---- divergences ----------------------------------------------------------------------------------------------

# f'(u) of the paper's table 1 (arXiv:2309.16240), as functions of u = π(y) / π_ref(y).
DERIVATIVES = {
    ("forward_kl", None): lambda u: -1 / u,
    ("js", None): lambda u: np.log(2 * u / (1 + u)),
    ("alpha", 0.3): lambda u: (1 - u**-0.3) / 0.3,
}


@pytest.mark.parametrize(("divergence", "alpha"), DERIVATIVES)
def test_divergences(divergence, alpha):
    arrays = {name: array / 10 for name, array in ARRAYS.items()}
    w, r = log_ratios(arrays)
    options = {"divergence": divergence, "divergence_alpha": alpha}
    slope = DERIVATIVES[divergence, alpha]

    def formula(w, r):
        return -log_sigmoid(BETA * slope(np.exp(w)) - BETA * slope(np.exp(r)))

    @jax.jit
    def loss_and_grads(arrays):
        loss, pull_back, metrics = jax.vjp(lambda arrays: each("sigmoid", arrays, **options), arrays, has_aux=True)
        return loss, metrics, *pull_back(jnp.ones_like(loss))

    loss, metrics, grads = loss_and_grads(arrays)
    np.testing.assert_allclose(loss, formula(w, r), rtol=1e-5, atol=1e-6)
    # Rewards are 0 where the policy is the reference.
    np.testing.assert_allclose(metrics.chosen_rewards, BETA * (slope(np.exp(w)) - slope(1)).mean(), rtol=1e-5)
    step = 1e-5
    for name, truth in (
        (PAIR[0], formula(w + step, r) - formula(w - step, r)),
        (PAIR[1], formula(w, r + step) - formula(w, r - step)),
    ):
        np.testing.assert_allclose(grads[name], truth / (2 * step), rtol=2e-5, atol=2e-6)
    for name in REF_PAIR:
        np.testing.assert_array_equal(grads[name], 0)


@pytest.mark.parametrize(
    ("options", "log_ratios", "margin"),
    [
        # 1 − e^−x is continued by its tangent at x = −20, and is at most 1.
        ({"divergence": "forward_kl"}, (-30, 0), -(11 * np.exp(20.0) - 1)),
        ({"divergence": "forward_kl"}, (np.inf, 0), 1),
        ({"divergence": "forward_kl"}, (0, -np.inf), np.inf),
        ({"divergence": "forward_kl"}, (1e-6, 0), 1e-6),
        ({"divergence": "alpha", "divergence_alpha": 0.5}, (np.inf, 2 * np.log(2)), 2 - 1),
        ({"divergence": "js"}, (-1e4, 0), np.log(2) - 1e4),
        ({"divergence": "js"}, (np.inf, np.inf), 0),
    ],
)
def test_extreme_divergences_by_hand(options, log_ratios, margin):
    pair, zero = ([np.float32([x])] for x in log_ratios), np.zeros(1, np.float32)
    chosen, rejected = (np.concatenate(array) for array in pair)
    # −∞ under the reference is a log-ratio of ∞.
    (chosen, ref_chosen), (rejected, ref_rejected) = (
        (zero, -array) if array > 0 else (array, zero) for array in (chosen, rejected)
    )

    def loss(chosen, rejected):
        return losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=1.0, **options)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(chosen, rejected)
    np.testing.assert_allclose(metrics.margins, margin, rtol=1e-6)
    np.testing.assert_allclose(value, np.logaddexp(0, -margin), rtol=1e-6)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence got 'kl'; pass one of 'reverse_kl', 'forward_kl', 'js', 'alpha'"),
        ({"divergence": "alpha"}, "divergence_alpha got None with divergence='alpha'; 'alpha' needs it"),
        ({"divergence_alpha": 0.5}, "divergence_alpha got 0.5 with divergence='reverse_kl'"),
        ({"divergence": "alpha", "divergence_alpha": 1.0}, "pass a number between 0 and 1"),
        ({"divergence": "alpha", "divergence_alpha": -0.5}, "divergence_alpha got -0.5"),
    ],
)
def test_divergences_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        each("sigmoid", **options)


# ---- label smoothing: applied, or an error --------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothed_labels_are_wrong_with_that_probability(smoothing):
    w, r = log_ratios(ARRAYS)
    truth = (1 - smoothing) * FORMULAS["sigmoid"](w, r) + smoothing * FORMULAS["sigmoid"](r, w)
    result, metrics = each("sigmoid", label_smoothing=smoothing)
    np.testing.assert_allclose(result, truth, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(metrics.preference_loss, result)
    assert not np.allclose(result, each("sigmoid")[0])


def test_robust_without_smoothing_is_sigmoid():
    np.testing.assert_array_equal(each("robust", label_smoothing=0.0)[0], each("sigmoid")[0])


def test_robust_loss_is_unbiased():
    # If labels are flipped with probability ε, the expected loss is the loss of the correct labels (arXiv:2403.00409).
    flipped = dict(zip(NAMES, (ARRAYS[name] for name in (*PAIR[::-1], *REF_PAIR[::-1])), strict=True))
    expected = 0.8 * each("robust", label_smoothing=0.2)[0] + 0.2 * each("robust", flipped, label_smoothing=0.2)[0]
    np.testing.assert_allclose(expected, each("sigmoid")[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("loss_type", sorted(set(FORMULAS) - {"sigmoid", "robust", "exo_pair"}))
def test_a_loss_without_smoothing_refuses_it(loss_type):
    with pytest.raises(ValueError, match=rf"label_smoothing got 0.1; loss_type='{loss_type}' has none, pass 0"):
        each(loss_type, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("loss_type", "options", "message"),
    [
        ("sigmoid", {"label_smoothing": 0.6}, r"label_smoothing got 0.6; pass a finite number in \[0, 0.5\]"),
        ("robust", {"label_smoothing": 0.5}, "'robust' would divide by 0"),
        ("exo_pair", {"label_smoothing": 0.0}, "'exo_pair' is infinite; pass a number above 0"),
        ("sigmoid", {"discopop_tau": 0.05}, "it is for loss_type='discopop'"),
        ("discopop", {"discopop_tau": 0.0}, "discopop_tau got 0; pass a number above 0"),
        ("discopop", {"discopop_tau": 2.0}, r"discopop_tau got 2.0; pass a finite number in \[0, 1\]"),
        ("apo_zero", {"reward_shift": 0.0}, "reward_shift is for loss_type='bco_pair'"),
        ("sigmoid", {"beta": 0.0}, "beta got 0.0; pass a finite number above 0"),
        ("sigmoid", {"beta": np.ones(40)}, r"beta got shape \(40,\); pass one number"),
        ("sigmoid", {"reduction": "average"}, "reduction got 'average'"),
    ],
)
def test_what_is_refused(loss_type, options, message):
    with pytest.raises(ValueError, match=message):
        each(loss_type, **options)


def test_a_traced_label_smoothing_is_refused():
    with pytest.raises(TypeError, match="label_smoothing got"):
        jax.jit(lambda smoothing: each("sigmoid", label_smoothing=smoothing)[0])(0.1)


# ---- other options -------------------------------------------------------------------------------------------


def test_discopop_at_another_temperature():
    w, r = log_ratios(ARRAYS)
    z = BETA * (w - r)
    for tau in (0.5, 1.0):
        truth = -log_sigmoid(z) * sigmoid(-z / tau) + np.exp(-z) * sigmoid(z / tau)
        np.testing.assert_allclose(each("discopop", discopop_tau=tau)[0], truth, rtol=1e-5, atol=2e-6)


def test_the_mean_of_rewards_as_the_shift_of_bco():
    _, metrics = each("bco_pair", reward_shift=None)
    shift = (metrics.chosen_rewards + metrics.rejected_rewards) / 2
    w, r = log_ratios(ARRAYS)
    delta = BETA * np.mean([w, r])
    truth = -log_sigmoid(BETA * w - delta) - log_sigmoid(-(BETA * r - delta))
    np.testing.assert_allclose(each("bco_pair", reward_shift=shift)[0], truth, rtol=1e-5, atol=2e-6)

    def loss(shift):
        return each("bco_pair", reward_shift=shift)[0].sum()

    assert jax.grad(loss)(shift) == 0


def test_beta_may_be_traced():
    result = jax.jit(lambda beta: each("ipo", beta=beta)[0])(jnp.float32(BETA))
    np.testing.assert_allclose(result, each("ipo")[0], rtol=1e-5)


def test_metrics():
    w, r = log_ratios(ARRAYS)
    where = np.arange(40) % 3 > 0
    loss, metrics = losses.dpo(**ARRAYS, beta=BETA, where=where)
    assert metrics.count == where.sum()
    assert metrics.preference_loss == loss
    assert metrics.nll == 0
    np.testing.assert_allclose(metrics.chosen_rewards, BETA * w[where].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics.rejected_rewards, BETA * r[where].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics.margins, BETA * (w - r)[where].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics.accuracy, (w > r)[where].mean(), rtol=1e-6)


def test_at_the_start_the_loss_is_log_2():
    same = {**ARRAYS, REF_PAIR[0]: ARRAYS[PAIR[0]], REF_PAIR[1]: ARRAYS[PAIR[1]]}
    loss, metrics = losses.dpo(**same)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics.margins == 0


def test_ipo_of_means_is_that_of_length_normalised_log_ratios():
    random = np.random.default_rng(9)
    tokens = random.uniform(-4, 0, (4, 6, 7)).astype(np.float32)
    where = random.random((2, 6, 7)) < 0.6
    where[..., 0] = True
    means = [
        losses.sequence_logprobs(array, where[place % 2], reduction="mean").logprobs
        for place, array in enumerate(tokens)
    ]
    result, _ = losses.dpo(*means, loss_type="ipo", beta=BETA)
    exact, counts = tokens.astype(np.float64), where.sum(axis=-1)
    w, r = (((exact[i] - exact[i + 2]) * where[i]).sum(axis=-1) / counts[i] for i in (0, 1))
    np.testing.assert_allclose(result, np.mean((w - r - 1 / (2 * BETA)) ** 2), rtol=1e-5)
