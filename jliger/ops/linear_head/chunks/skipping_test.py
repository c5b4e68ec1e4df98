"""Gradients with skipped segments against full logits in float64 with the same segments set to zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.testing.launches import HAS_PLUGIN, launches, lowered, pointers, written_parameters
from jliger.testing.oracle import INTERPRETED

LIMIT = 2.0**-7
TOKENS, HIDDEN, VOCAB, CHUNK, SEGMENT = 100, 32, 2100, 64, 128


@functools.cache
def problem(seed=0):
    """Hidden states, kernel, labels and weights; a few of a token's columns have most of its probability."""
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(HIDDEN, VOCAB))
    kernel /= np.linalg.norm(kernel, axis=0)
    labels = random.integers(0, VOCAB, TOKENS)
    hidden = 24 * kernel[:, labels].T + 22 * kernel[:, random.integers(0, VOCAB, TOKENS)].T
    # These are certain of their labels, whose gradients are therefore small.
    hidden[:20] = 20 * kernel[:, labels[:20]].T
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
    """Gradients of hidden states, kernel and bias, and the sizes of what is skipped."""
    grads, weights, is_label = logit_grads_of(hidden, kernel, labels, weights)
    counted = np.flatnonzero(labels >= 0)
    of_hidden, of_kernel, skipped = np.zeros(grads.shape), np.zeros(grads.shape), np.zeros(len(grads))
    # Chunks have equal sizes, multiples of 8.
    chunk = -(-len(labels) // -(-len(labels) // CHUNK))
    chunk += -chunk % 8
    for first in range(0, len(counted), chunk):
        tokens = counted[first : first + chunk]
        matters = (np.abs(grads[tokens]) > LIMIT * weights[tokens, None]) | is_label[tokens]
        for_hidden, for_kernel = kept(matters)
        rest = [np.where(part, 0, grads[tokens]) for part in (for_hidden, for_kernel)]
        skipped[tokens] = np.maximum(*(np.abs(part).sum(1) for part in rest))
        of_hidden[tokens] = with_rank_one(grads[tokens], for_hidden)
        for at in range(0, VOCAB, SEGMENT):
            columns = slice(at, at + SEGMENT)
            of_kernel[tokens, columns] = with_rank_one(grads[tokens, columns], for_kernel[:, columns])
    return of_hidden @ kernel.T, hidden.T @ of_kernel, grads.sum(0), skipped


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
    *expected, skipped = oracle(*given)
    exact = logit_grads_of(*given)[0]
    _, metrics, grads = run(implementation, *given)
    assert_close(grads, expected)
    assert 0.005 < skipped.sum() < 0.2
    np.testing.assert_allclose(metrics.skipped_mass, skipped.sum(), rtol=1e-4)
    # What is skipped and what replaces it have the same sums: a token's errors are at most twice what is skipped. The
    # kernel's columns have a norm of 1.
    hidden, kernel = given[:2]
    errors = grads[0] - exact @ kernel.T, grads[1] - hidden.T @ exact
    assert (np.linalg.norm(errors[0], axis=1) <= 2 * skipped + 1e-7).all()
    assert np.linalg.norm(errors[1], axis=0).sum() <= 2 * skipped @ np.linalg.norm(hidden, axis=1)
    assert all(np.linalg.norm(error) > 1e-4 for error in errors)


def test_a_cotangent_multiplies_the_gradients(implementation):
    hidden, kernel, labels, weights = problem()

    def loss(hidden, kernel):
        options = {"chunk_size": CHUNK, "skip_gradients_below": LIMIT, "implementation": implementation}
        weighted = jnp.asarray(weights, jnp.float32)
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, labels, weights=weighted, precision="highest", **options
        )

    cotangent = jax.random.normal(jax.random.key(1))
    grads = jax.jit(lambda *inputs: jax.vjp(loss, *inputs)[1](cotangent))(jnp.asarray(hidden), jnp.asarray(kernel))
    assert_close(grads, [cotangent * grad for grad in oracle(hidden, kernel, labels, weights)[:2]])


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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


def test_limits_scale_with_the_logits():
    hidden, kernel, labels, weights = problem()
    plain = run("xla", hidden, kernel, labels, weights)[1].skipped_mass
    # Powers of two, so that the logits are equal to the bit.
    temperature = jnp.full(TOKENS, 64.0)
    scaled = run("xla", hidden * 1024, kernel, labels, weights, logit_scale=1 / 16, temperature=temperature)
    assert abs(scaled[1].skipped_mass / plain - 1) < 1e-5


def test_chunks_with_fewer_segments_than_a_share_of_them():
    pytest.importorskip("triton")

    def loss(hidden, kernel):
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, jnp.arange(3), chunk_size=1, skip_gradients_below=LIMIT, implementation="triton"
        )

    with jliger.compute_capability(90):
        grads = jax.eval_shape(jax.grad(loss, (0, 1)), jnp.ones((3, 8)), jnp.ones((8, 60)))
    assert [grad.shape for grad in grads] == [(3, 8), (8, 60)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_gradients_below": -0.1}, "skip_gradients_below got -0.1; pass a finite number in"),
        ({"skip_gradients_below": "few"}, "skip_gradients_below got str"),
        ({"skip_gradients_below": True}, "skip_gradients_below got bool"),
        ({"skip_gradients_below": 0.1, "reduction": "none"}, "skip_gradients_below got reduction='none'"),
        ({"skip_gradients_below": 0.1, "label_smoothing": 0.1}, "skip_gradients_below got label_smoothing"),
    ],
)
def test_what_is_refused(options, message):
    hidden, kernel, labels, _ = map(jnp.asarray, problem())
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        jliger.fused_linear_cross_entropy(hidden, kernel, labels, **options)


@pytest.mark.skipif(INTERPRETED or not HAS_PLUGIN, reason="lowering for a GPU needs jax-cuda13-plugin")
@pytest.mark.parametrize(
    "capability",
    [pytest.param(80, marks=pytest.mark.exhaustive), 90, pytest.param(100, marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("layout", ["hv", pytest.param("vh", marks=pytest.mark.exhaustive)])
def test_kernels_compile_and_use_matrix_units(capability, layout):
    def loss(hidden, kernel, labels):
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, labels, kernel_layout=layout, skip_gradients_below=LIMIT, implementation="triton"
        )

    hidden = jax.ShapeDtypeStruct((4096, 256), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((256, 128256) if layout == "hv" else (128256, 256), jnp.float32)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)
    found = {}
    for launch in launches(lowered(jax.grad(loss, (0, 1)), hidden, kernel, labels, capability=capability)):
        found.setdefault(launch.name, set()).add(launch.ptx)
    assert found.keys() == {"row_stats_and_grads_kernel", "count_kernel", "copy_kernel", "product_kernel"}
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    # One for gradients of hidden states, one for the kernel's.
    assert len(found["product_kernel"]) == 2
    assert all(instruction in ptx and "cp.async" in ptx for ptx in found["product_kernel"])
    if capability < 100:  # whose instructions include labels that `written_parameters` does not read
        for ptx in set().union(*found.values()):
            written = written_parameters(ptx)
            assert min(written) > pointers(ptx) - len(written) - 1  # outputs come last


@pytest.mark.exhaustive
def test_kernels_agree_with_xla_on_every_option(implementation):
    if implementation == "xla":
        pytest.skip("what the kernels are compared with")
    hidden, kernel, labels, _ = problem()
    random = np.random.default_rng(3)
    options = {
        "bias": random.normal(size=VOCAB) * 0.1,
        "weights": random.normal(size=TOKENS) + 1,
        "class_weights": random.uniform(0.5, 2, VOCAB),
        "temperature": random.uniform(0.6, 0.8, TOKENS),
    }
    options = {name: jnp.asarray(array, jnp.float32) for name, array in options.items()}
    options |= {"where": jnp.asarray(random.random(TOKENS) > 0.2), "vocab_size": VOCAB - 50}
    options |= {"z_loss": 1e-3, "logit_softcap": 30.0, "chunk_size": CHUNK, "precision": "highest"}
    a, b = (jnp.asarray(random.normal(size=shape) * 0.1, jnp.float32) for shape in ((HIDDEN, 4), (4, VOCAB)))
    labels = jnp.asarray(np.where(labels >= VOCAB - 50, 5, labels))

    def results(implementation):
        def loss(hidden, kernel, a, b, bias):
            more = options | {"bias": bias, "adapter": jliger.LinearAdapter(a, b, 0.5)}
            return jliger.fused_linear_cross_entropy(
                hidden,
                kernel,
                labels,
                skip_gradients_below=0.03,
                return_metrics=True,
                implementation=implementation,
                **more,
            )

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True))
        (_, metrics), grads = step(jnp.asarray(1.6 * hidden), jnp.asarray(kernel), a, b, options["bias"])
        return metrics.skipped_mass, grads

    (skipped, grads), (expected_skipped, expected) = results(implementation), results("xla")
    assert skipped > 0.01
    np.testing.assert_allclose(skipped, expected_skipped, rtol=1e-4)
    assert_close(grads, expected)
