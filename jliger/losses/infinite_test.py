"""Tests that at log-probabilities of −∞, such as those of masked tokens, losses and gradients are the limits, by hand.

Those of all losses are in `losses_test.py`, where they are compiled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger import losses

ONE, MINUS_ONE, INFINITE = jnp.array([-0.5]), jnp.array([-1.0]), jnp.array([-jnp.inf])
TOKENS = jnp.array([[-1.0, -2.0]])
WITH_INFINITE = TOKENS.at[0, 1].set(-jnp.inf)
NO_RATIO = jnp.ones(1)


@pytest.mark.parametrize(
    ("loss", "at", "value", "grad"),
    [
        (lambda x: losses.grpo(x, NO_RATIO, old_logprobs=WITH_INFINITE), TOKENS, -1.1, [[-0.5, 0]]),
        (lambda x: losses.grpo(x, NO_RATIO, old_logprobs=TOKENS), WITH_INFINITE, -0.5, [[-0.5, 0]]),
        (lambda x: losses.grpo(x, NO_RATIO), WITH_INFINITE, -1, [[-0.5, -0.5]]),
        (lambda x: losses.grpo(x, 0 * NO_RATIO, old_logprobs=WITH_INFINITE), TOKENS, 0, [[0, 0]]),
        (lambda x: losses.grpo(x, NO_RATIO, ref_logprobs=WITH_INFINITE, beta=0.0), TOKENS, -1, [[-0.5, -0.5]]),
        (lambda x: losses.grpo(x, NO_RATIO, ref_logprobs=WITH_INFINITE, beta=jnp.zeros(())), TOKENS, -1, [[-0.5] * 2]),
        (lambda x: losses.orpo(x, INFINITE), ONE, 0.5, [-1]),
        (lambda x: losses.orpo(ONE, x, beta=0.0), INFINITE, 0.5, [0]),
        (lambda x: losses.cpo(ONE, x, label_smoothing=0.0), INFINITE, 0.5, [0]),
        (lambda x: losses.cpo(x, INFINITE, label_smoothing=0.1), INFINITE, np.inf, [-1 - 0.08 / 2]),
        (lambda x: losses.simpo(x, ONE), INFINITE, np.inf, [-2]),
        (lambda x: losses.kto(x, MINUS_ONE, jnp.array([False]), kl=0.0), INFINITE, 0, [0]),
    ],
)  # fmt: skip
def test_by_hand(loss, at, value, grad):
    result = jax.value_and_grad(lambda x: loss(x)[0])(at)
    np.testing.assert_allclose(result[0], value, rtol=1e-6)
    np.testing.assert_allclose(result[1], grad, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "options", "value"),
    [
        ("exo_pair", {"label_smoothing": 0.1}, -np.log(0.9)),
        ("robust", {}, 0),
        ("sigmoid", {"label_smoothing": 0.1}, np.inf),
        ("discopop", {"discopop_tau": 1.0}, 0),
    ],
)
def test_a_rejected_completion_of_probability_zero(loss_type, options, value):
    for chosen, rejected in ((ONE, INFINITE), (ONE, -1e8 * jnp.ones(1))):
        loss, metrics = losses.dpo(chosen, rejected, MINUS_ONE, MINUS_ONE, loss_type=loss_type, beta=1.0, **options)
        if np.isinf(value):
            assert loss > 1e6
        else:
            np.testing.assert_allclose(loss, value, rtol=1e-6)
        assert metrics.accuracy == 1
