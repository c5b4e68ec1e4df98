"""tunix, in its newest release: loss, gradients and ten training steps with the recipe of docs/integrations.md.

That release has not yet what `jliger.integrations.tunix` needs, which is tested by a stand-in beside it.
"""

import importlib

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from tunix.models.gemma import model as gemma
from tunix.models.qwen3 import model as qwen3
from tunix.sft import peft_trainer

import jliger
from jliger.testing.heads import by_name

VOCAB, HIDDEN_SIZE, SHAPE = 37, 16, (2, 10)
STEPS = 10


def make_batch():
    """Tokens, a mask of those that are targets, and what tunix's models take beside them."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, VOCAB, SHAPE).astype(np.int32)
    mask = np.arange(SHAPE[1]) < np.array([[SHAPE[1]], [6]])
    causal = np.tril(np.ones((SHAPE[1], SHAPE[1]), bool)) & mask[:, None, :]
    positions = np.broadcast_to(np.arange(SHAPE[1], dtype=np.int32), SHAPE)
    return {"input_tokens": tokens, "input_mask": mask, "positions": positions, "attention_mask": causal}


def make_qwen3(tied):
    config = qwen3.ModelConfig(
        num_layers=2,
        vocab_size=VOCAB,
        embed_dim=HIDDEN_SIZE,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=tied,
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


def make_gemma():
    config = gemma.ModelConfig(
        num_layers=2,
        num_embed=VOCAB,
        embed_dim=HIDDEN_SIZE,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        final_logit_softcap=5.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(gemma.AttentionType.GLOBAL,) * 2,
    )
    return gemma.Gemma(config, rngs=nnx.Rngs(0))


def hidden_of(model, input_tokens, positions, attention_mask):
    """The last hidden states; under `jit` the logits, which nothing uses, are not computed."""
    model(input_tokens, positions, None, attention_mask, output_hidden_states=True)
    return nnx.pop(model, nnx.Intermediate)["all_hidden_states"].get_value()[-1]


# What replaces the trainer's loss, once hidden states are there: one line.


def loss_of_lm_head(model, input_tokens, input_mask, positions, attention_mask):
    hidden = hidden_of(model, input_tokens, positions, attention_mask)
    labels = jliger.shift_labels(input_tokens, input_mask)
    return jliger.fused_linear_cross_entropy(hidden, model.lm_head.w[...], labels)


def loss_of_tied(model, input_tokens, input_mask, positions, attention_mask):
    hidden = hidden_of(model, input_tokens, positions, attention_mask)
    labels = jliger.shift_labels(input_tokens, input_mask)
    return jliger.linen.fused_linear_cross_entropy({"embedding": model.embedder.input_embedding[...]}, hidden, labels)


def loss_of_softcapped(model, input_tokens, input_mask, positions, attention_mask):
    hidden = hidden_of(model, input_tokens, positions, attention_mask)
    labels, cap = jliger.shift_labels(input_tokens, input_mask), model.final_logits_softcap
    embedding = model.embedder.input_embedding[...]
    return jliger.fused_linear_cross_entropy(hidden, embedding, labels, kernel_layout="vh", logit_softcap=cap)


MODELS = {
    "lm_head": (lambda: make_qwen3(tied=False), loss_of_lm_head),
    "tied": (lambda: make_qwen3(tied=True), loss_of_tied),
    "softcapped": (make_gemma, loss_of_softcapped),
}


def trained_by_tunix(model, loss):
    """Loss and parameters after ten steps of tunix's trainer."""
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS)
    trainer = peft_trainer.PeftTrainer(model, optax.sgd(0.3), config)
    if loss is not None:
        trainer = trainer.with_loss_fn(loss)
    batch = make_batch()
    inputs = peft_trainer.TrainingInput(batch["input_tokens"], batch["input_mask"])
    trainer = trainer.with_gen_model_input_fn(lambda _: batch)
    trainer.train([inputs] * STEPS)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_tunix(kind):
    own_loss = peft_trainer._default_loss_fn
    make, loss = MODELS[kind]
    batch = make_batch()

    def named(function, model):
        value, grads = nnx.value_and_grad(function)(model, **batch)
        return {"loss": np.asarray(value), **by_name(jax.tree.map(np.asarray, nnx.to_pure_dict(grads)))}

    start, model = make(), make()
    before, after = nnx.state(start), nnx.state(trained_by_tunix(model, loss))
    for state in (before, after):
        nnx.update(start, state)
        assert_same_to_rounding(named(loss, start), named(own_loss, start))
    assert named(loss, model)["loss"] < 0.95 * named(loss, make())["loss"]
    # The trainer's own loss ends in the same place.
    own = nnx.state(trained_by_tunix(make(), None))
    assert_same_to_rounding(*(by_name(nnx.to_pure_dict(state)) for state in (after, own)), steps=STEPS)


def test_the_integration_names_the_version_that_it_needs():
    with pytest.raises(ImportError, match=r"google-tunix is 0\.1\.7, and jliger was tested with 0\.1\.8"):
        importlib.import_module("jliger.integrations.tunix")


def assert_same_to_rounding(found, expected, steps=1):
    """Roundings of each step add up."""
    for name, value in expected.items():
        little = 32 * steps * np.finfo(np.float32).eps * max(np.abs(value).max(), 1)
        np.testing.assert_allclose(found[name], value, rtol=0, atol=little, err_msg=name)
