"""examples/finetune.py and what it stands on, against golden files that PyTorch wrote (tests/golden/write_finetune.py)."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import decoder
import pretrained
from pretrained import PretrainedError

GOLDEN = Path(__file__).parent / "golden" / "finetune"
NAMES = sorted(path.name for path in GOLDEN.iterdir())


def loss_and_logits(config, params, tokens, labels):
    hidden = decoder.hidden_states(config, params, tokens)
    loss = decoder.loss_sum("jliger", config, params, hidden, labels) / jnp.sum(labels >= 0)
    return loss, decoder.full_logits(config, params, hidden)


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients_are_those_of_pytorch(name):
    config = pretrained.read_config(GOLDEN / name)
    params, gradients = (pretrained.load(folder, config, np.float32) for folder in (GOLDEN / name, GOLDEN / name / "gradients"))
    expected = np.load(GOLDEN / name / "expected.npz")
    function = jax.jit(jax.value_and_grad(loss_and_logits, argnums=1, has_aux=True), static_argnums=0)
    (loss, logits), ours = function(config, params, expected["tokens"], expected["labels"])
    print(name, np.abs(logits - expected["logits"]).max(), np.abs(logits).max(), loss - expected["loss"],
          max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()/np.abs(b).max()), ours, gradients))))
    step = 0
    opt = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1)
    state = opt.init(params)
    update = jax.jit(opt.update)
    gen = np.random.default_rng(1)
    losses = []
    for _ in range(50):
        tokens = gen.integers(1, config.vocab_size, (2, 13))
        counts = gen.random((2, 12)) < 0.7
        labels = np.where(counts, tokens[:, 1:], -100)
        (loss, _), g = function(config, params, jnp.asarray(tokens[:, :-1], jnp.int32), jnp.asarray(labels, jnp.int32))
        u, state = update(g, state, params)
        params = optax.apply_updates(params, u)
        losses.append(float(loss))
    print(np.abs(np.array(losses) - expected["losses"]).max(), losses[0], losses[-1])
