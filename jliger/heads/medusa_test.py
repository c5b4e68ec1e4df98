"""Tests that Medusa heads give the sum of their losses, with the memory of a single head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger.heads import medusa
from jliger.heads.linear import LinearHead
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
from jliger.testing.oracle import INTERPRETED, ON_GPU, assert_rule_of_two, equations

NUM_HEADS = 3
WEIGHTS = [1.0, 0.3, 0.5]


@pytest.fixture(autouse=True)
def float32_products():
    """Full precision for products: TF32, the default on GPUs, has errors above the tolerances of these tests."""
    with jax.default_matmul_precision("highest"):
        yield


def types_of_heads(num_heads=NUM_HEADS, num_blocks=1, hidden_size=HIDDEN_SIZE, vocab=VOCAB, dtype="float32"):
    def array(*shape):
        return jax.ShapeDtypeStruct((num_heads, *shape), dtype)

    square, row = (hidden_size, hidden_size), (hidden_size,)
    blocks = tuple(LinearHead(kernel=array(*square), bias=array(*row)) for _ in range(num_blocks))
    return medusa.MedusaHeads(blocks, LinearHead(kernel=array(hidden_size, vocab)))


def make_heads(**options):
    return randomized(types_of_heads(**options))


def make_all_labels(num_heads=NUM_HEADS):
    return jnp.stack([make_labels(seed) for seed in range(num_heads)])


def unfused(heads, hidden, labels, head_weights=WEIGHTS):
    return sum(
        weight * loss_of_logits(logits, each)
        for weight, logits, each in zip(head_weights, heads.logits(hidden), labels, strict=True)
    )


@pytest.mark.parametrize(("num_blocks", "dtype"), [(0, "float32"), (2, "float32"), (2, "bfloat16"), (1, "float16")])
def test_against_the_sum_written_down(num_blocks, dtype, implementation):
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    heads, hidden, labels = make_heads(num_blocks=num_blocks, dtype=dtype), make_hidden(dtype=dtype), make_all_labels()

    def loss(heads, hidden):
        return -3 * medusa.loss(heads, hidden, labels, head_weights=WEIGHTS, implementation=implementation)

    def unfused_loss(heads, hidden):
        return -3 * unfused(heads, hidden, labels)

    result, theirs = (loss_and_grads(function, heads, hidden) for function in (loss, unfused_loss))
    with jax.enable_x64(True):
        truth = loss_and_grads(unfused_loss, as_float64(heads), as_float64(hidden))
        truth = {name: np.asarray(value) for name, value in truth.items()}
    for name, value in theirs.items():
        assert result[name].dtype == value.dtype, name
    if dtype != "float32":
        del truth["loss"], result["loss"]  # a single number may be exact by chance
    assert_rule_of_two(result, theirs, truth)


def test_the_papers_weights():
    heads, hidden, labels = make_heads(), make_hidden(), make_all_labels()
    result = medusa.loss(heads, hidden, labels)
    np.testing.assert_allclose(result, unfused(heads, hidden, labels, [0.8, 0.64, 0.512]), rtol=1e-6)


def test_options_and_metrics_of_each_head(implementation):
    heads, hidden, labels = make_heads(), make_hidden(), make_all_labels()
    random = np.random.default_rng(5)
    where, weights = random.random(labels.shape) < 0.7, random.uniform(0.1, 2, labels.shape[1:]).astype(np.float32)
    options = {"z_loss": 0.1, "label_smoothing": 0.1, "reduction": "sum", "implementation": implementation}
    result, metrics = medusa.loss(
        heads, hidden, labels, head_weights=WEIGHTS, where=where, weights=weights, return_metrics=True, **options
    )
    singles, expected = zip(
        *[
            head.heads.loss(
                head.features(hidden), labels[i], where=where[i], weights=weights, return_metrics=True, **options
            )
            for i in range(NUM_HEADS)
            for head in [jax.tree.map(lambda leaf, i=i: leaf[i], heads)]
        ],
        strict=True,
    )
    np.testing.assert_allclose(result, sum(w * single for w, single in zip(WEIGHTS, singles, strict=True)), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, metrics, jax.tree.map(lambda *each: jnp.stack(each), *expected))


def test_a_padded_vocabulary(implementation):
    """With `vocab_size`, the loss and gradients of heads without the padding, whose gradient is 0."""
    heads, hidden, smaller = make_heads(), make_hidden(), VOCAB - 3
    labels = jnp.minimum(make_all_labels(), smaller - 1)

    def loss(heads, hidden, **options):
        return medusa.loss(heads, hidden, labels, head_weights=WEIGHTS, implementation=implementation, **options)

    def unpadded(heads):
        return heads._replace(heads=dataclasses.replace(heads.heads, kernel=heads.heads.kernel[..., :smaller]))

    value, (grads, hidden_grad) = jax.value_and_grad(loss, (0, 1))(heads, hidden, vocab_size=smaller)
    expected = jax.value_and_grad(loss, (0, 1))(unpadded(heads), hidden)
    found = value, (unpadded(grads), hidden_grad)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    assert not np.any(grads.heads.kernel[..., smaller:])


def test_a_normalizer_for_each_head():
    heads, hidden, labels = make_heads(), make_hidden(), make_all_labels()
    normalizers = jnp.array([3.0, 5.0, 7.0])
    result, metrics = medusa.loss(
        heads, hidden, labels, head_weights=WEIGHTS, normalizer=normalizers, implementation="xla", return_metrics=True
    )
    _, sums = medusa.loss(heads, hidden, labels, reduction="sum", implementation="xla", return_metrics=True)
    np.testing.assert_allclose(metrics.cross_entropy, sums.cross_entropy / normalizers, rtol=1e-6)
    np.testing.assert_allclose(result, (jnp.array(WEIGHTS) * metrics.cross_entropy).sum(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"normalizer got shape \(2,\); pass a scalar, or .*, \(3,\)"):
        medusa.loss(heads, hidden, labels, normalizer=jnp.ones(2))


def test_a_temperature_of_all_heads_of_all_tokens_or_of_each_ones(implementation):
    heads, hidden, labels = make_heads(), make_hidden(), make_all_labels()
    logits = heads.logits(hidden)
    expected = sum(
        weight * loss_of_logits(of_head, each, scale=1 / 0.6)
        for weight, of_head, each in zip(WEIGHTS, logits, labels, strict=True)
    )
    for shape in (None, (), labels.shape[1:], labels.shape):
        temperature = 0.6 if shape is None else jnp.full(shape, 0.6)
        result = medusa.loss(
            heads, hidden, labels, head_weights=WEIGHTS, temperature=temperature, implementation=implementation
        )
        np.testing.assert_allclose(result, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="temperature got 0; pass a finite number above 0"):
        medusa.loss(heads, hidden, labels, temperature=0)


# ---- number of matrix products -------------------------------------------------------------------------------


def products(function, *arguments):
    """The number of matrix products in the program. Heads are in a loop, so this is the number per head."""
    program = jax.make_jaxpr(function)(*arguments)
    return sum(equation.primitive.name == "dot_general" for equation in equations(program))


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
def test_stage_1_computes_no_gradient_of_hidden_states(num_blocks, implementation):
    heads, hidden, labels = make_heads(num_blocks=num_blocks), make_hidden(), make_all_labels()

    def loss(heads, hidden):
        return medusa.loss(heads, hidden, labels, head_weights=WEIGHTS, chunk_size=16, implementation=implementation)

    # For each head: the logits, the kernel's gradient, and with blocks the gradient of their output. For each block:
    # its product and its kernel's gradient, and for all but the first the gradient of its input.
    stage_1 = 2 if num_blocks == 0 else 3 + 2 * num_blocks + (num_blocks - 1)
    assert products(jax.grad(loss), heads, hidden) == stage_1
    assert products(jax.grad(lambda heads: loss(heads, jax.lax.stop_gradient(hidden))), heads) == stage_1
    # Stage 2 has one more: the gradient of the input of the first block, or of the head if there are no blocks.
    assert products(jax.grad(loss, (0, 1)), heads, hidden) == stage_1 + 1
    assert products(loss, heads, hidden) == 1 + num_blocks
    # The heads' gradients are not 0, and are the same as in stage 2.
    one, both = loss_and_grads(lambda heads: loss(heads, hidden), heads), loss_and_grads(loss, heads, hidden)
    for name, value in one.items():
        assert np.any(value), name
        np.testing.assert_allclose(value, both[name], atol=1e-6, rtol=1e-5)


def test_frozen_heads_still_give_gradients_of_hidden_states(implementation):
    heads, hidden, labels = make_heads(), make_hidden(), make_all_labels()

    def loss(hidden):
        return medusa.loss(heads, hidden, labels, head_weights=WEIGHTS, chunk_size=16, implementation=implementation)

    # For each head: the block, the logits, and the gradients of their inputs.
    assert products(jax.grad(loss), hidden) == 4
    expected = jax.grad(lambda hidden: unfused(heads, hidden, labels))(hidden)
    np.testing.assert_allclose(jax.grad(loss)(hidden), expected, atol=1e-6)


def test_under_transformations(implementation):
    heads, hidden, labels = make_heads(), make_hidden(), make_all_labels()

    def loss(heads, hidden):
        return medusa.loss(heads, hidden, labels, head_weights=WEIGHTS, implementation=implementation)

    expected = jax.grad(loss, (0, 1))(heads, hidden)

    def assert_close(result):
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-5), result, expected)

    assert_close(jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(heads, hidden))
    # The residuals of a cached trace have the same structure, whatever is differentiated next.
    rematerialized = jax.jit(jax.checkpoint(loss))
    stage_1 = jax.grad(rematerialized)(heads, hidden)
    of_hidden = jax.grad(rematerialized, 1)(heads, hidden)
    assert_close((stage_1, of_hidden))
    # A backward pass does not change its inputs.
    value, pull_back = jax.vjp(loss, heads, hidden)
    twice = [pull_back(jnp.full_like(value, factor)) for factor in (2.0, 1.0)]
    assert_close(twice[1])

    def step(total, part):
        return total + loss(heads, part), None

    def scanned(parts):
        return jax.lax.scan(step, jnp.float32(0), parts)[0]

    result = jax.grad(scanned)(jnp.stack([hidden, hidden]))
    assert_close((expected[0], result[1]))


# ---- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["stage 1", "stage 2", "loss alone"])
def test_memory_does_not_grow_with_the_number_of_heads(wanted, implementation):
    if implementation == "triton" and not ON_GPU:
        pytest.skip("the interpreter's memory is not XLA's")
    tokens, hidden_size, vocab, chunk_size = 8192, 64, 2048, 256

    def temporary_bytes(num_heads):
        heads = types_of_heads(num_heads, hidden_size=hidden_size, vocab=vocab)
        hidden = jax.ShapeDtypeStruct((tokens, hidden_size), jnp.float32)
        labels = jax.ShapeDtypeStruct((num_heads, tokens), jnp.int32)

        def loss(heads, hidden, labels):
            return medusa.loss(heads, hidden, labels, chunk_size=chunk_size, implementation=implementation)

        function = {"stage 1": jax.grad(loss), "stage 2": jax.grad(loss, (0, 1)), "loss alone": loss}[wanted]
        return jax.jit(function).lower(heads, hidden, labels).compile().memory_analysis().temp_size_in_bytes

    two, six = temporary_bytes(2), temporary_bytes(6)
    # Apart from labels and per-token statistics, a head's logits are 2 MiB, and so are its features.
    per_token = 4 * 8 * tokens * (6 - 2)
    assert six - two <= per_token < 2 * 2**20


# ---- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (
            ValueError,
            r"labels got shape \(3, 5\); pass the labels of each head, \(3, 3, 5\)",
            {"labels": make_labels()},
        ),
        (ValueError, "head_weights got 2 numbers for 3 heads", {"head_weights": [1.0, 1.0]}),
        (ValueError, r"where got shape \(5,\)", {"where": np.ones(5, bool)}),
        (NotImplementedError, "reduction got 'none'", {"reduction": "none"}),
        (TypeError, "bias comes with the head", {"bias": np.ones(VOCAB)}),
    ],
)
def test_what_is_refused(error, says, arguments):
    with pytest.raises(error, match=says):
        medusa.loss(make_heads(), make_hidden(), **{"labels": make_all_labels(), **arguments})
