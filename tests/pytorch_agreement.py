"""Compares the examples' decoders with what tests/golden/write_finetune.py wrote into a folder."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax

NAMES = ("llama", "qwen2", "qwen3", "gemma", "gemma2")


def losses_and_gradients(decoder: ModuleType) -> Callable:
    """A function of configuration, parameters, tokens and labels: loss, logits and gradients."""

    def loss_and_logits(config, params, tokens, labels):
        hidden = decoder.hidden_states(config, params, tokens)
        loss = decoder.loss_sum("jliger", config, params, hidden, labels) / jnp.sum(labels >= 0)
        return loss, decoder.full_logits(config, params, hidden)

    return jax.jit(jax.value_and_grad(loss_and_logits, argnums=1, has_aux=True), static_argnums=0)


def check_a_batch(pretrained: ModuleType, function: Callable, folder: Path) -> None:
    config, expected = pretrained.read_config(folder), np.load(folder / "expected.npz")
    params, gradients = (pretrained.load(folder / part, config, "float32") for part in (".", "gradients"))
    (loss, logits), found = function(config, params, expected["tokens"], expected["labels"])
    # Both are in float32, with values of some units: a few units in the last place.
    np.testing.assert_allclose(logits, expected["logits"], atol=3e-6)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def check_fifty_steps(pretrained: ModuleType, function: Callable, folder: Path) -> None:
    config, expected = pretrained.read_config(folder), np.load(folder / "expected.npz")
    params = pretrained.load(folder, config, "float32")
    optimizer = optax.adamw(1e-3, b2=0.95, eps=1e-6, weight_decay=0.1)

    @jax.jit
    def apply(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, generator, losses = optimizer.init(params), np.random.default_rng(1), []
    shape = expected["tokens"].shape
    assert len(expected["losses"]) == 50
    for _ in expected["losses"]:
        # As `random_batch` of the script that wrote the file.
        tokens = generator.integers(1, config.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
        labels = np.where(generator.random(shape) < 0.7, tokens[:, 1:], np.int32(-100))
        (loss, _), gradients = function(config, params, tokens[:, :-1], labels)
        params, state = apply(params, state, gradients)
        losses.append(loss)
    np.testing.assert_allclose(losses, expected["losses"], atol=2e-5)
