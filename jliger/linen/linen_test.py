"""Heads of Flax Linen: the losses of their logits, without the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype

import jliger
from jliger.testing.heads import (
    HIDDEN_SIZE,
    VOCAB,
    as_float64,
    loss_and_grads,
    loss_of_logits,
    make_hidden,
    make_labels,
    randomized,
)
from jliger.testing.oracle import assert_rule_of_two
from jliger.testing.promotion import with_promotion

KEY = jax.random.key(0)

LAYERS = {
    "Dense": nn.Dense(VOCAB),
    "DenseGeneral": nn.DenseGeneral((VOCAB,), precision="highest"),
    "Einsum": nn.Einsum((HIDDEN_SIZE, VOCAB), "btd,dv->btv", use_bias=False),
    "Einsum [V, H]": nn.Einsum((VOCAB, HIDDEN_SIZE), "...d, vd -> ...v"),
    "Embed": nn.Embed(VOCAB, HIDDEN_SIZE),
    "LMHead": jliger.linen.LMHead(VOCAB),
    "TiedLMHead": jliger.linen.LMHead.tied(nn.Embed(VOCAB, HIDDEN_SIZE)),
}


@pytest.fixture(autouse=True)
def float32_products():
    """On GPUs too, where those of TensorFloat-32 would be further off than what is allowed here."""
    with jax.default_matmul_precision("highest"):
        yield


def logits_of(module, hidden):
    return module.attend(hidden) if isinstance(module, nn.Embed) else module(hidden)


class Model(nn.Module):
    """A head and nothing else, that gives logits or the loss."""

    head: nn.Module

    def __call__(self, hidden, labels=None, **options):
        if labels is None:
            return logits_of(self.head, hidden)
        return jliger.linen.fused_linear_cross_entropy(self.head, hidden, labels, **options)

    def logprobs(self, hidden, labels, **options):
        return jliger.linen.linear_logprobs(self.head, hidden, labels, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_flax(name, implementation):
    model, hidden, labels = Model(LAYERS[name]), make_hidden(), make_labels()
    variables = model.init(KEY, hidden, labels)
    # Whichever comes first makes the same parameters.
    jax.tree.map(np.testing.assert_array_equal, variables, model.init(KEY, hidden))
    variables = randomized(variables)
    options = {"logit_scale": 0.7, "logit_softcap": 2.0, "implementation": implementation}

    def loss(variables, hidden):
        return 3 * model.apply(variables, hidden, labels, **options)

    def unfused_loss(variables, hidden):
        return 3 * loss_of_logits(model.apply(variables, hidden), labels, 0.7, 2.0)

    result, theirs = (loss_and_grads(function, variables, hidden) for function in (loss, unfused_loss))
    with jax.enable_x64(True):
        truth = loss_and_grads(unfused_loss, as_float64(variables), as_float64(hidden))
        truth = {name: np.asarray(value) for name, value in truth.items()}
    assert_rule_of_two(result, theirs, truth)


def test_log_probabilities(implementation):
    head = jliger.linen.LMHead(VOCAB, logit_softcap=2.0)
    hidden, labels = make_hidden(), make_labels()
    variables = randomized(head.init(KEY, hidden, labels, method="logprobs"))
    options = {"implementation": implementation}
    result = head.apply(variables, hidden, labels, method="logprobs", **options)
    inside = Model(head).apply({"params": {"head": variables["params"]}}, hidden, labels, method="logprobs", **options)
    alone = jliger.linen.linear_logprobs(variables, hidden, labels, logit_softcap=2.0, **options)
    for other in (inside, alone):
        jax.tree.map(np.testing.assert_array_equal, result, other)
    log_softmax = jax.nn.log_softmax(head.apply(variables, hidden))
    picked = jnp.take_along_axis(log_softmax, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(result.logprobs, jnp.where(labels == -100, 0, picked), atol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_and_logits_are_those_of_dense(param_dtype, dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype, "bias_init": nn.initializers.normal()}
    head, layer = jliger.linen.LMHead(VOCAB, **options), nn.Dense(VOCAB, **options)
    hidden = make_hidden()
    variables, expected = head.init(KEY, hidden), with_promotion(layer.init)(KEY, hidden)
    for one, other in zip(jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    result, expected = head.apply(variables, hidden), with_promotion(layer.apply)(variables, hidden)
    assert (
        result.dtype
        == expected.dtype
        == jliger.linen.layers.linear_head(head.bind(variables), hidden).product_dtype(hidden)
    )
    np.testing.assert_array_equal(result, expected)
    capped = jliger.linen.LMHead(VOCAB, logit_scale=0.5, logit_softcap=2.0, **options)
    np.testing.assert_array_equal(capped.apply(variables, hidden), 2.0 * jnp.tanh(expected * 0.5 / 2.0))


def test_boxes_of_a_sharding():
    options = {
        "kernel_init": nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")),
        "bias_init": nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",)),
    }
    head, layer = jliger.linen.LMHead(VOCAB, **options), nn.Dense(VOCAB, **options)
    hidden, labels = make_hidden(), make_labels()
    variables, expected = head.init(KEY, hidden, labels, method="loss"), layer.init(KEY, hidden)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    assert nn.get_partition_spec(variables) == nn.get_partition_spec(expected)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    # Boxed or not, in a collection or not, bound or not, and as the layer's own: one loss.
    loss = head.apply(variables, hidden, labels, method="loss")
    for each in (variables, variables["params"], meta.unbox(variables), layer.bind(variables), head.bind(variables)):
        assert jliger.linen.fused_linear_cross_entropy(each, hidden, labels) == loss
    embed = nn.Embed(VOCAB, HIDDEN_SIZE, embedding_init=nn.with_partitioning(nn.initializers.normal(), ("model", None)))
    variables = embed.init(KEY, jnp.zeros(3, int))
    for each in (variables["params"], embed.bind(variables)):
        result = jliger.linen.fused_linear_cross_entropy(each, hidden, labels)
        expected = loss_of_logits(embed.apply(variables, hidden, method="attend"), labels)
        np.testing.assert_allclose(result, expected, rtol=1e-6)


class CompactModel(nn.Module):
    """The layer is made where the loss is taken, and nothing else calls it."""

    @nn.compact
    def __call__(self, tokens, labels, fused=True):
        embed = nn.Embed(VOCAB, HIDDEN_SIZE, name="embed")
        hidden = nn.LayerNorm()(embed(tokens))
        dense = nn.Dense(VOCAB, name="logits")
        if not fused:
            return loss_of_logits(dense(hidden), labels) + loss_of_logits(embed.attend(hidden), labels, 0.5)
        tied = jliger.linen.LMHead.tied(embed, logit_scale=0.5)
        return jliger.linen.fused_linear_cross_entropy(dense, hidden, labels) + tied.loss(hidden, labels)


class SetupModel(CompactModel):
    """The same, with a tied head that is kept."""

    def setup(self):
        self.embed = nn.Embed(VOCAB, HIDDEN_SIZE)
        self.LayerNorm_0 = nn.LayerNorm()
        self.logits = jliger.linen.LMHead(VOCAB)
        self.tied = jliger.linen.LMHead.tied(self.embed, logit_scale=0.5)

    def __call__(self, tokens, labels):
        hidden = self.LayerNorm_0(self.embed(tokens))
        return self.logits.loss(hidden, labels) + self.tied.loss(hidden, labels)


@pytest.mark.parametrize("model", [CompactModel(), SetupModel()])
def test_inside_a_model(model):
    tokens, labels = jnp.abs(make_labels(1)) % VOCAB, make_labels(2)
    variables = CompactModel().init(KEY, tokens, labels, fused=False)
    # A tied head has no parameter of its own, and a fused one the same as the layer's.
    result = model.init(KEY, tokens, labels)
    assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, variables)
    variables = randomized(variables)
    result = loss_and_grads(lambda variables: model.apply(variables, tokens, labels), variables)
    expected = loss_and_grads(lambda variables: CompactModel().apply(variables, tokens, labels, fused=False), variables)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, atol=1e-6, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("layer", [nn.Dense(VOCAB), jliger.linen.LMHead(VOCAB), nn.Embed(VOCAB, HIDDEN_SIZE)])
def test_a_promotion_of_ones_own_is_called(layer):
    def promote(*arrays, dtype=None):
        return promote_dtype(*(array if array is None else array.astype(jnp.float16) for array in arrays), dtype=dtype)

    hidden, labels = make_hidden(), make_labels()
    variables = layer.init(KEY, hidden, method="attend" if isinstance(layer, nn.Embed) else None)
    layer = layer.clone(promote_dtype=promote)
    result = jliger.linen.fused_linear_cross_entropy(layer.bind(variables), hidden, labels)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), variables)
    assert result == jliger.linen.fused_linear_cross_entropy(half, hidden.astype(jnp.float16), labels)


# ---- Medusa --------------------------------------------------------------------------------------------------


def test_medusa_heads(implementation):
    heads = jliger.linen.MedusaHeads(3, VOCAB, logit_softcap=2.0)
    hidden, labels = make_hidden(), jnp.stack([make_labels(seed) for seed in range(3)])
    variables = heads.init(KEY, hidden, labels, method="loss")
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "blocks_0": {"bias": (3, HIDDEN_SIZE), "kernel": (3, HIDDEN_SIZE, HIDDEN_SIZE)},
        "heads": {"kernel": (3, HIDDEN_SIZE, VOCAB)},
    }
    # Blocks begin as the identity, and heads each with numbers of their own, as large as one alone would have.
    kernels = variables["params"]["heads"]["kernel"]
    np.testing.assert_allclose(
        heads.apply(variables, hidden), 2.0 * jnp.tanh(hidden @ kernels[:, None] / 2.0), atol=1e-6
    )
    assert len(np.unique(kernels)) == kernels.size
    assert 0.5 < float(kernels.std()) * np.sqrt(HIDDEN_SIZE) < 1.5
    variables = randomized(variables)

    def loss(variables, hidden):
        return heads.apply(variables, hidden, labels, method="loss", implementation=implementation)

    @with_promotion
    def unfused_loss(variables, hidden):
        blocks, kernels = variables["params"]["blocks_0"], variables["params"]["heads"]["kernel"]
        features = [hidden + nn.silu(hidden @ blocks["kernel"][i] + blocks["bias"][i]) for i in range(3)]
        return sum(0.8 ** (i + 1) * loss_of_logits(features[i] @ kernels[i], labels[i], softcap=2.0) for i in range(3))

    result, theirs = (loss_and_grads(function, variables, hidden) for function in (loss, unfused_loss))
    with jax.enable_x64(True):
        truth = loss_and_grads(unfused_loss, as_float64(variables), as_float64(hidden))
        truth = {name: np.asarray(value) for name, value in truth.items()}
    assert_rule_of_two(result, theirs, truth)


def test_the_sharding_of_medusa_heads():
    heads = jliger.linen.MedusaHeads(
        3, VOCAB, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    )
    variables = heads.init(KEY, make_hidden())
    assert nn.get_partition_spec(variables)["params"]["heads"]["kernel"] == jax.P(None, "data", "model")


# ---- what is refused -----------------------------------------------------------------------------------------


class Doubling(nn.Dense):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


@pytest.mark.parametrize(
    ("error", "says", "module"),
    [
        (NotImplementedError, "module got a Dropout", nn.Dropout(0.1)),
        (NotImplementedError, "Doubling that overrides Dense.__call__", Doubling(VOCAB)),
        (NotImplementedError, "a product of its own", nn.Dense(VOCAB, dot_general=lambda *_, **__: None)),
        (NotImplementedError, "a product of its own", jliger.linen.LMHead(VOCAB, dot_general_cls=lambda: None)),
        (NotImplementedError, r"kernel \(6, 11, 2\)", nn.DenseGeneral((VOCAB, 2))),
        (NotImplementedError, "'btd,dnv->btnv'", nn.Einsum((6, 2, 11), "btd,dnv->btnv")),
    ],
)
def test_modules_that_are_no_heads_are_refused(error, says, module):
    with pytest.raises(error, match=says):
        Model(module).init(KEY, make_hidden(), make_labels())


@pytest.mark.parametrize(
    ("says", "module"),
    [
        ("unbound Dense; pass module.bind", nn.Dense(VOCAB)),
        (r"variables \{'scale': \(6,\)\}", {"params": {"scale": np.ones(6)}}),
        (r"'kernel': \(6, 2, 3\)", {"kernel": np.ones((6, 2, 3))}),
        (r"'head': \{'kernel': \(6, 11\)\}", {"params": {"head": {"kernel": np.ones((6, 11))}}}),
    ],
)
def test_what_is_not_bound_or_no_head_is_refused(says, module):
    with pytest.raises(ValueError, match=says):
        jliger.linen.fused_linear_cross_entropy(module, make_hidden(), make_labels())
