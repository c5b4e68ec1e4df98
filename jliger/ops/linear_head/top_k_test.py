"""The largest logits of each token: those of `jax.lax.top_k` on full logits, and what must be refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.ops.linear_head.chunks import top_k as chunks
from jliger.testing.oracle import INTERPRETED, every_pair

BATCH, HIDDEN, VOCAB = (3, 5), 6, 139


def problem(dtype="float32", kernel_dtype="float32", seed=0, **options):
    """Arrays with few bits, whose products are exact and often equal, and options with arrays in place of True."""
    if INTERPRETED and "bfloat16" in (dtype, kernel_dtype):
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.integers(-2, 3, (*BATCH, HIDDEN)), dtype)
    kernel = jnp.asarray(random.integers(-2, 3, (HIDDEN, VOCAB)), kernel_dtype)
    if options.get("kernel_layout") == "vh":
        kernel = kernel.T
    if options.pop("bias", False):
        masked = -np.inf * options.get("logit_scale", 1.0)
        options["bias"] = jnp.asarray(np.where(random.random(VOCAB) < 0.2, masked, 0.5), jnp.float32)
    if options.pop("where", False):
        options["where"] = jnp.asarray(random.random(BATCH) < 0.6)
    if options.pop("adapter", False):
        sides = [jnp.asarray(random.integers(-1, 2, shape), jnp.float32) for shape in ((HIDDEN, 2), (2, VOCAB))]
        options["adapter"] = jliger.LinearAdapter(*sides, 0.5)
    if options.get("temperature") == "of tokens":
        options["temperature"] = jnp.asarray(2.0 ** random.integers(-1, 2, BATCH), jnp.float32)
    return hidden, kernel, options


def assert_same(found, expected):
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(found.logsumexp, expected.logsumexp, rtol=2e-6, atol=2e-6)


OPTIONS = {
    "dtypes": [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")],
    "kernel_layout": ["hv", "vh"],
    "bias": [False, True],
    "where": [False, True],
    "adapter": [False, True],
    "temperature": [1.0, 2.0, "of tokens"],
    "logit_scale": [1.0, -0.5],
    "vocab_size": [None, 100],
    "chunk_size": [None, 8],
    "k": [1, 5, 40],
}
BRANCHES = [
    pytest.param(branch, marks=[pytest.mark.exhaustive] if number else [])
    for number, branch in enumerate(every_pair(OPTIONS))
]


@pytest.mark.parametrize("options", BRANCHES, ids=itertools.count())
def test_every_pair_of_options(options, implementation):
    options = dict(options)
    k = options.pop("k")
    hidden, kernel, options = problem(*options.pop("dtypes"), **options)
    found = jliger.linear_top_k(hidden, kernel, k, implementation=implementation, **options)
    assert_same(found, jliger.reference.linear_top_k(hidden, kernel, k, **options))
    assert found.ids.dtype == jnp.int32
    assert found.logprobs.dtype == found.logsumexp.dtype == jnp.float32


@pytest.mark.exhaustive
def test_capped_logits(implementation):
    hidden, kernel, options = problem(logit_softcap=2.0, bias=True)
    found = jliger.linear_top_k(hidden, kernel, 5, implementation=implementation, **options)
    expected = jliger.reference.linear_top_k(hidden, kernel, 5, **options)
    # Which of two logits near the cap is larger may differ from one tanh to another.
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-6)


@pytest.mark.parametrize("vocab_size", [None, pytest.param(100, marks=pytest.mark.exhaustive)])
def test_blocks_of_a_kernel_of_another_dtype(vocab_size, implementation, monkeypatch):
    # Three blocks, of which the last is narrower than k: the best of all blocks, the lower id first.
    monkeypatch.setattr(chunks, "selection_tile", lambda config, num_tokens, vocab: (8, 128))
    hidden, kernel, _ = problem("float16")
    kernel = jnp.concatenate([kernel, kernel], axis=1)[:, :260]
    found = jliger.linear_top_k(hidden, kernel, 30, vocab_size=vocab_size, implementation=implementation)
    assert_same(found, jliger.reference.linear_top_k(hidden, kernel, 30, vocab_size=vocab_size))


def test_what_does_not_count_and_what_is_not_differentiable(implementation):
    hidden, kernel, options = problem(where=True)
    options["implementation"] = implementation
    spoilt = jnp.where(options["where"][..., None], hidden, jnp.nan)
    found = jliger.linear_top_k(spoilt, kernel, 3, **options)
    assert_same(found, jliger.reference.linear_top_k(hidden, kernel, 3, where=options["where"]))
    uncounted = ~np.asarray(options["where"])
    assert np.all(np.asarray(found.ids)[uncounted] == -1)
    assert not np.any(np.asarray(found.logprobs)[uncounted])

    def batched(hidden):
        each = jax.vmap(lambda hidden, where: jliger.linear_top_k(hidden, kernel, 3, **{**options, "where": where}))
        top = each(hidden, options["where"])
        return top.logprobs.sum() + top.logsumexp.sum() + hidden[0, 0, 0], top

    (_, top), grad = jax.value_and_grad(batched, has_aux=True)(hidden)
    assert_same(top, found)
    np.testing.assert_array_equal(grad, jnp.zeros_like(hidden).at[0, 0, 0].set(1))


def test_an_infinite_logit_has_no_log_probabilities(implementation):
    hidden, kernel, _ = problem()
    hidden = hidden.at[0, 0].set(jnp.inf).at[0, 1].set(1)
    kernel = kernel.at[:, 7].set(1)
    found = jliger.linear_top_k(hidden, jnp.maximum(kernel, 0.5), 3, implementation=implementation)
    for values in (found.logprobs, found.logsumexp):
        assert np.isnan(values[0, 0]).all()
        assert np.isfinite(values[0, 1:]).all()


@pytest.mark.exhaustive
def test_float64():
    with jax.enable_x64(True):
        hidden, kernel = (jnp.asarray(array, jnp.float64) for array in problem()[:2])
        found = jliger.linear_top_k(hidden, kernel, 3)
        expected = jliger.reference.linear_top_k(hidden, kernel, 3)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-14)


@pytest.mark.parametrize(
    ("k", "options", "error", "match"),
    [
        (0, {}, ValueError, "k got 0; pass a number of columns from 1 to 256"),
        (257, {}, ValueError, "k got 257; pass a number of columns from 1 to 256"),
        (101, {"vocab_size": 100}, ValueError, "k got 101; pass at most 100"),
        (2.0, {}, TypeError, "k got 2.0; pass a Python integer"),
        (2, {"labels": None}, TypeError, "labels is no option"),
        (2, {"temperature": 0.0}, ValueError, "temperature got 0.0"),
    ],
)
def test_refuses(k, options, error, match):
    hidden, kernel, _ = problem()
    with pytest.raises(error, match=match):
        jliger.linear_top_k(hidden, kernel, k, **options)


def test_no_tokens(implementation):
    _, kernel, _ = problem()
    found = jliger.linear_top_k(jnp.zeros((2, 0, HIDDEN)), kernel, 3, implementation=implementation)
    assert found.ids.shape == found.logprobs.shape == (2, 0, 3)
    assert found.logsumexp.shape == (2, 0)
