"""Gradients with skipped segments against full logits in float64 with the same segments set to zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger

LIMIT = 2.0**-7
TOKENS, HIDDEN, VOCAB, CHUNK, SEGMENT = 150, 32, 2100, 64, 128


@functools.cache
def problem(seed=0):
    """Hidden states, kernel, labels and weights; a few of a token's columns have most of its probability."""
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(HIDDEN, VOCAB))
    kernel /= np.linalg.norm(kernel, axis=0)
    labels = random.integers(0, VOCAB, TOKENS)
    hidden = 24 * kernel[:, labels].T + 22 * kernel[:, random.integers(0, VOCAB, TOKENS)].T
    labels = np.where(random.random(TOKENS) < 0.1, -100, labels)
    return hidden.astype(np.float32), kernel.astype(np.float32), labels, random.uniform(0.5, 2, TOKENS)


def logit_grads_of(hidden, kernel, labels, weights):
    """The gradients of the weighted mean, in float64, and the sizes that they may be skipped up to."""
    logits = hidden.astype(np.float64) @ kernel.astype(np.float64)
    weights = np.where(labels < 0, 0, weights) / weights[labels >= 0].sum()
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    is_label = np.arange(VOCAB) == labels[:, None]
    return (probabilities - is_label) * weights[:, None], weights, is_label


def kept(matters):
    """Of a chunk, which gradients each of the two products takes: for hidden states, and for the kernel."""
    for_hidden, for_kernel = np.zeros_like(matters), np.zeros_like(matters)
    for first in range(0, matters.shape[0], SEGMENT):
        rows = slice(first, first + SEGMENT)
        for_hidden[rows] = matters[rows].any(0)
    for first in range(0, matters.shape[1], SEGMENT):
        columns = slice(first, first + SEGMENT)
        for_kernel[:, columns] = matters[:, columns].any(1, keepdims=True)
    return for_hidden, for_kernel


def with_rank_one(grads, kept):
    """Gradients that are kept, and in place of the others the matrix of rank one with the same sums."""
    skipped = np.where(kept, 0, grads)
    total = skipped.sum()
    replaced = skipped.sum(1, keepdims=True) * skipped.sum(0) / total if total else 0
    return np.where(kept, grads, replaced)


def oracle(hidden, kernel, labels, weights):
    """Gradients of hidden states, kernel and bias, and the skipped mass."""
    grads, weights, is_label = logit_grads_of(hidden, kernel, labels, weights)
    counted = np.flatnonzero(labels >= 0)
    of_hidden, of_kernel, mass = np.zeros(grads.shape), np.zeros(grads.shape), 0
    # Chunks have equal sizes, multiples of 8.
    chunk = -(-len(labels) // -(-len(labels) // CHUNK))
    chunk += -chunk % 8
    for first in range(0, len(counted), chunk):
        tokens = counted[first : first + chunk]
        matters = (np.abs(grads[tokens]) > LIMIT * weights[tokens, None]) | is_label[tokens]
        for_hidden, for_kernel = kept(matters)
        mass += np.maximum(
            *(np.abs(np.where(part, 0, grads[tokens])).sum(1) for part in (for_hidden, for_kernel))
        ).sum()
        of_hidden[tokens] = with_rank_one(grads[tokens], for_hidden)
        for at in range(0, VOCAB, SEGMENT):
            columns = slice(at, at + SEGMENT)
            of_kernel[tokens, columns] = with_rank_one(grads[tokens, columns], for_kernel[:, columns])
    return of_hidden @ kernel.T, hidden.T @ of_kernel, grads.sum(0), mass


def run(implementation, hidden, kernel, labels, weights, *, layout="hv", limit=LIMIT, **options):
    def loss(hidden, kernel, bias):
        return jliger.fused_linear_cross_entropy(
            hidden,
            kernel if layout == "hv" else kernel.T,
            labels,
            bias=bias,
            weights=jnp.asarray(weights, jnp.float32),
            kernel_layout=layout,
            chunk_size=CHUNK,
            precision="highest",
            skip_gradients_below=limit,
            return_metrics=True,
            implementation=implementation,
            **options,
        )

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (value, metrics), grads = step(jnp.asarray(hidden), jnp.asarray(kernel), jnp.zeros(VOCAB))
    return value, metrics, grads


def assert_close(results, expected):
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, exact, rtol=0, atol=2e-5 * np.abs(exact).max())


def test_skips_the_segments_without_a_large_gradient(implementation):
    given = problem()
    *expected, mass = oracle(*given)
    exact = logit_grads_of(*given)[0]
    _, metrics, grads = run(implementation, *given)
    assert_close(grads, expected)
    assert 0.01 < mass < 0.2
    np.testing.assert_allclose(metrics.skipped_mass, mass, rtol=1e-4)
    # The errors are those of gradients that are at most the limit times the token's weight.
    hidden, kernel, labels, weights = given
    largest = LIMIT * np.where(labels < 0, 0, weights) / weights[labels >= 0].sum()
    errors = np.abs(grads[0] - exact @ kernel.T), np.abs(grads[1] - hidden.T @ exact)
    assert (errors[0] <= largest[:, None] * np.abs(kernel).sum(1) * 1.0001 + 1e-7).all()
    assert (errors[1] <= (largest @ np.abs(hidden))[:, None] * 1.0001 + 1e-6).all()
    # And that error is what the option costs: without it, gradients are exact.
    assert errors[0].max() > 1e-5


def test_a_kernel_in_the_other_layout_and_frozen_operands(implementation):
    hidden, kernel, labels, weights = problem()
    expected = oracle(hidden, kernel, labels, weights)
    assert_close(run(implementation, hidden, kernel, labels, weights, layout="vh")[2], expected[:3])

    def loss(hidden, kernel):
        return jliger.fused_linear_cross_entropy(
            hidden,
            kernel,
            labels,
            weights=jnp.asarray(weights, jnp.float32),
            skip_gradients_below=LIMIT,
            chunk_size=CHUNK,
            precision="highest",
            implementation=implementation,
        )

    assert_close([jax.jit(jax.grad(loss, 0))(hidden, kernel)], expected[:1])
    assert_close([jax.jit(jax.grad(loss, 1))(hidden, kernel)], expected[1:2])


@pytest.mark.parametrize("flat", ["first", "last"])
def test_whole_products_where_too_much_matters(implementation, flat):
    """If it is the last chunk, the first has decided for segments, which then have no room."""
    if implementation == "xla":
        pytest.skip("zeros in place of segments, however many there are")
    hidden, kernel, labels, weights = problem()
    counted = np.flatnonzero(labels >= 0)
    hidden = hidden.copy()
    hidden[counted[:CHUNK] if flat == "first" else counted[-10:]] /= 3
    exact = logit_grads_of(hidden, kernel, labels, weights)[0]
    _, metrics, grads = run(implementation, hidden, kernel, labels, weights, limit=2.0**-12)
    assert_close(grads, (exact @ kernel.T, hidden.T @ exact, exact.sum(0)))
    assert metrics.skipped_mass == 0


def test_nan_is_not_skipped(implementation):
    hidden, kernel, labels, weights = problem()
    labels = labels.copy()
    labels[3] = VOCAB
    value, _, grads = run(implementation, hidden, kernel, labels, weights)
    assert jnp.isnan(value)
    assert jnp.isnan(grads[0][3]).all()
    assert jnp.isnan(grads[1]).all()


def test_metrics_say_what_was_skipped():
    hidden, kernel, labels, _ = map(jnp.asarray, problem())
    call = functools.partial(jliger.fused_linear_cross_entropy, hidden, kernel, labels, return_metrics=True)
    assert call()[1].skipped_mass is None
    assert call(skip_gradients_below=0.1)[1].skipped_mass == 0
    none_counts = run("xla", *problem()[:2], np.full(TOKENS, -100), problem()[3])
    assert none_counts[1].skipped_mass == 0
    assert not any(grad.any() for grad in none_counts[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_gradients_below": -0.1}, "skip_gradients_below got -0.1; pass a finite number in"),
        ({"skip_gradients_below": "few"}, "skip_gradients_below got str"),
        ({"skip_gradients_below": 0.1, "reduction": "none"}, "skip_gradients_below got reduction='none'"),
        ({"skip_gradients_below": 0.1, "label_smoothing": 0.1}, "skip_gradients_below got label_smoothing"),
    ],
)
def test_what_is_refused(options, message):
    hidden, kernel, labels, _ = map(jnp.asarray, problem())
    with pytest.raises((ValueError, TypeError), match=message):
        jliger.fused_linear_cross_entropy(hidden, kernel, labels, **options)


def test_a_sharded_vocabulary_is_refused():
    hidden, kernel, labels, _ = map(jnp.asarray, problem())
    spec = jax.sharding.PartitionSpec
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("model",), axis_types=axis_types, devices=jax.devices()[:1])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec(), spec(None, "model")), out_specs=spec())
    def loss(hidden, kernel):
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, labels, vocab_axis_name="model", skip_gradients_below=0.1
        )

    with pytest.raises(NotImplementedError, match="skip_gradients_below got a vocabulary that is sharded"):
        jax.grad(loss)(hidden, kernel)
