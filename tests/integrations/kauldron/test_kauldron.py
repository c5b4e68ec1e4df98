"""gemma with kauldron: loss, gradients and ten training steps are those of kauldron's own loss."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from gemma import gm
from gemma.gm.nn import _config, _modules
from kauldron import kd

from jliger.integrations.kauldron import FusedLinearCrossEntropy, WithHiddenStates

VOCAB, LENGTH, BATCH, STEPS = 67, 12, 4, 10
CONFIG = _config.TransformerConfig(
    num_embed=VOCAB, embed_dim=16, hidden_dim=32, num_heads=2, head_dim=8, num_kv_heads=1, final_logit_softcap=5.0,
    use_post_attn_norm=True, use_post_ffw_norm=True, attention_types=(_modules.AttentionType.GLOBAL,) * 2,
)  # fmt: skip


class Model(WithHiddenStates, gm.nn.Transformer):
    pass


def batches(mask):
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB, (STEPS * BATCH, LENGTH + 1)).astype(np.int32)
    weights = (np.arange(LENGTH) < random.integers(1, LENGTH + 1, (STEPS * BATCH, 1))).astype(np.float32)
    data = {"input": tokens[:, :-1], "target": tokens[:, 1:, None]}
    if mask:
        data["mask"] = (weights * random.choice([0.5, 1.0], weights.shape))[..., None]
    return [{name: array[i] for name, array in data.items()} for i in range(STEPS * BATCH)]


def train(model, loss, steps, mask, dtype):
    """Parameters before and after training, and each step's loss. Plain gradient descent: a step shows the gradient."""
    loss = dataclasses.replace(loss, mask="batch.mask" if mask else None)
    trainer = kd.train.Trainer(
        train_ds=kd.data.py.DataSource(
            data_source=batches(mask), shuffle=False, batch_size=BATCH, num_workers=0, num_epochs=1
        ),
        model=model(config=CONFIG, tokens="batch.input", dtype=dtype),
        train_losses={"xent": loss},
        optimizer=optax.sgd(0.02),
        num_train_steps=steps,
    )
    state = trainer.init_state()
    start = jax.tree.map(lambda array: np.asarray(array, np.float32), state.params)
    losses = []
    for _, batch in zip(range(steps), trainer.train_ds, strict=False):
        state, aux = trainer.trainstep.step(state, batch, return_losses=True)
        losses.append(aux.loss_states["xent"].compute())
    return start, jax.tree.map(lambda array: np.asarray(array, np.float32), state.params), losses


CASES = [
    (1, True, "float32", "values"), (10, True, "float32", "mask"), (1, False, "float32", "mask"),
    (1, True, "bfloat16", "mask"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "mask", "dtype", "normalize_by"), CASES)
def test_training(steps, mask, dtype, normalize_by):
    options: dict[str, Any] = {"normalize_by": normalize_by, "weight": 2.0}
    own = kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds.logits", labels="batch.target", **options)
    fused = FusedLinearCrossEntropy(
        hidden="preds.hidden_states", kernel="params.embedder.input_embedding", labels="batch.target",
        logit_softcap=CONFIG.final_logit_softcap, **options,
    )  # fmt: skip
    _, expected, expected_losses = train(gm.nn.Transformer, own, steps, mask, dtype)
    start, found, losses = train(Model, fused, steps, mask, dtype)

    # Of the largest change. Ten steps enlarge differences; parameters in bfloat16 are rounded too.
    tolerance = 3e-2 if dtype == "bfloat16" else 1e-5 if steps == 1 else 1e-3
    rounding = 2**-7 if dtype == "bfloat16" else 0
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5 if dtype == "float32" else 5e-3)
    for before, one, other in zip(*map(jax.tree.leaves, (start, found, expected)), strict=True):
        change = np.abs(other - before).max()
        np.testing.assert_allclose(one, other, rtol=rounding, atol=tolerance * change + 1e-7)


def test_losses_of_tokens():
    random = np.random.default_rng(0)
    hidden, kernel = random.normal(size=(2, 3, 8)).astype(np.float32), random.normal(size=(8, 5)).astype(np.float32)
    labels = random.integers(0, 5, (2, 3, 1))
    loss = FusedLinearCrossEntropy(kernel_layout="hv", hidden="h", kernel="k", labels="l")
    expected = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels[..., 0])
    np.testing.assert_allclose(
        loss.get_values(hidden=hidden, kernel=kernel, labels=labels)[..., 0], expected, rtol=1e-5
    )


def test_guide():
    guide = (Path(__file__).parents[3] / "docs" / "integrations.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL) if "Gemma3_1B" in block)
    names = {"gm": gm}
    exec(block, names)
    assert names["loss"].logit_softcap is names["model"].config.final_logit_softcap
