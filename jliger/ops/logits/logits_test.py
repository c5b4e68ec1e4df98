"""Tests the row functions of every backend against the same formulas in NumPy and float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger.ops.logits import Block, Coefficients, LogitMap, StatsWanted, get_rows
from jliger.testing.oracle import INTERPRETED, ON_GPU, every_pair

ROWS = 6
HAS_TILES = INTERPRETED or ON_GPU
BOTH = StatsWanted(weighted_sum=True, mean_logit=True)


def in_float64(product, block, logit_map, coefficients):
    """Logits, with −inf in the padding; statistics; and logit gradients."""
    product, bias, u, labels = (
        None if x is None else np.asarray(x, np.float64)
        for x in (product, block.bias, block.class_weights, block.labels)
    )
    columns = np.arange(product.shape[1])
    inside = columns < width_of(block, logit_map)
    with np.errstate(invalid="ignore"):
        logits = (product + (0 if bias is None else bias)) * logit_map.scale
        slope = np.full(logits.shape, logit_map.scale)
        if logit_map.softcap is not None:
            tanh = np.tanh(logits / logit_map.softcap)
            logits, slope = logit_map.softcap * tanh, logit_map.scale * (1 - tanh**2)
        if block.inverse_temperature is not None:
            by_row = np.asarray(block.inverse_temperature, np.float64)[:, None]
            logits, slope = logits * by_row, slope * by_row
    u = np.ones(product.shape[1]) if u is None else u
    weighted_sum = np.where(inside, logits * u, 0).sum(1)
    is_label = (columns == labels[:, None]) & inside
    label_logit = np.where(is_label, logits, 0).sum(1)
    logits = np.where(inside, logits, -np.inf)
    row_max = logits.max(1)
    log_sum = np.log(np.exp(logits - row_max[:, None]).sum(1))
    probability, label, by_lse, smoothing, by_logit = (
        np.zeros(ROWS) if field is None else np.asarray(field, np.float64) for field in coefficients
    )
    below = np.where(np.isinf(logits), 0, logits - row_max[:, None])
    factor = (probability + by_lse * (row_max + log_sum))[:, None] + by_logit[:, None] * below
    p = np.exp(logits - row_max[:, None] - log_sum[:, None])
    grads = p * factor - is_label * label[:, None] - smoothing[:, None] * u
    stats = (row_max, log_sum, label_logit, logits.argmax(1), weighted_sum, (p * below).sum(1))
    return logits, stats, np.where(inside, grads * slope, 0)


def width_of(block, logit_map):
    return logit_map.width if block.width is None else int(block.width)


def make_block(width, *, padding=0, dtype="float32", bias=False, class_weights=False, scale=1.0, seed=0):
    random = np.random.default_rng(seed)
    product = random.normal(size=(ROWS, width + padding)) * scale
    vectors = random.uniform(0.1, 2, size=(2, width + padding))
    # Columns beyond the width are NaN, which must not matter.
    product[:, width:], vectors[:, width:] = np.nan, np.nan
    # Labels: the first column, the last, one in the middle, and three outside the block.
    labels = [0, width - 1, width // 2, -1, width, width + 1]
    return jnp.asarray(product, dtype), Block(
        jnp.asarray(vectors[0], jnp.float32) if bias else None,
        jnp.asarray(vectors[1], jnp.float32) if class_weights else None,
        jnp.asarray(labels, jnp.int32),
    )


def make_coefficients(seed=0, *, by_lse=False, smoothing=False, by_logit=False):
    random = np.random.default_rng(seed)
    fields = jnp.asarray(random.normal(size=(5, ROWS)), jnp.float32)
    optional = zip(fields[2:], (by_lse, smoothing, by_logit), strict=True)
    return Coefficients(fields[0], fields[1], *(field if wanted else None for field, wanted in optional))


def check_rows(implementation, product, block, logit_map, coefficients, *, wanted=BOTH, dtype="float32"):
    """Checks all three functions, and that two launches and the fused launch agree."""
    rows = get_rows(implementation, None)

    @jax.jit
    def run(product, block, coefficients):
        stats = rows.row_stats(product, block, logit_map, wanted)
        grads = rows.row_grads(
            product, block, logit_map, stats.max, stats.log_sum, coefficients, dtype=jnp.dtype(dtype)
        )
        both = rows.row_stats_and_grads(product, block, logit_map, wanted, coefficients, dtype=jnp.dtype(dtype))
        return stats, grads, both

    stats, grads, (stats_again, grads_again) = run(product, block, coefficients)
    logits, expected_stats, expected_grads = in_float64(product, block, logit_map, coefficients)
    size = max(1.0, np.nanmax(np.abs(np.asarray(product, np.float64))) * abs(logit_map.scale))
    eps = np.finfo(np.float32).eps
    for result in (stats, stats_again):
        for name, value, truth in zip(result._fields, result, expected_stats, strict=True):
            if name == "prediction":
                assert value.dtype == jnp.int32
                chosen = np.take_along_axis(logits, np.asarray(value)[:, None], 1)[:, 0]
                assert np.all(chosen >= logits.max(1) - 8 * eps * size)  # a softcap can make logits equal
            elif value is None:
                assert not getattr(wanted, name)
            else:
                assert value.dtype == jnp.float32
                # A mean weighted by exponentials has their relative error.
                terms = {"weighted_sum": product.shape[1] * 2, "mean_logit": 16 * size}.get(name, 8)
                np.testing.assert_allclose(value, truth, rtol=4 * eps, atol=terms * eps * size, err_msg=name)
    largest = np.abs(expected_grads).max()
    for result in (grads, grads_again):
        assert result.dtype == jnp.dtype(dtype)
        # The relative error of an exponential is the absolute error of its argument.
        error = np.abs(np.asarray(result, np.float64) - expected_grads)
        half_unit = float(jnp.finfo(dtype).eps) / 2
        assert np.all(
            error <= half_unit * np.abs(expected_grads) + 16 * eps * size * largest + 1e-7 * (dtype == "float16")
        )
        assert not np.any(np.asarray(result)[:, width_of(block, logit_map) :]), "padding must have gradient 0"


BRANCHES = {
    "by_logit": [False, True],
    "vectors": [False, True],
    "with_lse_and_smoothing": [False, True],
    "softcap": [None, 3.0],
    "temperature": [False, True],
    "run_time_width": [False, True],
}


def every_branch():
    """All combinations; those not needed to cover every pair of values are marked exhaustive."""
    often = [tuple(row[name] for name in BRANCHES) for row in every_pair(BRANCHES)]
    for branch in itertools.product(*BRANCHES.values()):
        yield pytest.param(*branch, marks=[] if branch in often else [pytest.mark.exhaustive])


@pytest.mark.parametrize(list(BRANCHES), [*every_branch()])
def test_every_branch(by_logit, vectors, with_lse_and_smoothing, softcap, temperature, run_time_width, implementation):
    product, block = make_block(37, padding=3, bias=vectors, class_weights=vectors)
    if temperature:
        block = block._replace(inverse_temperature=jnp.linspace(0.3, 2, ROWS, dtype=jnp.float32))
    coefficients = make_coefficients(by_lse=with_lse_and_smoothing, smoothing=with_lse_and_smoothing, by_logit=by_logit)
    if run_time_width:
        block = block._replace(width=jnp.int32(37))
    wanted, width = StatsWanted(with_lse_and_smoothing, by_logit), 39 if run_time_width else 37
    check_rows(implementation, product, block, LogitMap(0.7, softcap, width), coefficients, wanted=wanted)


@pytest.mark.parametrize(
    "width",
    [
        # XLA has no tiles.
        pytest.param(width, marks=[] if HAS_TILES or width in (1, 257, 33000) else [pytest.mark.exhaustive])
        for width in (1, 2, 7, 8, 9, 255, 256, 257, 2047, 2048, 2049, 8192, 8193, 33000, 70001)
    ],
)
def test_widths_about_those_of_tiles(width, implementation):
    if INTERPRETED and width > 9000:
        pytest.skip("minutes, interpreted")
    product, block = make_block(width, padding=-width % 8, bias=True)
    check_rows(implementation, product, block, LogitMap(1.0, None, width), make_coefficients())


@pytest.mark.parametrize("width", [15, 16, 17, 1200])
def test_wide_rows_in_triton_have_tiles_of_longer_vectors(width, monkeypatch):
    from jliger.ops.logits import triton

    if not HAS_TILES:
        pytest.skip("runs Triton kernels, which need a GPU or the interpreter")
    monkeypatch.setattr(triton, "_WIDE", 0)
    product, block = make_block(width, padding=-width % 8, bias=True)
    assert triton.launch(product, LogitMap(1.0, None, width), passes=2)["TILE"].vector == 16
    check_rows("triton", product, block, LogitMap(1.0, None, width), make_coefficients())


@pytest.mark.parametrize("at_run_time", [False, True])
@pytest.mark.parametrize("width", [9, 256, 600])
def test_more_padding_than_a_tile(width, at_run_time, implementation):
    product, block = make_block(width, padding=1024 - width, bias=True)
    if at_run_time:
        block = block._replace(width=jnp.int32(width))
    check_rows(implementation, product, block, LogitMap(1.0, None, 1000 if at_run_time else width), make_coefficients())


def test_no_columns(implementation):
    # As on a device whose share of the vocabulary is all padding.
    product, block = make_block(0, padding=40, bias=True)
    block = block._replace(width=jnp.int32(0), labels=jnp.full(ROWS, -1, jnp.int32))
    rows, logit_map = get_rows(implementation, None), LogitMap(1.0, None, 40)
    stats = rows.row_stats(product, block, logit_map, BOTH)
    np.testing.assert_array_equal(stats.max, np.finfo(np.float32).min)
    np.testing.assert_array_equal(stats.log_sum, -np.inf)
    np.testing.assert_array_equal(stats.label_logit, 0)
    np.testing.assert_array_equal(stats.weighted_sum, 0)
    zeros = jnp.zeros(ROWS)
    grads = rows.row_grads(product, block, logit_map, zeros, zeros, make_coefficients(), dtype=jnp.dtype("float32"))
    np.testing.assert_array_equal(grads, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_dtypes_and_scales(scale, dtype, implementation):
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    product, block = make_block(90, padding=6, dtype=dtype, bias=True, scale=scale)
    coefficients = make_coefficients(by_lse=True, smoothing=True, by_logit=True)
    check_rows(implementation, product, block, LogitMap(1.0, None, 90), coefficients, dtype=dtype)


@pytest.mark.parametrize("softcap", [1e-3, 1.0, 50.0, 1e4])
def test_softcaps_from_hard_to_none_at_all(softcap, implementation):
    product, block = make_block(64, scale=20)
    check_rows(implementation, product, block, LogitMap(1.0, softcap, 64), make_coefficients())


def test_a_negative_scale(implementation):
    product, block = make_block(64, scale=5)
    check_rows(implementation, product, block, LogitMap(-2.0, None, 64), make_coefficients())


def test_the_first_of_equal_logits_is_predicted(implementation):
    random = np.random.default_rng(0)
    for width in (40, 3000):
        product = random.integers(-2, 3, size=(ROWS, width)).astype(np.float32)
        product[0] = 1.5
        rows = get_rows(implementation, None)
        block = Block(None, None, jnp.zeros(ROWS, jnp.int32))
        stats = rows.row_stats(jnp.asarray(product), block, LogitMap(1.0, None, width), StatsWanted())
        np.testing.assert_array_equal(stats.prediction, product.argmax(1))


def test_a_logit_of_minus_infinity_has_probability_zero(implementation):
    # A bias of −inf masks a column.
    product, block = make_block(40, bias=True)
    masked = block._replace(bias=block.bias.at[7].set(-jnp.inf))
    rows = get_rows(implementation, None)
    coefficients = make_coefficients(by_logit=True)
    stats, grads = rows.row_stats_and_grads(
        product, masked, LogitMap(1.0, None, 40), BOTH._replace(weighted_sum=False), coefficients,
        dtype=jnp.dtype("float32"),
    )  # fmt: skip
    _, (row_max, log_sum, *_, mean_logit), expected = in_float64(product, masked, LogitMap(1.0, None, 40), coefficients)
    np.testing.assert_allclose(stats.max + stats.log_sum, row_max + log_sum, rtol=1e-6)
    np.testing.assert_allclose(stats.mean_logit, mean_logit, rtol=1e-6)
    np.testing.assert_allclose(grads, expected, atol=1e-6)
    assert not np.any(grads[:, 7])


def test_large_coefficients_of_columns_with_probability_zero(implementation):
    """A coefficient times the lowest number overflows, and 0 · inf is NaN."""
    width = 3000  # Whole tiles are masked before and after the unmasked ones.
    product, block = make_block(width, bias=True)
    lowest = np.finfo(np.float32).min
    bias = block.bias.at[:600].set(lowest).at[600:1200].set(-jnp.inf).at[2000:2500].set(-jnp.inf).at[2500:].set(lowest)
    block = block._replace(bias=bias, labels=jnp.arange(ROWS, dtype=jnp.int32) + 1198)
    sizes = jnp.array([1e6, -1e6, 1e30, -1e30, 1, -1], jnp.float32)
    coefficients = make_coefficients(by_logit=True)._replace(probability_logit=sizes)
    rows = get_rows(implementation, None)
    stats, grads = rows.row_stats_and_grads(
        product, block, LogitMap(1.0, None, width), StatsWanted(mean_logit=True), coefficients,
        dtype=jnp.dtype("float32"),
    )  # fmt: skip
    _, expected_stats, expected = in_float64(product, block, LogitMap(1.0, None, width), coefficients)
    np.testing.assert_allclose(stats.mean_logit, expected_stats[-1], rtol=1e-5)
    np.testing.assert_allclose(grads / sizes[:, None], expected / np.asarray(sizes)[:, None], atol=1e-6)
    assert not np.any(grads[:, 2000:])


def test_a_logit_that_is_not_a_number_is_not_hidden(implementation):
    product, block = make_block(40)
    rows = get_rows(implementation, None)
    stats, grads = rows.row_stats_and_grads(
        product.at[1, 20].set(jnp.nan), block, LogitMap(1.0, None, 40), StatsWanted(), make_coefficients(),
        dtype=jnp.dtype("float32"),
    )  # fmt: skip
    np.testing.assert_array_equal(np.isnan(stats.max + stats.log_sum), np.arange(ROWS) == 1)
    assert np.isnan(grads[1]).all()
    assert np.isfinite(np.delete(np.asarray(grads), 1, axis=0)).all()
