"""What docs/heads.md shows, runs."""

import re
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jliger

GUIDE = (Path(__file__).parent.parent / "docs" / "heads.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)\n *```", GUIDE, flags=re.DOTALL)]
SIZE, VOCAB, SHAPE = 8, 11, (3, 6)


def block_with(text):
    (found,) = (block for block in BLOCKS if text in block)
    return found


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
