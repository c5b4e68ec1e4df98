"""Heads as models hold them, changed in one to three lines: the model's own loss and gradients, also after training.

Small models hold theirs as flax's lm1b and gemma examples do. Tunix and gemma are tested where they are installed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jliger
from jliger.testing.heads import as_float64, by_name
from jliger.testing.oracle import assert_rule_of_two

VOCAB, HIDDEN_SIZE, SHAPE = 37, 16, (4, 12)
STEPS = 10

Loss = Callable[[Any], jax.Array]


@pytest.fixture(autouse=True)
def float32_products():
    """On GPUs too, where those of TensorFloat-32 would be further off than what is allowed here."""
    with jax.default_matmul_precision("highest"):
        yield


def entropy_of_smoothing(label_smoothing):
    """What flax's examples take off the loss: the least that it can be."""
    low = label_smoothing / (VOCAB - 1)
    return -((1 - label_smoothing) * np.log1p(-label_smoothing) + label_smoothing * np.log(low + 1e-20))


def weighted_cross_entropy(logits, targets, weights, label_smoothing=0.0):
    """The loss of flax's examples."""
    on_label, elsewhere = 1 - label_smoothing, label_smoothing / (VOCAB - 1)
    soft_targets = jnp.where(targets[..., None] == jnp.arange(VOCAB), on_label, elsewhere)
    loss = -jnp.sum(soft_targets * jax.nn.log_softmax(logits), axis=-1) - entropy_of_smoothing(label_smoothing)
    return jnp.sum(loss * weights) / weights.sum()


def in_float64_too(hidden):
    return {"implementation": "xla"} if hidden.dtype == jnp.float64 else {}


def make_tokens(seed=0):
    """Tokens, the last ones of which are padding, 0."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, SHAPE[1], (SHAPE[0], 1))
    return np.where(np.arange(SHAPE[1]) < lengths, random.integers(1, VOCAB, SHAPE), 0).astype(np.int32)


# An epsilon well above the rounding of gradients, which Adam would make large otherwise.
OPTIMIZER = optax.adamw(1e-2, eps=1e-6)


@jax.jit
def updated(params, state, grads):
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def trained(loss_and_grads: Callable[[Any], tuple[jax.Array, Any]], params: Any) -> Any:
    state = OPTIMIZER.init(params)
    for _ in range(STEPS):
        params, state = updated(params, state, loss_and_grads(params)[1])
    return params


def named(loss_and_grads: tuple[jax.Array, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in by_name(loss_and_grads).items()}


def assert_same(found: Loss, own: Loss, params: Any) -> None:
    """Loss and gradients of every parameter, before and after ten steps, are the model's own to rounding."""
    found, own = jax.jit(jax.value_and_grad(found)), jax.jit(jax.value_and_grad(own))
    for each in (params, trained(own, params)):
        with jax.enable_x64(True):
            truth = named(own(as_float64(each)))
        assert_rule_of_two(named(found(each)), named(own(each)), truth)
    # Trained each by itself they go the same way, further than roundings of float32 would let one see.
    with jax.enable_x64(True):
        start = as_float64(params)
        results = [named(function(trained(function, start))) for function in (found, own)]
        for name, value in results[1].items():
            size = max(np.abs(value).max(), 1)
            np.testing.assert_allclose(results[0][name], value, rtol=0, atol=1e-10 * size, err_msg=name)
        assert results[1]["0"] < 0.95 * own(start)[0]


# ---- flax's lm1b example (Linen) -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Targets:
    tokens: Any
    weights: Any
    label_smoothing: float


class TransformerLM(nn.Module):
    """Of the example's decoder what is at its ends: it shifts its inputs itself, so that these are its targets."""

    logits_via_embedding: bool
    head: type[nn.Dense] = nn.Dense

    @nn.compact
    def __call__(self, inputs, targets=None):
        embed = nn.Embed(VOCAB, HIDDEN_SIZE, embedding_init=nn.initializers.normal(1.0))
        y = embed(jnp.pad(inputs, ((0, 0), (1, 0)))[:, :-1])
        y = y + nn.Dense(HIDDEN_SIZE)(nn.relu(nn.Dense(32)(nn.LayerNorm()(y))))
        y = nn.LayerNorm(name="encoderdecoder_norm")(y)
        if self.logits_via_embedding:
            if targets is not None:
                return self.loss(embed, y, targets, logit_scale=HIDDEN_SIZE**-0.5)
            return embed.attend(y) / np.sqrt(HIDDEN_SIZE)
        init = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ("embed", "vocab"))
        logitdense = self.head(VOCAB, kernel_init=init, bias_init=nn.initializers.normal(1e-6), name="logitdense")
        return logitdense(y) if targets is None else self.loss(logitdense, y, targets)

    def loss(self, head, y, targets, **options):
        """What is new: the one line that is called in place of the head."""
        options |= {"weights": targets.weights, "label_smoothing": targets.label_smoothing, **in_float64_too(y)}
        return jliger.linen.fused_linear_cross_entropy(head, y, targets.tokens, **options)


@pytest.mark.parametrize(
    ("logits_via_embedding", "label_smoothing"), [(False, 0.1), pytest.param(True, 0.0, marks=pytest.mark.exhaustive)]
)
def test_lm1b(logits_via_embedding, label_smoothing):
    model, tokens = TransformerLM(logits_via_embedding), make_tokens()
    weights = np.where(tokens > 0, 1.0, 0.0).astype(np.float32)
    params = nn.unbox(model.init(jax.random.key(0), tokens))
    # The example spreads its smoothing over all but the label, where here it is over all.
    targets = Targets(tokens, weights, label_smoothing * VOCAB / (VOCAB - 1))
    assert_same(
        lambda params: model.apply(params, tokens, targets) - entropy_of_smoothing(label_smoothing),
        lambda params: weighted_cross_entropy(model.apply(params, tokens), tokens, weights, label_smoothing),
        params,
    )


def test_lm1b_with_a_head_of_ours():
    tokens = make_tokens()
    model, ours = TransformerLM(False), TransformerLM(False, head=jliger.linen.LMHead)
    params = model.init(jax.random.key(0), tokens)
    jax.tree.map(np.testing.assert_array_equal, params, ours.init(jax.random.key(0), tokens))
    np.testing.assert_array_equal(ours.apply(params, tokens), model.apply(params, tokens))
    targets = Targets(tokens, np.ones(SHAPE, np.float32), 0.0)
    assert ours.apply(params, tokens, targets) == model.apply(params, tokens, targets)


# ---- flax's gemma example (NNX) ------------------------------------------------------------------------------


class Embedder(nnx.Module):
    """As the example had it: a bare parameter, decoded by a product with its transpose."""

    def __init__(self, rngs):
        self.input_embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (VOCAB, HIDDEN_SIZE)))

    def encode(self, tokens):
        return self.input_embedding[...][tokens] * np.sqrt(HIDDEN_SIZE)

    def decode(self, x):
        return jnp.dot(x, self.input_embedding[...].T)

    def loss(self, x, targets, **options):
        return jliger.fused_linear_cross_entropy(x, self.input_embedding[...], targets, kernel_layout="vh", **options)


class ScaledEmbed(nnx.Embed):
    """As the example has it: flax's own, with a scale on what is looked up."""

    def __init__(self, rngs):
        super().__init__(VOCAB, HIDDEN_SIZE, rngs=rngs)

    def __call__(self, tokens):
        return super().__call__(tokens) * np.sqrt(HIDDEN_SIZE)

    encode, decode = __call__, nnx.Embed.attend

    def loss(self, x, targets, **options):
        return jliger.nnx.fused_linear_cross_entropy(self, x, targets, **options)


class Gemma(nnx.Module):
    """Of the example's transformer what is at its ends."""

    final_logit_softcap = 5.0

    def __init__(self, embedder, rngs):
        self.embedder = embedder(rngs)
        self.up = nnx.Linear(HIDDEN_SIZE, 32, rngs=rngs)
        self.down = nnx.Linear(32, HIDDEN_SIZE, rngs=rngs)
        self.final_norm = nnx.RMSNorm(HIDDEN_SIZE, rngs=rngs)

    def hidden(self, tokens):
        x = self.embedder.encode(tokens)
        return self.final_norm(x + self.down(nnx.gelu(self.up(x))))

    def __call__(self, tokens):
        logits = self.embedder.decode(self.hidden(tokens))
        return self.final_logit_softcap * jnp.tanh(logits / self.final_logit_softcap)

    def loss(self, tokens, targets, **options):
        x = self.hidden(tokens)
        options |= {"logit_softcap": self.final_logit_softcap, **in_float64_too(x)}
        return self.embedder.loss(x, targets, **options)


@pytest.mark.parametrize("embedder", [Embedder, pytest.param(ScaledEmbed, marks=pytest.mark.exhaustive)])
def test_gemma(embedder):
    tokens = make_tokens()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weights = np.where(inputs > 0, 1.0, 0.0).astype(np.float32)
    graphdef, params = nnx.split(Gemma(embedder, nnx.Rngs(0)))

    def model(params):
        model = nnx.merge(graphdef, params)
        if hasattr(model.embedder, "dtype"):
            model.embedder.dtype = jax.tree.leaves(params)[0].dtype
        return model

    assert_same(
        lambda params: model(params).loss(inputs, targets, weights=weights),
        lambda params: weighted_cross_entropy(model(params)(inputs), targets, weights),
        params,
    )
