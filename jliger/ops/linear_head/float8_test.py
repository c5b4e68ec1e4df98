"""Tests 8-bit products: their errors stay within what rounding to 8 bits explains, and everything else is exact."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.ops.linear_head.chunks.float8 import _units
from jliger.ops.linear_head.chunks.packed_rows import pack_units
from jliger.ops.linear_head.types import Operands
from jliger.ops.logits import Block, Coefficients, LogitMap, StatsWanted, get_rows
from jliger.ops.logits.float8 import E4M3, get_float8, quantized
from jliger.ops.logits.float8_xla import dithered
from jliger.testing.oracle import IMPLEMENTATIONS, INTERPRETED, ON_GPU

TOKENS, HIDDEN, VOCAB = 48, 32, 200
DTYPE = "float32" if INTERPRETED else "bfloat16"  # the interpreter truncates where it should round to bfloat16

_loss = functools.partial(jliger.fused_linear_cross_entropy, implementation=IMPLEMENTATIONS[-1])


def make_problem(seed=0, *, deviation=1.0, scale=1.0, dtype=DTYPE):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(TOKENS, HIDDEN)) * scale
    kernel = random.normal(size=(HIDDEN, VOCAB)) * deviation / scale / HIDDEN**0.5
    labels = random.integers(0, VOCAB, TOKENS)
    return jnp.asarray(hidden, dtype), jnp.asarray(kernel, jnp.float32), jnp.asarray(labels, jnp.int32)


@functools.partial(jax.jit, static_argnames=("products", "kernel_layout", "names"))
def value_and_grads(inputs, labels, products="float8", kernel_layout="hv", names=(), **options):
    """The loss and the gradients of every input."""
    options |= dict(names)

    def loss(inputs):
        return _loss(labels=labels, products=products, kernel_layout=kernel_layout, **inputs, **options)

    return jax.value_and_grad(loss)(inputs)


def in_float64(hidden, kernel, labels):
    """The loss, logit gradients without and with the label's part, all of the mean."""
    hidden, kernel = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    logits = hidden @ kernel
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    is_label = np.arange(VOCAB) == np.asarray(labels)[:, None]
    loss = -np.log(p[is_label]).mean()
    return loss, np.where(is_label, 0, p) / len(labels), (p - is_label) / len(labels)


def relative(result, oracle):
    return np.linalg.norm(np.asarray(result, np.float64) - oracle) / np.linalg.norm(oracle)


def test_each_error_is_within_the_rounding_of_its_8_bit_operands():
    # On the grid of e4m3, hidden states and kernel lose nothing: what remains is the rounding of the logit gradients,
    # and of the hidden states in units of each token.
    hidden, kernel, labels = make_problem(dtype="float32")
    hidden, kernel = (values.astype(jnp.float32) * scale for values, scale in map(quantized, (hidden, kernel)))
    loss, grads = value_and_grads({"hidden": hidden, "kernel": kernel}, labels)
    in_loss, others, whole = in_float64(hidden, kernel, labels)
    hidden, kernel = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    # A GPU's fast sums of logits have 14 bits.
    assert abs(loss - in_loss) < (1e-3 if ON_GPU else 1e-5)
    # Rounding changes a number by at most 2⁻² of it in e5m2 (up or down), and 2⁻⁴ in e4m3 (to the nearest). In e5m2 the
    # label's gradient is exact. The least numbers that 8 bits hold are further below the largest than 1e-7.
    size = np.abs(whole).max()
    bound = others @ np.abs(kernel).T / 4 + 1e-7 * size
    assert (np.abs(grads["hidden"] - whole @ kernel.T) <= bound).all()
    bound = np.abs(hidden).T @ (others / 4 * (1 + 1 / 16) + np.abs(whole) / 16) + 1e-5 * size
    assert (np.abs(grads["kernel"] - hidden.T @ whole) <= bound).all()


@pytest.mark.parametrize(("deviation", "scale"), [(1.0, 1.0), (2.0, 1000.0)])
def test_gradients_point_where_they_should(deviation, scale):
    hidden, kernel, labels = make_problem(deviation=deviation, scale=scale)
    loss, grads = value_and_grads({"hidden": hidden, "kernel": kernel}, labels)
    in_loss, _, whole = in_float64(hidden, kernel, labels)
    assert abs(loss - in_loss) < 0.02 * deviation
    oracle = {
        "hidden": whole @ np.asarray(kernel, np.float64).T,
        "kernel": np.asarray(hidden, np.float64).T @ whole,
    }
    for name, grad in grads.items():
        assert grad.dtype == {"hidden": hidden, "kernel": kernel}[name].dtype
        # sqrt(1 − 0.999²) = 0.0447: a cosine of 0.999.
        assert 0.01 < relative(grad, oracle[name]) < 0.0447, name


# One kernel, whatever the options: the interpreter, which is slow, runs it in the tests above.
@(pytest.mark.exhaustive if INTERPRETED else lambda test: test)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("hv", {"logit_softcap": 3.0, "z_loss": 1e-3, "label_smoothing": 0.1, "chunk_size": 32}),
        ("vh", {"temperature": 1.5, "vocab_size": 150, "logit_scale": 0.5, "reduction": "sum"}),
    ],
)
def test_options(layout, options):
    hidden, kernel, labels = make_problem(1)
    random = np.random.default_rng(2)
    inputs = {"hidden": hidden, "kernel": kernel if layout == "hv" else kernel.T}
    arrays = {"weights": jnp.asarray(random.uniform(0, 1, TOKENS), jnp.float32)}
    if layout == "hv":
        inputs["bias"] = jnp.asarray(random.normal(size=VOCAB), jnp.float32)
        arrays["class_weights"] = jnp.asarray(random.uniform(0, 2, VOCAB), jnp.float32)
    labels = jnp.where(labels < options.get("vocab_size", VOCAB), labels, -100)
    run = functools.partial(
        value_and_grads, inputs, labels, kernel_layout=layout, names=tuple(options.items()), **arrays
    )
    (loss, grads), (plain_loss, plain_grads) = run(), run(products=None)
    assert abs(loss / plain_loss - 1) < 0.01
    for name, grad in grads.items():
        oracle = np.asarray(plain_grads[name], np.float64)
        assert relative(grad, oracle) < 0.04, name
        assert (np.asarray(grad)[oracle == 0] == 0).all(), name
    # Without gradients, the loss is the same.
    alone = jax.jit(
        lambda: _loss(**inputs, labels=labels, products="float8", kernel_layout=layout, **options, **arrays)
    )
    assert abs(alone() / loss - 1) < 1e-6


def test_a_cotangent_multiplies_the_gradients():
    hidden, kernel, labels = make_problem(dtype="float32")
    _, of_one = value_and_grads({"hidden": hidden, "kernel": kernel}, labels)
    loss = functools.partial(_loss, labels=labels, products="float8")
    cotangent = jax.random.normal(jax.random.key(1))
    grads = jax.jit(lambda *inputs: jax.vjp(loss, *inputs)[1](cotangent))(hidden, kernel)
    for grad, one in zip(grads, of_one.values(), strict=True):
        np.testing.assert_allclose(grad, cotangent * one, rtol=1e-6)


def test_labels_that_poison():
    hidden, kernel, labels = make_problem()
    loss, grads = value_and_grads({"hidden": hidden, "kernel": kernel}, labels.at[3].set(VOCAB).at[5].set(-100))
    assert np.isnan(loss)
    assert np.isnan(grads["kernel"]).all()
    assert (np.isnan(grads["hidden"]).any(1) == (np.arange(TOKENS) == 3)).all()
    assert (grads["hidden"][5] == 0).all()


def test_kernels_whose_columns_differ_in_size():
    # As after one step from zeros: the columns of labels are much larger than all others.
    hidden, kernel, _ = make_problem()
    labels = jnp.where(jnp.arange(TOKENS) % 2, 1, 37)
    kernel = jnp.full_like(kernel, 1e-4).at[:, [1, 37]].set(3 * kernel[:, [1, 37]])
    # Columns that do not exist may hold anything.
    padded = jnp.pad(kernel, ((0, 0), (0, 8)), constant_values=1e6).T
    loss = jax.jit(functools.partial(_loss, products="float8", kernel_layout="vh", vocab_size=VOCAB))
    assert abs(loss(hidden, padded, labels) - in_float64(hidden, kernel, labels)[0]) < 0.05


@functools.partial(jax.jit, static_argnames="scale")
def largest_in_units(product, coefficients, inverse_temperature=None, *, scale=1.0):
    """The largest gradient in its row's unit, for labels in the first column."""
    labels = jnp.zeros(product.shape[:1], jnp.int32)
    block = Block(None, None, labels, inverse_temperature, None)
    rows, config = get_rows("xla", None), types.SimpleNamespace(logit_softcap=None, logit_scale=scale)
    logit_map = LogitMap(scale, None, product.shape[1])
    stats = rows.row_stats(product, block, logit_map, StatsWanted())
    units = _units(config, stats, coefficients, block)
    of_row = stats.max, stats.log_sum, coefficients
    grads = rows.row_grads(product, block, logit_map, *of_row, dtype=jnp.float32)
    return jnp.abs(jnp.where(units[:, None] == 0, 0, grads / units[:, None])).max()


LARGEST_NUMBER = float(jnp.finfo(jnp.float8_e5m2).max)


def test_no_gradient_of_a_confident_token_exceeds_8_bits():
    # 1 − p of the label is a few roundings of 1, and the z-loss cancels it in the label's gradient.
    gaps = jnp.tile(jnp.linspace(15.4, 16.8, 64), 256)
    product = jnp.stack([0 * gaps, -gaps], axis=1) + jnp.linspace(0, 1e-3, 256).repeat(64)[:, None]
    weights = jnp.full(gaps.shape, 1 / 4095)
    assert largest_in_units(product, Coefficients(weights, weights, 2e-4 * weights)) <= LARGEST_NUMBER


def test_no_rounding_exceeds_8_bits():
    # Of the log-sum-exp alone, the largest gradient is that of another column. It is computed from factors that are
    # rounded, and a number just above the largest is rounded up to ∞ once in 2²¹ times.
    random = np.random.default_rng(0)
    product = jnp.asarray(3 * random.normal(size=(20_000, 16)), jnp.float32)
    factor, inverse_temperature = jnp.asarray(random.uniform(0.3, 3, (2, len(product))), jnp.float32)
    largest = largest_in_units(product, Coefficients(factor, 0 * factor), inverse_temperature, scale=0.7)
    assert 0.99 * LARGEST_NUMBER < largest <= LARGEST_NUMBER


@(pytest.mark.exhaustive if INTERPRETED else lambda test: test)
def test_smoothing_as_large_as_the_label():
    hidden, kernel = jnp.ones((16, 16), DTYPE), jnp.zeros((16, 112)).at[:, 5].set(-1.0)
    labels, class_weights = jnp.full(16, 5), jnp.zeros(112).at[5].set(1.0)
    run = functools.partial(
        value_and_grads,
        {"hidden": hidden, "kernel": kernel},
        labels,
        names=(("label_smoothing", 0.99),),
        class_weights=class_weights,
    )
    for grad, plain in zip(run()[1].values(), run(products=None)[1].values(), strict=True):
        assert relative(grad, np.asarray(plain, np.float64)) < 0.04


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_row_gradients_are_those_of_the_row_functions_dithered(implementation, softcap):
    random, (rows, width, stride) = np.random.default_rng(3), (70, 300, 384)
    product = jnp.asarray(random.normal(size=(rows, stride)), jnp.float32)
    per_row = [jnp.asarray(random.uniform(0.1, 2, rows), jnp.float32) for _ in range(6)]
    vectors = [jnp.asarray(random.uniform(0.1, 2, stride), jnp.float32) for _ in range(2)]
    labels = jnp.asarray(random.integers(-1, width + 5, rows), jnp.int32)
    given = softcap is not None
    block = Block(
        *((vector if given else None) for vector in vectors),
        labels,
        per_row[0] if given else None,
        jnp.int32(width - 7) if given else None,
    )
    # Large, because e5m2 has fewer digits below 2⁻¹⁴.
    coefficients = Coefficients(*(field * 1e4 if given or i < 2 else None for i, field in enumerate(per_row[1:])))
    arguments = product, block, LogitMap(0.5, softcap, width), jnp.full(rows, 3.0), jnp.full(rows, 4.0), coefficients
    grads, transposed = get_float8(implementation, None).row_grads(*arguments)
    assert (as_bytes(grads) == as_bytes(transposed).T).all()
    exact = np.asarray(get_rows(implementation, None).row_grads(*arguments, dtype=jnp.float32))
    error = np.asarray(grads, np.float32) - exact
    assert (np.abs(error) <= np.abs(exact) / 4 + 2.0**-17).all()
    # Every backend dithers alike. They compute in float32, in another order: a number may go the other way.
    assert (as_bytes(grads) != as_bytes(dithered(exact).astype(jnp.float8_e5m2))).mean() < 1e-3
    matrix = product[:, :190] * 1000
    values, transposed = get_float8(implementation, None).both_layouts(matrix, jnp.float32(0.25))
    assert (as_bytes(values) == as_bytes(jnp.clip(matrix * 0.25, -448, 448).astype(E4M3))).all()
    # Not the largest number of 8 bits, with which results would be finite.
    infinite = get_float8(implementation, None).both_layouts(matrix[:16].at[3, 5].set(-jnp.inf), jnp.float32(0.25))[0]
    assert np.isnan(np.asarray(infinite[3, 5], np.float32))
    assert np.isnan(np.asarray(infinite, np.float32)).sum() == 1
    assert (as_bytes(transposed) == as_bytes(values).T).all()


def test_dithering_makes_the_mean_exact_where_numbers_are_alike():
    # To the nearest, 1.1 would be 1.
    error = np.asarray(dithered(jnp.full((512, 512), 1.1)).astype(jnp.float8_e5m2), np.float32) / 1.1 - 1
    assert abs(error.mean()) < 0.002
    assert np.abs(error.mean(0)).max() < 0.04
    assert np.abs(error.mean(1)).max() < 0.04


def as_bytes(array):
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "products got 'int8'", {"products": "int8"}),
        (ValueError, "precision got 'high'", {"precision": "high"}),
        (TypeError, "logits_dtype got dtype float16", {"logits_dtype": "float16"}),
        (NotImplementedError, "adapter", {"adapter": (jnp.ones((HIDDEN, 2)), jnp.ones((2, VOCAB)))}),
    ],
)
def test_what_is_refused(error, match, options):
    hidden, kernel, labels = make_problem()
    with pytest.raises(error, match=match):
        _loss(hidden, kernel, labels, **{"products": "float8", **options})


def test_gpus_without_8_bit_products_are_refused():
    if ON_GPU or INTERPRETED:
        pytest.skip("lowers for a GPU that is not there")
    pytest.importorskip("triton")
    problem = make_problem()
    with jliger.compute_capability(80), pytest.raises(ValueError, match=r"8\.9 or later .* got one of 8\.0"):
        jax.eval_shape(functools.partial(jliger.fused_linear_cross_entropy, products="float8"), *problem)


def test_second_derivatives_are_refused():
    hidden, kernel, labels = make_problem()
    with pytest.raises(NotImplementedError, match="got differentiated"):
        jax.jvp(jax.grad(lambda hidden: _loss(hidden, kernel, labels, products="float8")), (hidden,), (hidden,))


@pytest.mark.parametrize("units", [pytest.param("tokens", marks=pytest.mark.exhaustive), "rows"])
def test_any_loss_of_log_probabilities(units):
    hidden, kernel, labels = make_problem(4)
    hidden, labels = hidden.reshape(4, -1, HIDDEN), labels.reshape(4, -1)

    def of_unit(result):
        mean = jnp.mean(result.logprobs) - 0.1 * jnp.mean(result.entropy)
        return mean * mean if units == "rows" else mean

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(products):
        options = {"products": products, "chunk_size": 24, "implementation": IMPLEMENTATIONS[-1]}

        def loss(hidden, kernel):
            return jliger.fused_linear_loss(of_unit, hidden, kernel, labels, units=units, **options)

        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    (value, grads), (plain_value, plain_grads) = gradients("float8"), gradients(None)
    assert abs(value / plain_value - 1) < 0.01
    for grad, plain in zip(grads, plain_grads, strict=True):
        assert relative(grad, np.asarray(plain, np.float64)) < 0.04


def test_chunks_of_rows_have_places_for_a_multiple_of_16():
    # Products of other sizes are padded, and what is padded is copied.
    operands = Operands(jnp.zeros((39, 16)), jnp.zeros((16, 64)), labels=jnp.zeros(39, jnp.int32))
    config = types.SimpleNamespace(chunk_size=26)

    def places():
        return jnp.zeros(pack_units(config, operands, 64, row_length=13, alignment=16)[0].tokens.chunk)

    assert jax.eval_shape(places).shape == (32,)
