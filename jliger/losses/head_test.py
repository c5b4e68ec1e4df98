"""Tests the losses on results of `jliger.linear_logprobs` against the same losses on full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger import losses

RANDOM = np.random.default_rng(0)
HIDDEN, KERNEL = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((6, 5, 8), (8, 13)))
LABELS = np.where(RANDOM.random((6, 5)) < 0.3, -100, RANDOM.integers(0, 13, (6, 5)))
LABELS[1] = -100
REF, OLD = RANDOM.uniform(-3, -1, (2, 6, 5)).astype(np.float32)
ADVANTAGES = RANDOM.normal(size=6).astype(np.float32)


def fused(hidden, kernel):
    result = jliger.linear_logprobs(hidden, kernel, LABELS)
    return result.logprobs, result.entropy


def with_full_logits(hidden, kernel):
    log_p = jax.nn.log_softmax(hidden @ kernel)
    logprobs = jnp.take_along_axis(log_p, jnp.maximum(LABELS, 0)[..., None], axis=-1)[..., 0]
    return logprobs, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def preference(reduction, loss):
    def of_tokens(logprobs, entropy):
        result = losses.sequence_logprobs(logprobs, LABELS != -100, reduction=reduction)
        reference = losses.sequence_logprobs(REF, LABELS != -100, reduction=reduction)
        counted = (result.counts > 0).reshape(2, 3).all(axis=0)
        pairs = (*jnp.split(result.logprobs, 2), *jnp.split(reference.logprobs, 2))
        return loss(*pairs, where=counted)

    return of_tokens


def policy(loss_type, level):
    def of_tokens(logprobs, entropy):
        return losses.grpo(
            logprobs, ADVANTAGES, where=LABELS != -100, old_logprobs=OLD, ref_logprobs=REF, entropy=entropy,
            loss_type=loss_type, importance_sampling_level=level, beta=0.1, entropy_coef=0.1, epsilon_high=2.0,
        )  # fmt: skip

    return of_tokens


LOSSES = {
    "dpo": preference("sum", losses.dpo),
    "orpo": preference("mean", lambda chosen, rejected, *_, where: losses.orpo(chosen, rejected, where=where)),
    "dapo": policy("dapo", "token"),
    "gspo": policy("grpo", "sequence"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_hidden_states_and_head(name, implementation):
    if implementation == "triton":
        pytest.skip("the head's own tests are for its kernels")

    def both(tokens):
        return jax.jit(jax.value_and_grad(lambda *inputs: LOSSES[name](*tokens(*inputs)), (0, 1), has_aux=True))

    with jax.default_matmul_precision("highest"):
        result, wanted = (both(tokens)(HIDDEN, KERNEL) for tokens in (fused, with_full_logits))
    for ours, truth in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=2e-6 * np.abs(truth).max())
    assert np.any(result[1][1])
    np.testing.assert_array_equal(result[1][0][1], 0)


def test_a_label_out_of_range_poisons_the_loss():
    labels = LABELS.copy()
    labels[0, 0] = 13
    tokens = jliger.linear_logprobs(HIDDEN, KERNEL, labels, implementation="xla")
    assert np.isnan(losses.grpo(tokens.logprobs, ADVANTAGES, where=labels != -100)[0])
