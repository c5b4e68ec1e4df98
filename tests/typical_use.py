"""Typical use of the public API, for type checkers: `.ci/run` checks that they find the types below, and no errors."""

from typing import assert_type

import jax
from flax import linen as nn
from flax import nnx

import jliger
from jliger import losses


def operations(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> None:
    assert_type(jliger.fused_linear_cross_entropy(hidden, kernel, labels), jax.Array)
    assert_type(jliger.fused_linear_cross_entropy(hidden, kernel, labels, z_loss=1e-4, reduction="none"), jax.Array)
    loss, metrics = jliger.fused_linear_cross_entropy(hidden, kernel, labels, label_smoothing=0.1, return_metrics=True)
    assert_type(loss, jax.Array)
    assert_type(metrics, jliger.CrossEntropyMetrics)
    result = jliger.linear_logprobs(hidden, kernel, labels, where=labels != 0, temperature=0.7)
    assert_type(result.logprobs, jax.Array)
    jax.value_and_grad(jliger.fused_linear_cross_entropy, (0, 1))(hidden, kernel, labels)


def losses_of_logprobs(hidden: jax.Array, kernel: jax.Array, tokens: jax.Array, advantages: jax.Array) -> None:
    def loss_fn(result: jliger.LinearLogprobs, advantage: jax.Array) -> jax.Array:
        return -advantage * result.logprobs

    loss = jliger.fused_linear_loss(loss_fn, hidden, kernel, tokens, (advantages,), units="tokens", temperature=0.7)
    assert_type(loss, jax.Array)
    loss, _ = jliger.fused_linear_loss(
        lambda result: (result.logprobs.sum(), 1), hidden, kernel, tokens, units="rows", has_aux=True
    )
    assert_type(loss, jax.Array)
    loss, metrics = losses.fused_linear_grpo(hidden, kernel, tokens, advantages, beta=0.1, where=tokens != 0)
    assert_type(loss, jax.Array)
    assert_type(metrics, losses.PolicyMetrics)


def distillation(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> None:
    assert_type(losses.fused_linear_kl(hidden, kernel, hidden, kernel, direction="reverse"), jax.Array)
    loss, metrics = losses.fused_linear_jsd(
        hidden,
        kernel,
        hidden,
        kernel,
        beta=0.1,
        labels=labels,
        hard_weight=0.5,
        student_logit_scale=2.0,
        return_metrics=True,
    )
    assert_type(loss, jax.Array)
    assert_type(metrics, losses.DistillationMetrics)
    top = jliger.linear_top_k(hidden, kernel, 64, where=labels != 0, temperature=2.0)
    assert_type(top, jliger.LinearTopK)
    assert_type(losses.fused_linear_top_k_kl(hidden, kernel, top.ids, top.logprobs, temperature=2.0), jax.Array)
    loss, metrics = losses.fused_linear_top_k_kl(
        hidden, kernel, top.ids, top.logprobs, normalize="top_k", labels=labels, hard_weight=0.5, return_metrics=True
    )
    assert_type(loss, jax.Array)
    assert_type(metrics, losses.DistillationMetrics)


def flax_heads(layer: nnx.Linear, module: nn.Dense, hidden: jax.Array, labels: jax.Array) -> None:
    head = jliger.nnx.LMHead(8, 32, logit_softcap=30.0, rngs=nnx.Rngs(0))
    assert_type(head.loss(hidden, labels, reduction="sum"), jax.Array)
    loss, metrics = head.loss(hidden, labels, return_metrics=True)
    assert_type(loss, jax.Array)
    assert_type(metrics.accuracy, jax.Array)
    assert_type(head.logprobs(hidden, labels, keep_logits=True), jliger.LinearLogprobs)
    assert_type(jliger.nnx.fused_linear_cross_entropy(layer, hidden, labels, logit_scale=0.5), jax.Array)
    assert_type(jliger.linen.fused_linear_cross_entropy(module, hidden, labels), jax.Array)
    total, _ = jliger.linen.MedusaHeads(3, 32).loss(hidden, labels, head_weights=[1, 1, 1], return_metrics=True)
    assert_type(total, jax.Array)


def either(return_metrics: bool, hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> None:
    assert_type(
        jliger.fused_linear_cross_entropy(hidden, kernel, labels, return_metrics=return_metrics),
        jax.Array | tuple[jax.Array, jliger.CrossEntropyMetrics],
    )
