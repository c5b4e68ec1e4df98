"""Tests of linear heads that do not depend on a framework."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jliger
from jliger.heads import linear as heads
from jliger.testing.heads import BATCH, HIDDEN_SIZE, VOCAB, loss_of_logits, make_hidden, make_labels, randomized
from jliger.testing.promotion import with_promotion


@pytest.fixture(autouse=True)
def float32_products():
    """Full precision for products: TF32, the default on GPUs, has errors above the tolerances of these tests."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(
    ("equation", "layout"),
    [
        ("...d,dv->...v", "hv"),
        ("...d,vd->...v", "vh"),
        ("BTD,DV->BTV", "hv"),
        ("b t d, v d -> b t v", "vh"),
        ("b...th,hv->b...tv", "hv"),
        ("d,dv->v", "hv"),
    ],
)
def test_einsums_that_are_heads(equation, layout):
    assert heads.einsum_layout(equation) == layout
    hidden, kernel = make_hidden(batch=() if equation[0] == "d" else BATCH), make_hidden(1, batch=(VOCAB,))
    result = heads.LinearHead(kernel=kernel, kernel_layout="vh").logits(hidden)
    np.testing.assert_allclose(result, jnp.einsum(equation, hidden, kernel if layout == "vh" else kernel.T), atol=1e-5)


@pytest.mark.parametrize(
    "equation",
    [
        "btd,dv->bvt",
        "btd,dv->btd",
        "btd,bv->btv",
        "bdt,dv->btv",
        "dtd,dv->dtv",
        "btd,dnv->btnv",
        "btd,d->bt",
        "btd,dv->...v",
        "btd,dv",
        "",
    ],
)
def test_einsums_that_are_none(equation):
    with pytest.raises(NotImplementedError, match="a head maps the last axis to one axis"):
        heads.einsum_layout(equation)


def test_one_head_several_tokens_ahead(implementation):
    # As in the guide: the hidden states and labels of all depths are passed as tokens.
    depths, weights = 3, np.array([0.5, 0.3, 0.2], np.float32)
    hidden, kernel = (
        make_hidden(batch=(depths, *BATCH)),
        randomized(jax.ShapeDtypeStruct((HIDDEN_SIZE, VOCAB), "float32")),
    )
    tokens = jnp.maximum(make_labels(), 0)
    labels = jliger.shift_labels(tokens, by=range(1, depths + 1))

    def loss(hidden, kernel):
        head = heads.LinearHead(kernel=kernel)
        per_token = jnp.broadcast_to(weights[:, None, None], labels.shape)
        return head.loss(hidden, labels, weights=per_token, reduction="sum", implementation=implementation)

    @with_promotion
    def unfused_loss(hidden, kernel):
        counts = jnp.sum(labels != -100, (1, 2))
        return sum(
            w * n * loss_of_logits(x @ kernel, y) for w, n, x, y in zip(weights, counts, hidden, labels, strict=True)
        )

    result, expected = (jax.value_and_grad(function, (0, 1))(hidden, kernel) for function in (loss, unfused_loss))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), result, expected)


@pytest.mark.parametrize("package", [jliger.nnx, jliger.linen])
def test_a_head_in_the_wrong_place(package):
    hidden, labels, kernel = jnp.ones((2, 4)), jnp.zeros(2, int), jnp.ones((4, 7))
    layer = nnx.Linear(4, 7, rngs=nnx.Rngs(0)) if package is jliger.nnx else {"kernel": kernel}
    for operation in (package.fused_linear_cross_entropy, package.linear_logprobs):
        with pytest.raises(TypeError, match=r"module got an array of shape \(2, 4\); the order is \(module, hidden, "):
            operation(hidden, layer, labels)
        with pytest.raises(TypeError, match=r"hidden got None; pass an array"):
            operation(layer, None, labels)
        with pytest.raises(ValueError, match=r"kernel got shape \(4, 7\).*if hidden is logits, pass the hidden states"):
            operation(layer, hidden @ kernel, labels)


def test_a_loss_of_log_probabilities():
    """With a head of each library, and as a method."""
    hidden, labels, weights = make_hidden(), make_labels(), jnp.ones(BATCH) / 3
    layer = nnx.Linear(HIDDEN_SIZE, VOCAB, rngs=nnx.Rngs(0))
    variables = {"kernel": layer.kernel[...], "bias": layer.bias[...] + 1}
    layer.bias[...] += 1
    head = heads.LinearHead(**variables)
    expected = jliger.linear_logprobs(hidden, variables["kernel"], labels, bias=variables["bias"]).logprobs.sum() / 3

    def loss_fn(result, weight):
        return weight * result.logprobs

    options = {"args": (weights,), "units": "tokens"}
    for total in (
        head.logprob_loss(loss_fn, hidden, labels, **options),
        jliger.nnx.fused_linear_loss(loss_fn, layer, hidden, labels, **options),
        jliger.linen.fused_linear_loss(loss_fn, variables, hidden, labels, **options),
    ):
        np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_the_most_likely_columns():
    """With a head of each library, and as a method."""
    hidden = make_hidden()
    layer = nnx.Linear(HIDDEN_SIZE, VOCAB, rngs=nnx.Rngs(0))
    variables = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    head = heads.LinearHead(**variables, logit_scale=2.0)
    expected = jliger.linear_top_k(hidden, variables["kernel"], 3, bias=variables["bias"], logit_scale=2.0)
    for found in (
        head.top_k(hidden, 3),
        jliger.nnx.linear_top_k(layer, hidden, 3, logit_scale=2.0),
        jliger.linen.linear_top_k(variables, hidden, 3, logit_scale=2.0),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_tied_head_of_something_else():
    with pytest.raises(TypeError, match=r"embed got a Linear; pass a flax.nnx.Embed. .*jliger.nnx.fused_linear"):
        jliger.nnx.LMHead.tied(nnx.Linear(4, 7, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"embed got a Dense; pass a flax.linen.Embed. .*jliger.linen.fused_linear"):
        jliger.linen.LMHead.tied(linen.Dense(7))


def test_flax_is_imported_on_first_use():
    program = "import sys, jliger; assert 'flax' not in sys.modules; print(jliger.nnx.LMHead, jliger.linen.LMHead)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.count("LMHead") == 2, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = jliger.torch


def test_a_padded_vocabulary():
    smaller, hidden, labels = VOCAB - 3, make_hidden(), make_labels()
    head = jliger.nnx.LMHead(HIDDEN_SIZE, VOCAB, vocab_size=smaller, logit_softcap=2.0, rngs=nnx.Rngs(0))
    logits = head(hidden)
    np.testing.assert_array_equal(logits[..., smaller:], -jnp.inf)
    labels = jnp.where(labels < 0, labels, labels % smaller)
    expected = loss_of_logits(logits[..., :smaller], labels)
    np.testing.assert_allclose(head.loss(hidden, labels, implementation="xla"), expected, rtol=1e-6)


def test_every_module_hands_on_its_vocab_size():
    hidden, key = make_hidden(), jax.random.key(0)

    def of_linen(module, method):
        return jax.eval_shape(lambda: module.init_with_output(key, hidden, method=method)[0])

    embed = nnx.Embed(VOCAB, HIDDEN_SIZE, rngs=nnx.Rngs(0))
    for head in (
        jliger.nnx.LMHead.tied(embed, vocab_size=8).linear_head(),
        jliger.nnx.MedusaHeads(2, HIDDEN_SIZE, VOCAB, vocab_size=8, rngs=nnx.Rngs(0)).medusa_heads(hidden).heads,
        of_linen(jliger.linen.LMHead(VOCAB, vocab_size=8), "linear_head"),
        of_linen(jliger.linen.LMHead.tied(linen.Embed(VOCAB, HIDDEN_SIZE), vocab_size=8), "linear_head"),
        of_linen(jliger.linen.MedusaHeads(2, VOCAB, vocab_size=8), "medusa_heads").heads,
    ):
        assert head.vocab_size == 8


def test_distillation_from_a_teachers_largest_log_probabilities():
    hidden, module = make_hidden(), randomized(nnx.Linear(HIDDEN_SIZE, VOCAB, rngs=nnx.Rngs(0)))
    kernel, bias = module.kernel[...], module.bias[...]
    top = jliger.linear_top_k(hidden, kernel, 3, bias=2 * bias)
    expected = jliger.losses.fused_linear_top_k_kl(hidden, kernel, top.ids, top.logprobs, bias=bias)
    results = (
        jliger.nnx.fused_linear_top_k_kl(module, hidden, top.ids, top.logprobs),
        jliger.linen.fused_linear_top_k_kl({"kernel": kernel, "bias": bias}, hidden, top.ids, top.logprobs),
        heads.LinearHead(kernel=kernel, bias=bias).top_k_kl(hidden, top.ids, top.logprobs),
    )
    assert expected > 0.01
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-6)
    with pytest.raises(TypeError, match="bias comes with the head"):
        jliger.nnx.fused_linear_top_k_kl(module, hidden, top.ids, top.logprobs, bias=bias)
