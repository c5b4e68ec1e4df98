"""tunix, by a stand-in with the interface of its source of 2026-08-21: the same training and log-probabilities."""

import importlib
import importlib.metadata
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

SIZE, VOCAB, SHAPE, SOFTCAP = 8, 11, (3, 6), 5.0


@struct.dataclass
class WeightedMetric:
    unreduced_sum: jax.Array
    denominator: jax.Array
    eps: float | None = struct.field(default=None, pytree_node=False)


@struct.dataclass
class LossOutput:
    primary_loss: WeightedMetric
    aux_metrics: dict


class Model(nnx.Module):
    """Called as tunix's models are: untied as Qwen 3 and Llama 3, tied and with a softcap as Gemma."""

    def __init__(self, rngs, tied):
        self.config = types.SimpleNamespace(final_logit_softcap=SOFTCAP if tied else None)
        self.embedder = nnx.Dict(input_embedding=nnx.Param(rngs.params.normal((VOCAB, SIZE))))
        if not tied:
            self.lm_head = nnx.Dict(w=nnx.Param(rngs.params.normal((SIZE, VOCAB))))

    def __call__(self, tokens, positions, cache, attention_mask, skip_lm_head=False):
        hidden = jnp.tanh(self.embedder.input_embedding[...][tokens]) + positions[..., None] / 8
        return (hidden if skip_lm_head else self.compute_final_logits(hidden)), cache

    def compute_final_logits(self, hidden):
        if hasattr(self, "lm_head"):
            return hidden @ self.lm_head.w[...]
        return SOFTCAP * jnp.tanh(hidden @ self.embedder.input_embedding[...].T / SOFTCAP)


@pytest.fixture
def integration(monkeypatch):
    names = ["tunix", "tunix.rl", "tunix.rl.common", "tunix.sft", "tunix.sft.utils"]
    modules = {name: types.ModuleType(name) for name in names}
    modules["tunix.sft.utils"].LossOutput, modules["tunix.sft.utils"].WeightedMetric = LossOutput, WeightedMetric
    modules["tunix.rl"].common = modules["tunix.rl.common"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", {"google-tunix": "0.1.8"}.get)
    # Afterwards the module is gone, as before: it has imported the stand-in.
    monkeypatch.setitem(sys.modules, "jliger.integrations.tunix", None)
    del sys.modules["jliger.integrations.tunix"]
    return importlib.import_module("jliger.integrations.tunix")


def make_batch(random, longest):
    lengths = random.integers(2, longest + 1, (SHAPE[0], 1))
    return {
        "input_tokens": random.integers(0, VOCAB, SHAPE),
        "input_mask": np.arange(SHAPE[1]) < lengths,
        "positions": np.broadcast_to(np.arange(SHAPE[1]), SHAPE),
        "attention_mask": np.ones((SHAPE[0], SHAPE[1], SHAPE[1]), bool),
    }


def own_loss(model, input_tokens, input_mask, positions, attention_mask):
    """Tunix's: of full logits, without the last, for the next token where the mask has it."""
    logits, _ = model(input_tokens, positions, None, attention_mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], input_tokens[:, 1:])
    counted = input_mask[:, 1:]
    return LossOutput(WeightedMetric(jnp.sum(losses * counted), jnp.sum(counted), eps=1e-8), {})


def train(loss_fn, microbatches, gradient_accumulation_steps):
    """Tunix's trainer, as far as a loss sees it: it divides sums of gradients by the number of tokens."""
    graph, params = nnx.split(Model(nnx.Rngs(0), tied=False))

    def summed(params, batch):
        out = loss_fn(nnx.merge(graph, params), **batch).primary_loss
        return out.unreduced_sum, out.denominator

    @jax.jit
    def updated(params, batches):
        results = [jax.grad(summed, has_aux=True)(params, batch) for batch in batches]
        weight = sum(denominator for _, denominator in results)
        return jax.tree.map(lambda old, *each: old - 0.3 * sum(each) / weight, params, *(grads for grads, _ in results))

    for start in range(0, len(microbatches), gradient_accumulation_steps):
        params = updated(params, microbatches[start : start + gradient_accumulation_steps])
    return nnx.to_pure_dict(params)


def test_fine_tuning_with_gradient_accumulation(integration):
    random = np.random.default_rng(0)
    microbatches = [make_batch(random, longest) for longest in (6, 2, 3, 6)]
    found, own = train(integration.loss_fn, microbatches, 2), train(own_loss, microbatches, 2)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_log_probabilities(integration):
    integration.install()
    common = sys.modules["tunix.rl.common"]
    graph, params = nnx.split(Model(nnx.Rngs(0), tied=True))
    batch = make_batch(np.random.default_rng(0), 6)
    tokens, positions, mask = batch["input_tokens"], batch["positions"], batch["attention_mask"]

    @jax.jit
    def found(params):
        model = nnx.merge(graph, params)
        hidden, _ = model(tokens, positions, None, mask, skip_lm_head=True)
        logps, entropy = common.compute_chunked_logps(model, hidden[:, :-1], tokens[:, 1:], 0.7, 4, True)
        kept = common.get_per_token_logps(
            model, input_tokens=tokens, positions=positions, attn_mask=mask, logits_to_keep=3
        )
        return logps, entropy, kept

    def expected(params):
        logits, _ = nnx.merge(graph, params)(tokens, positions, None, mask)
        logprobs = jax.nn.log_softmax(logits[:, :-1] / 0.7)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        kept = jax.nn.log_softmax(logits[:, 2:-1])
        taken = [jnp.take_along_axis(x, tokens[:, -x.shape[1] :, None], -1)[..., 0] for x in (logprobs, kept)]
        return taken[0], entropy, taken[1]

    for one, other in zip(found(params), expected(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_the_head_is_not_left_out(integration):
    model = Model(nnx.Rngs(0), tied=False)
    model.lm_head["w_lora_a"] = nnx.Param(jnp.zeros((SIZE, 2)))
    with pytest.raises(NotImplementedError, match="LoRA adapter, which would be left out"):
        integration.head_arguments(model, jnp.zeros((*SHAPE, SIZE)))
