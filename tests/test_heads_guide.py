"""What docs/heads.md shows, runs; its recipe for tunix trains as tunix's own loss does."""

import re
import sys
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, struct

import jliger

GUIDE = (Path(__file__).parent.parent / "docs" / "heads.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)\n *```", GUIDE, flags=re.DOTALL)]
SIZE, VOCAB, SHAPE = 8, 11, (3, 6)


def block_with(text):
    (found,) = (block for block in BLOCKS if text in block)
    return found


# ---- tunix -------------------------------------------------------------------------------------------------------


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
    """Called as tunix's models are."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, SIZE, rngs=rngs)
        self.lm_head = nnx.Dict(w=nnx.Param(rngs.params.normal((SIZE, VOCAB))))

    def __call__(self, tokens, positions, cache, attention_mask, skip_lm_head=False):
        hidden = jnp.tanh(self.embed(tokens)) + positions[..., None]
        return (hidden if skip_lm_head else hidden @ self.lm_head.w[...]), cache


class Trainer:
    """Tunix's trainer, as far as a loss sees it: sums' gradients over sums' weights, or means of means' gradients."""

    def with_loss_fn(self, loss_fn):
        self.loss_fn = loss_fn
        return self

    def train(self, microbatches, gradient_accumulation_steps):
        graph, params = nnx.split(Model(nnx.Rngs(0)))

        def summed(params, batch):
            out = self.loss_fn(nnx.merge(graph, params), **batch)
            if isinstance(out, LossOutput):
                return out.primary_loss.unreduced_sum, out.primary_loss.denominator
            return out, 1.0

        @jax.jit
        def updated(params, batches):
            found = [jax.grad(summed, has_aux=True)(params, batch) for batch in batches]
            weight = sum(denominator for _, denominator in found)
            return jax.tree.map(
                lambda old, *each: old - 0.3 * sum(each) / weight, params, *(grads for grads, _ in found)
            )

        for start in range(0, len(microbatches), gradient_accumulation_steps):
            params = updated(params, microbatches[start : start + gradient_accumulation_steps])
        return nnx.to_pure_dict(params)


def own_loss(model, input_tokens, input_mask, positions, attention_mask):
    """Tunix's: of full logits, without the last, for the next token where the mask has it."""
    logits, _ = model(input_tokens, positions, None, attention_mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], input_tokens[:, 1:])
    counted = input_mask[:, 1:]
    return LossOutput(WeightedMetric(jnp.sum(losses * counted), jnp.sum(counted), eps=1e-8), {})


def make_microbatch(random, longest):
    lengths = random.integers(2, longest + 1, (SHAPE[0], 1))
    return {
        "input_tokens": random.integers(0, VOCAB, SHAPE),
        "input_mask": np.arange(SHAPE[1]) < lengths,
        "positions": np.broadcast_to(np.arange(SHAPE[1], dtype=np.float32) / 8, SHAPE),
        "attention_mask": np.ones((SHAPE[0], SHAPE[1], SHAPE[1]), bool),
    }


def test_tunix_with_gradient_accumulation(monkeypatch):
    utils = types.ModuleType("tunix.sft.utils")
    utils.LossOutput, utils.WeightedMetric = LossOutput, WeightedMetric
    for name in ("tunix", "tunix.sft"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "tunix.sft.utils", utils)
    names = {"jliger": jliger, "trainer": Trainer()}
    exec(block_with("LossOutput"), names)

    random = np.random.default_rng(0)
    microbatches = [make_microbatch(random, longest) for longest in (6, 2, 3, 6)]
    found = names["trainer"].train(microbatches, 2)
    own = Trainer().with_loss_fn(own_loss).train(microbatches, 2)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


# ---- all others --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def names():
    """What the guide's lines take for granted."""
    random = np.random.default_rng(1)
    rngs = nnx.Rngs(0)
    tokens = jnp.asarray(random.integers(0, VOCAB, SHAPE), jnp.int32)
    dense = linen.Dense(VOCAB).init(jax.random.key(0), jnp.ones((1, SIZE)))["params"]
    hidden = jnp.asarray(random.normal(size=(*SHAPE, SIZE)), jnp.float32)
    return {
        "jax": jax, "jnp": jnp, "nn": linen, "jliger": jliger,
        "model": nnx.Dict(lm_head=jliger.nnx.LMHead(SIZE, VOCAB, use_bias=False, rngs=rngs)),
        "self": types.SimpleNamespace(embed=nnx.Embed(VOCAB, SIZE, rngs=rngs)),
        "params": {"logitdense": dense},
        "hidden_size": SIZE, "vocab_size": VOCAB, "hidden": hidden, "tokens": tokens,
        "mask": jnp.asarray(np.arange(SHAPE[1]) < np.array([[6], [4], [3]])),
        "labels": tokens, "next_tokens": tokens, "k": 2, "depth_weights": jnp.array([1.0, 0.5]),
    }  # fmt: skip


def run(text, names):
    """What a block of the guide leaves, compiled as one."""
    found = dict(names)

    def block():
        exec(block_with(text), found)
        return {name: found[name] for name in ("loss", "labels", "weights") if name in found}

    return jax.jit(block)()


@pytest.mark.parametrize(
    "text",
    ["jliger.nnx.linear_logprobs", "logitdense", "LMHead(", "LMHead.tied", "by=range(1, k + 1))  #", "MedusaHeads"],
)
def test_what_the_guide_shows(names, text):
    # Traced is enough to see whether it fits; what these compute, other tests see to.
    jax.eval_shape(lambda: exec(block_with(text), {**names, "rngs": nnx.Rngs(0)}))


def test_one_head_and_several_hidden_states(names):
    hidden = jnp.stack([names["hidden"], -names["hidden"]])
    found = run("depth_weights[:, None, None]", {**names, "hidden": hidden})
    logits, labels = hidden @ names["model"].lm_head.kernel[...], found["labels"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    weights = found["weights"] * (labels != -100)
    np.testing.assert_allclose(found["loss"], (losses * weights).sum() / weights.sum(), rtol=1e-5)


def test_gemma(names):
    embedding, hidden, targets = names["self"].embed.embedding[...], names["hidden"], names["tokens"]

    def apply(variables, tokens, return_hidden_states):
        assert return_hidden_states
        return types.SimpleNamespace(hidden_states=hidden)

    model, params = types.SimpleNamespace(apply=apply), {"embedder": {"input_embedding": embedding}}
    found = run("input_embedding", {**names, "model": model, "params": params, "targets": targets, "softcap": 5.0})
    logits = 5 * jnp.tanh(hidden @ embedding.T / 5)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(found["loss"], losses.mean(where=names["mask"]), rtol=1e-5)
