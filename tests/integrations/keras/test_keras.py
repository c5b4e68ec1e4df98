"""Keras: loss, gradients and ten training steps are those of keras-hub's own compile."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import keras_hub
import numpy as np
import pytest

from jliger.integrations.keras import FusedCausalLM

VOCAB, LENGTH, BATCH = 61, 12, 6
SIZES = {"vocabulary_size": VOCAB, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32}
BACKBONES = {
    "gemma": lambda dtype: keras_hub.models.GemmaBackbone(
        **SIZES, num_query_heads=2, num_key_value_heads=1, head_dim=8, final_logit_soft_cap=5.0, dtype=dtype
    ),
    "llama, untied": lambda dtype: keras_hub.models.LlamaBackbone(
        **SIZES, num_query_heads=2, num_key_value_heads=1, dtype=dtype
    ),
}
CASES = [
    ("gemma", "float32", 1), ("gemma", "float32", 10), ("llama, untied", "float32", 10), ("gemma", "mixed_bfloat16", 1),
]  # fmt: skip
RATE = 0.5


def causal_lm(name, dtype):
    keras.utils.set_random_seed(0)
    model = {"gemma": keras_hub.models.GemmaCausalLM, "llama, untied": keras_hub.models.LlamaCausalLM}[name]
    return model(backbone=BACKBONES[name](dtype))


def data():
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB, (10 * BATCH, LENGTH + 1))
    mask = np.arange(LENGTH) < random.integers(1, LENGTH + 1, (10 * BATCH, 1))
    return {"token_ids": tokens[:, :-1], "padding_mask": mask.astype(int)}, tokens[:, 1:], mask.astype("float32")


def train(model, steps):
    """The variables and the logs after some steps of plain gradient descent, one of which shows the gradient."""
    model.compile(optimizer=keras.optimizers.SGD(RATE))
    x, y, weights = data()
    count = steps * BATCH
    logs = model.fit(
        {name: array[:count] for name, array in x.items()}, y[:count], sample_weight=weights[:count],
        batch_size=BATCH, shuffle=False, verbose=0,
    ).history  # fmt: skip
    return [np.asarray(variable, np.float32) for variable in model.trainable_variables], logs


@pytest.mark.parametrize(("name", "dtype", "steps"), CASES)
def test_training(name, dtype, steps):
    start = [np.asarray(variable, np.float32) for variable in causal_lm(name, dtype).trainable_variables]
    expected, expected_logs = train(causal_lm(name, dtype), steps)
    model = causal_lm(name, dtype)
    found, logs = train(FusedCausalLM(model), steps)

    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert logs.keys() == expected_logs.keys() == {"loss", "sparse_categorical_accuracy"}
    np.testing.assert_allclose(logs["loss"], expected_logs["loss"], rtol=tolerance)
    accuracy = "sparse_categorical_accuracy"
    np.testing.assert_allclose(logs[accuracy], expected_logs[accuracy], atol=1e-6 if dtype == "float32" else 0.05)
    for before, one, other in zip(start, found, expected, strict=True):
        change = other - before
        np.testing.assert_allclose(one - before, change, rtol=0, atol=tolerance * np.abs(change).max() + 1e-7)
    # The variables are those of the model that was passed.
    np.testing.assert_array_equal(np.asarray(model.backbone.token_embedding.embeddings), found[0])


def test_losses_of_compile_are_refused():
    with pytest.raises(ValueError, match="loss got 'mse'; leave it out"):
        FusedCausalLM(causal_lm("gemma", "float32")).compile(loss="mse")
