"""Tests log-probabilities with 8-bit products, and 8-bit logits alone, against float64 over quantized operands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.ops.logits.float8 import E4M3, quantized, scale_of
from jliger.testing.oracle import IMPLEMENTATIONS, INTERPRETED, ON_GPU

FIELDS = ("logprobs", "logsumexp", "entropy")
PRODUCTS = ("float8", "float8_forward")
# Of gradients of random cotangents, against exact ones of the same logits. Rounding to e5m2, up or down, changes a
# logit gradient by at most a quarter; where few of a row's are large, that is seen. A GPU's fast sums have 14 bits.
OF_GRADIENTS = {"float8": 0.1, "float8_forward": 3e-3 if ON_GPU else 2e-6}
OF_FIELDS = 5e-3 if ON_GPU else 1e-5

_logprobs = functools.partial(jliger.linear_logprobs, implementation=IMPLEMENTATIONS[-1])
_loss = functools.partial(jliger.fused_linear_cross_entropy, implementation=IMPLEMENTATIONS[-1])
_exhaustive = pytest.mark.exhaustive
_if_not_interpreted = _exhaustive if INTERPRETED else lambda test: test


def make_problem(tokens=48, hidden_size=32, vocab=200):
    """Float32, so that nothing but the 8 bits is rounded. Every third token does not count."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(tokens, hidden_size))
    kernel = random.normal(size=(hidden_size, vocab)) * 1.5 / hidden_size**0.5
    labels = np.where(np.arange(tokens) % 3, random.integers(0, vocab, tokens), -100)
    cotangents = random.normal(size=(len(FIELDS), tokens))
    arrays = jnp.asarray(hidden, "float32"), jnp.asarray(kernel, "float32"), jnp.asarray(labels)
    return *arrays, jnp.asarray(cotangents, "float32")


def in_float64(hidden, kernel, labels, cotangents):
    """The fields and both gradients: logits of quantized operands, gradients with the operands as they are."""
    values, scale = quantized(hidden)
    of_hidden = np.asarray(values, np.float64) * scale
    # The kernel's largest entry is only 4 to 8 in e4m3, because a sample of it says how large its entries are.
    scale = 32 * scale_of(kernel)
    of_kernel = np.asarray((kernel / scale).astype(E4M3), np.float64) * scale
    labels, cotangents = np.asarray(labels), np.asarray(cotangents, np.float64)
    logits = of_hidden @ of_kernel
    lse = np.log(np.exp(logits).sum(1, keepdims=True))
    log_p, counted = logits - lse, (labels != -100)[:, None]
    p, is_label = np.exp(log_p), np.arange(logits.shape[1]) == labels[:, None]
    entropy = -(p * log_p).sum(1, keepdims=True)
    fields = [np.where(counted[:, 0], field, 0) for field in ((log_p * is_label).sum(1), lse[:, 0], entropy[:, 0])]
    of_logprob, of_lse, of_entropy = cotangents[..., None]
    logit_grads = of_logprob * (is_label - p) + of_lse * p - of_entropy * p * (log_p + entropy)
    logit_grads = np.where(counted, logit_grads, 0)
    grads = logit_grads @ np.asarray(kernel, np.float64).T, np.asarray(hidden, np.float64).T @ logit_grads
    return fields, grads


def fields_and_grads(products, argnums, hidden, kernel, labels, cotangents, **options):
    """The fields, and the gradients of the sum of all fields times their cotangents; of a field of None, nothing."""

    def total(hidden, kernel):
        result = _logprobs(hidden, kernel, labels, products=products, **options)
        fields = [getattr(result, name) for name in FIELDS]
        weighted = [jnp.sum(field * ct) for field, ct in zip(fields, cotangents, strict=True) if ct is not None]
        return functools.reduce(jnp.add, weighted), fields

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.grad(total, argnums, has_aux=True))(hidden, kernel)[::-1]


def relative(result, oracle):
    return np.linalg.norm(np.asarray(result, np.float64) - oracle) / np.linalg.norm(oracle)


@pytest.mark.parametrize("sizes", [(48, 32, 208), pytest.param((45, 24, 203), marks=_exhaustive)])
@pytest.mark.parametrize("products", PRODUCTS)
def test_any_cotangents(products, sizes):
    *problem, cotangents = make_problem(*sizes)
    fields, grads = fields_and_grads(products, (0, 1), *problem, tuple(cotangents), chunk_size=16)
    expected, exact = in_float64(*problem, cotangents)
    for field, its in zip(fields, expected, strict=True):
        np.testing.assert_allclose(field, its, rtol=0, atol=OF_FIELDS)
    for grad, its in zip(grads, exact, strict=True):
        assert relative(grad, its) < OF_GRADIENTS[products]
    assert (grads[0][::3] == 0).all()


@_if_not_interpreted
def test_log_probabilities_beside_a_frozen_kernel():
    *problem, cotangents = make_problem()
    cotangents = cotangents.at[1:].set(0)
    _, grads = fields_and_grads("float8", (0,), *problem, (cotangents[0], None, None))
    # Of a log-probability alone, the label's gradient is exact.
    assert relative(grads[0], in_float64(*problem, cotangents)[1][0]) < 0.035


@_if_not_interpreted
def test_an_entropy_where_the_label_is_left_out():
    hidden, kernel, labels, _ = make_problem(16, 16, 32)
    bias = jnp.zeros(32).at[labels[1]].set(-jnp.inf)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(products):
        def entropy(hidden):
            return _logprobs(hidden, kernel, labels, bias=bias, products=products).entropy.sum()

        return jax.grad(entropy)(hidden)

    assert relative(gradient("float8"), np.asarray(gradient(None), np.float64)) < OF_GRADIENTS["float8"]


@_if_not_interpreted
@pytest.mark.parametrize("products", [pytest.param("float8", marks=_exhaustive), "float8_forward"])
def test_losses_of_tokens_and_their_mean(products):
    hidden, kernel, labels, cotangents = make_problem()
    weights = jnp.abs(cotangents[0])

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(reduction):
        def loss(hidden, kernel):
            result = _loss(hidden, kernel, labels, products=products, reduction=reduction, weights=weights)
            return jnp.sum(result)

        with jax.default_matmul_precision("highest"):
            return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    (each, grads), (total, of_total) = gradients("none"), gradients("sum")
    assert abs(each / total - 1) < 1e-6
    for grad, its in zip(grads, of_total, strict=True):
        np.testing.assert_allclose(grad, its, rtol=0, atol=1e-6 * np.abs(its).max())
    cotangents = jnp.stack([-weights, 0 * weights, 0 * weights])
    for grad, its in zip(of_total, in_float64(hidden, kernel, labels, cotangents)[1], strict=True):
        assert relative(grad, its) < OF_GRADIENTS[products]


@_exhaustive
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_layout": "vh", "logit_softcap": 3.0, "vocab_size": 170, "temperature": 1.5},
        {"bias": jnp.linspace(-1, 1, 200), "logit_scale": 0.5, "ignore_index": None, "logits_dtype": "bfloat16"},
    ],
)
def test_options(products, options):
    hidden, kernel, labels, cotangents = make_problem()
    labels = jnp.abs(labels) % 170
    kernel = kernel.T if "kernel_layout" in options else kernel
    run = functools.partial(fields_and_grads, argnums=(0, 1), hidden=hidden, kernel=kernel, labels=labels)
    run = functools.partial(run, cotangents=tuple(cotangents), **options)
    (fields, grads), (plain_fields, plain) = run(products), run(None)
    for field, its in zip(fields, plain_fields, strict=True):
        assert np.abs(field - its).max() < 0.2
    for grad, its in zip(grads, plain, strict=True):
        assert relative(grad, np.asarray(its, np.float64)) < OF_GRADIENTS["float8"]


@_exhaustive
@pytest.mark.parametrize("products", PRODUCTS)
def test_a_loss_that_is_fused_with_the_head(products):
    hidden, kernel, tokens, _ = make_problem()
    hidden, tokens = hidden.reshape(4, 12, -1), tokens.reshape(4, 12)
    advantages, options = (
        jnp.array([1.0, -2.0, 0.5, 0.0]),
        {"products": products, "implementation": IMPLEMENTATIONS[-1]},
    )

    def flat(hidden):
        logprobs = jliger.linear_logprobs(hidden, kernel, tokens, **options).logprobs
        return jliger.losses.grpo(logprobs, advantages, where=tokens != -100)[0]

    def fused(hidden):
        return jliger.losses.fused_linear_grpo(hidden, kernel, tokens, advantages, **options)[0]

    (loss, grad), (expected, its) = (jax.jit(jax.value_and_grad(each))(hidden) for each in (fused, flat))
    assert abs(loss - expected) < 1e-6
    # Each dithers its own units.
    assert relative(grad, np.asarray(its, np.float64)) < OF_GRADIENTS[products]


@_exhaustive
@pytest.mark.parametrize("products", PRODUCTS)
def test_vmap(products):
    hidden, kernel, labels, _ = make_problem()

    @jax.jit
    def logprobs(hidden, labels):
        return _logprobs(hidden, kernel, labels, products=products).logprobs

    by_row = jax.vmap(jax.grad(lambda hidden, labels: logprobs(hidden, labels).sum()))
    shape = (4, 12, -1)
    found = by_row(hidden.reshape(shape), labels.reshape(4, 12)).reshape(hidden.shape)
    whole = jax.grad(lambda hidden: logprobs(hidden, labels).sum())(hidden)
    assert relative(found, np.asarray(whole, np.float64)) < 1e-6


@_exhaustive
@pytest.mark.parametrize("products", PRODUCTS)
def test_no_token_counts(products):
    hidden, kernel, labels, cotangents = make_problem()
    fields, grads = fields_and_grads(products, (0, 1), hidden, kernel, 0 * labels - 100, tuple(cotangents))
    assert not any(np.asarray(array).any() for array in (*fields, *grads))


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("keep_logits got True", {"keep_logits": True}),
        ("keep_logits got 0", {"keep_logits": 0}),
        ("adapter", {"adapter": (jnp.ones((32, 2)), jnp.ones((2, 200)))}),
    ],
)
def test_what_is_refused(match, options):
    with pytest.raises(NotImplementedError, match=match):
        _logprobs(*make_problem()[:3], products="float8", **options)


@pytest.mark.parametrize("products", PRODUCTS)
def test_second_derivatives_are_refused(products):
    hidden, kernel, labels, _ = make_problem()
    grad = jax.grad(lambda hidden: _logprobs(hidden, kernel, labels, products=products).logprobs.sum())
    with pytest.raises(NotImplementedError, match="got differentiated"):
        jax.jvp(grad, (hidden,), (hidden,))
