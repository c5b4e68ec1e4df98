"""levanter: loss, gradients and ten training steps are those of its own implementation."""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from haliax import Axis
from levanter.kernels.pallas.fused_cross_entropy_loss import api
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from levanter.models.lm_model import LmExample

from jliger.integrations import levanter as integration

CONFIG = LlamaConfig(
    max_seq_len=12, hidden_dim=16, intermediate_dim=32, num_layers=2, num_heads=2, num_kv_heads=1,
    gradient_checkpointing=False,
)  # fmt: skip
Vocab, Batch, Pos = Axis("vocab", 67), Axis("batch", 4), CONFIG.max_Pos
OPTIONS = {"logsumexp_weight": 1e-3, "logit_soft_cap": 5.0}


@pytest.fixture
def install(monkeypatch):
    """Installs, and takes it back afterwards."""
    monkeypatch.setattr(api, "_default_implementations", api._default_implementations)
    return integration.install


def batches():
    random = np.random.default_rng(0)
    for _ in range(10):
        tokens = hax.named(jnp.asarray(random.integers(0, Vocab.size, (Batch.size, Pos.size))), (Batch, Pos))
        lengths = random.integers(2, Pos.size + 1, (Batch.size, 1))
        weight = hax.named(jnp.asarray(np.arange(Pos.size) < lengths, jnp.float32), (Batch, Pos))
        yield LmExample(tokens=tokens, loss_weight=weight)


def train(dtype):
    """The first gradients, each step's loss, and the parameters after ten steps."""
    model = LlamaLMHeadModel.init(Vocab, CONFIG, key=jax.random.key(0))
    optimizer = optax.sgd(0.3)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, example):
        def loss(model):
            model = jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, model)
            return model.compute_next_token_loss(example, **OPTIONS).scalar()

        value, gradients = eqx.filter_value_and_grad(loss)(model)
        updates, state = optimizer.update(gradients, state)
        return value, gradients, eqx.apply_updates(model, updates), state

    steps = []
    for example in batches():
        value, gradients, model, state = step(model, state, example)
        steps.append((value, gradients))
    return jax.tree.leaves(steps[0][1]), [float(value) for value, _ in steps], jax.tree.leaves(model)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_training(install, dtype):
    expected_gradients, expected_losses, expected = train(dtype)
    install()
    gradients, losses, found = train(dtype)
    assert losses != expected_losses  # another implementation, which rounds differently
    exact = dtype == jnp.float32
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5 if exact else 1e-2)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=(1e-5 if exact else 3e-2) * np.abs(other).max() + 1e-9)
    if exact:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=5e-5)


def test_as_an_argument():
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((24, 16), (16, 67)))
    labels = jnp.asarray(random.integers(0, 67, 24))
    options = {"reduction": None, "return_argmax": True, **OPTIONS}
    expected, expected_argmax = api.fused_cross_entropy_loss_and_logsumexp_penalty(
        x, labels, w, implementation="reference", **options
    )
    found, argmax = api.fused_cross_entropy_loss_and_logsumexp_penalty(
        x, labels, w, implementation=integration.cross_entropy, **options
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(argmax, expected_argmax)
