"""Tests that every operation works if JAX's implicit promotion of dtypes and ranks is forbidden."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jliger
from jliger import losses
from jliger.testing.oracle import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="is about the code around the kernels")

RANDOM = np.random.default_rng(0)
HIDDEN, KERNEL = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4), (4, 5)))
BIAS, CLASS_WEIGHTS = RANDOM.normal(size=5).astype(np.float32), RANDOM.uniform(size=5).astype(np.float32)
LABELS = np.array([[0, 1, 2], [3, 4, -100]], np.int32)
WHERE, WEIGHTS = LABELS != 1, np.ones((2, 3), np.float32)
ADAPTER = jliger.LinearAdapter(KERNEL[:, :2], KERNEL[:2], np.float32(0.5))


@pytest.fixture(autouse=True)
def no_implicit_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def cross_entropy(hidden, kernel, **options):
    return jliger.fused_linear_cross_entropy(hidden, kernel, LABELS, bias=BIAS, **options)


def all_options(hidden, kernel):
    loss, metrics = cross_entropy(
        hidden, kernel, adapter=ADAPTER, where=WHERE, weights=WEIGHTS, class_weights=CLASS_WEIGHTS,
        label_smoothing=0.1, z_loss=0.1, logit_scale=0.5, logit_softcap=3.0, normalizer=7, return_metrics=True,
    )  # fmt: skip
    return loss + jax.lax.stop_gradient(metrics.accuracy)


def approximated(hidden, kernel):
    options = {"where": WHERE, "weights": WEIGHTS, "class_weights": CLASS_WEIGHTS}
    options |= {"temperature": WEIGHTS, "z_loss": 0.1}
    in_8_bits = cross_entropy(hidden, kernel, products="float8", label_smoothing=0.1, logit_softcap=3.0, **options)
    return in_8_bits + cross_entropy(hidden, kernel, skip_gradients_below=0.1, adapter=ADAPTER, **options)


def of_logprobs(hidden, kernel):
    result = jliger.linear_logprobs(hidden, kernel, LABELS, bias=BIAS, adapter=ADAPTER)
    return result.logprobs.sum() + result.entropy.sum()


def fused_losses(hidden, kernel):
    options = {"bias": BIAS, "adapter": ADAPTER, "where": WHERE, "temperature": 0.5}
    of_grpo, metrics = losses.fused_linear_grpo(
        hidden, kernel, LABELS, WEIGHTS, old_logprobs=-WEIGHTS, loss_type="grpo", entropy_coef=0.1, **options
    )
    of_orpo, _ = losses.fused_linear_orpo(hidden[None], kernel, LABELS[None], **{**options, "where": WHERE[None]})
    return of_grpo + of_orpo + metrics.entropy


def distilled(hidden, kernel):
    options = {"student_bias": BIAS, "teacher_bias": BIAS, "labels": LABELS, "weights": WEIGHTS, "where": WHERE}
    of_kl = losses.fused_linear_kl(hidden, kernel, 2 * HIDDEN, KERNEL, **options, temperature=2.0)
    of_jsd = losses.fused_linear_jsd(hidden, kernel, 2 * HIDDEN, KERNEL, **options, hard_weight=0.5)
    top = jliger.linear_top_k(2 * HIDDEN, KERNEL, 3, bias=BIAS, where=WHERE, temperature=2.0)
    options = {"bias": BIAS, "labels": LABELS, "weights": WEIGHTS, "where": WHERE, "hard_weight": 0.5}
    of_top_k = losses.fused_linear_top_k_kl(hidden, kernel, *top[:2], **options, remainder=True, temperature=2.0)
    return of_kl + of_jsd + of_top_k


def of_medusa(hidden, kernel):
    heads = jliger.nnx.MedusaHeads(2, 4, 5, use_bias=True, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0))
    return heads.loss(hidden, np.stack([LABELS, LABELS]), weights=WEIGHTS, normalizer=np.array([2, 3]))


def around_a_head(hidden, kernel):
    normed, total = jliger.rms_norm(hidden, 1 + CLASS_WEIGHTS[:4], residual=hidden)
    normed = jliger.layer_norm(normed, BIAS[:4], BIAS[:4]) + total
    rotated = jliger.apply_rope(normed[..., None, :], np.arange(6).reshape(2, 3), rotary_fraction=0.5)[..., 0, :]
    normed = jliger.swiglu(rotated, jliger.geglu(normed, total))
    return jliger.gated_mlp(normed, kernel, kernel, kernel.T).astype(jnp.float32).sum()


# Flax promotes hidden states and parameters of two dtypes by JAX's rule, which is forbidden here.
@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        (cross_entropy, "float32"),
        (all_options, "bfloat16"),
        (approximated, "bfloat16"),
        (of_logprobs, "bfloat16"),
        (fused_losses, "bfloat16"),
        (distilled, "bfloat16"),
        (of_medusa, "float32"),
        (around_a_head, "bfloat16"),
    ],
)
def test_operations(operation, dtype):
    value, grads = jax.jit(jax.value_and_grad(operation, (0, 1)))(jnp.asarray(HIDDEN, dtype), jnp.asarray(KERNEL))
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(grad, np.float32)).all() for grad in grads)


def test_labels_and_accumulation():
    tokens, segments = np.arange(8).reshape(2, 4), np.ones((2, 4), np.int32)
    batch = jliger.shift_labels(tokens, tokens > 2, segment_ids=segments, by=range(1, 3))
    assert batch.shape == (2, 2, 4)

    def loss(kernel, batch):
        loss = jliger.fused_linear_cross_entropy(batch["hidden"], kernel, batch["labels"], reduction="sum")
        return loss, (batch["labels"] >= 0).sum()

    batch = {"hidden": jnp.asarray(HIDDEN), "labels": jnp.asarray(LABELS)}
    jliger.accumulate_gradients(loss, 2)(jnp.asarray(KERNEL), batch)
    tx = jliger.weighted_multi_steps(optax.sgd(1e-2), 2)
    tx.update(KERNEL, tx.init(KERNEL), KERNEL, weight=1.0)
