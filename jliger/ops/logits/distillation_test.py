"""Tests the distillation row functions of every backend against the same formulas in NumPy and float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger.ops.logits import Block, LogitMap
from jliger.ops.logits.distillation import (
    DistillationBlock,
    DistillationCoefficients,
    DistillationMap,
    Products,
    get_distillation_rows,
)
from jliger.testing.oracle import INTERPRETED, ON_GPU, every_pair

ROWS = 6
BETAS = [0.0, 0.1, 0.5, 1.0]
HAS_TILES = INTERPRETED or ON_GPU


def logits_in_float64(product, bias, logit_map):
    """The logits of the columns within the width, and their derivative by the product."""
    product = np.asarray(product, np.float64)[:, : logit_map.width]
    bias = 0 if bias is None else np.asarray(bias, np.float64)[: logit_map.width]
    with np.errstate(invalid="ignore"):
        logits = (product + bias) * logit_map.scale
    if logit_map.softcap is None:
        return logits, logit_map.scale
    tanh = np.tanh(logits / logit_map.softcap)
    return logit_map.softcap * tanh, logit_map.scale * (1 - tanh**2)


def log_softmax(logits):
    below = logits - logits.max(1, keepdims=True)
    return below - np.log(np.exp(below).sum(1, keepdims=True))


def times(p, factor):
    """`p · factor`, and 0 where `p` is 0."""
    with np.errstate(invalid="ignore"):
        return np.where(p == 0, 0, p * factor)


def in_float64(products, block, distillation_map, coefficients):
    """The divergence of each row, the log-probability of its label, and logit gradients.

    Gradients are those of the definition by `p`, times the softmax's Jacobian.
    """
    logits, by_product = logits_in_float64(products.student, block.student.bias, distillation_map.student)
    teacher_logits, _ = logits_in_float64(products.teacher, block.teacher.bias, distillation_map.teacher)
    beta, tau = distillation_map.beta, distillation_map.temperature
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p, log_r = log_softmax(logits / tau), log_softmax(teacher_logits / tau)
        p, r = np.exp(log_p), np.exp(log_r)
        if beta == 0:
            value, by_p = times(r, log_r - log_p).sum(1), -r  # times p, which may be 0 where r is not
        elif beta == 1:
            value, by_p = times(p, log_p - log_r).sum(1), times(p, log_p - log_r + 1)
        else:
            log_m = np.logaddexp(np.log(beta) + log_r, np.log(1 - beta) + log_p)
            value = beta * times(r, log_r - log_m).sum(1) + (1 - beta) * times(p, log_p - log_m).sum(1)
            by_p = (1 - beta) * times(p, log_p - log_m)
        grads = (by_p - p * by_p.sum(1, keepdims=True)) * np.asarray(coefficients.soft, np.float64)[:, None]
    label_logprob = None
    if distillation_map.with_labels:
        labels = np.asarray(block.student.labels)
        is_label = np.arange(distillation_map.student.width) == labels[:, None]
        hard = log_softmax(logits)
        grads += np.exp(hard) * np.asarray(coefficients.probability, np.float64)[:, None]
        grads -= is_label * np.asarray(coefficients.label, np.float64)[:, None]
        label_logprob = np.where(is_label.any(1), np.where(is_label, hard, 0).sum(1), np.nan)
    return value, label_logprob, grads * by_product


def make_pair(
    width, *, padding=0, dtypes=("float32", "float32"), biases=(False, False), scale=1.0, labels=True, seed=0
):
    """Random products, blocks and coefficients. Columns beyond the width are NaN, which must not matter."""
    random = np.random.default_rng(seed)

    def side(dtype, bias):
        product = random.normal(size=(ROWS, width + padding)) * scale
        vector = random.normal(size=width + padding)
        product[:, width:], vector[width:] = np.nan, np.nan
        return jnp.asarray(product, dtype), jnp.asarray(vector, jnp.float32) if bias else None

    (student, student_bias), (teacher, teacher_bias) = map(side, dtypes, biases)
    # Labels: the first column, the last, one in the middle, and three outside the block.
    columns = jnp.asarray([0, width - 1, width // 2, -1, width, width + 1], jnp.int32)
    coefficients = jnp.asarray(random.normal(size=(3, ROWS)), jnp.float32)
    return (
        Products(student, teacher),
        DistillationBlock(Block(student_bias, None, columns), Block(teacher_bias, None, columns)),
        DistillationCoefficients(coefficients[0], *(coefficients[1:] if labels else (None, None))),
    )


def make_map(width, beta, *, temperature=1.0, labels=True, scales=(1.0, 1.0), softcaps=(None, None)):
    student, teacher = (LogitMap(scale, cap, width) for scale, cap in zip(scales, softcaps, strict=True))
    return DistillationMap(student, teacher, beta, temperature, labels)


def run(implementation, products, block, distillation_map, coefficients, dtype="float32"):
    """The results of three launches and of the fused launch, which differ only by the order of summation."""
    rows = get_distillation_rows(implementation, None)
    if block.student.width is not None:
        # At compile time the width is then only known to be at most that of the products.
        student, teacher = (side._replace(width=products.student.shape[1]) for side in distillation_map[:2])
        distillation_map = distillation_map._replace(student=student, teacher=teacher)

    @jax.jit
    def both_ways(products, block, coefficients):
        stats = rows.distillation_stats(products, block, distillation_map)
        divergence = rows.distillation_divergence(products, block, distillation_map, stats)
        grads = rows.distillation_grads(
            products, block, distillation_map, stats, divergence.q_sum, coefficients, dtype=jnp.dtype(dtype)
        )
        at_once = rows.distillation_stats_and_grads(
            products, block, distillation_map, coefficients, dtype=jnp.dtype(dtype)
        )
        return (stats, divergence, grads), at_once

    return both_ways(products, block, coefficients)


def check_pair(implementation, products, block, distillation_map, coefficients, dtype="float32"):
    value, label_logprob, grads = in_float64(products, block, distillation_map, coefficients)
    width = distillation_map.student.width
    tiny = float(jnp.finfo(jnp.float32).eps)
    # The rounding error of the exponentials' arguments in float32.
    largest = max(
        np.abs(logits_in_float64(product, side.bias, logit_map)[0]).max()
        for product, side, logit_map in zip(products, block, distillation_map, strict=False)
    )
    rounding = 8 * tiny * max(1.0, largest / distillation_map.temperature, largest)
    for stats, divergence, result in run(implementation, products, block, distillation_map, coefficients, dtype):
        np.testing.assert_allclose(divergence.value, value, rtol=rounding, atol=rounding)
        if label_logprob is not None:
            log_sum = stats.student.log_sum if stats.hard_log_sum is None else stats.hard_log_sum
            logprob = stats.label_logit - stats.student.max - log_sum
            has_label = np.isfinite(label_logprob)
            np.testing.assert_allclose(logprob[has_label], label_logprob[has_label], rtol=rounding, atol=rounding)
            np.testing.assert_array_equal(stats.label_logit[~has_label], 0)
        for softmax, product, side, logit_map in zip(stats[:2], products, block, distillation_map[:2], strict=True):
            logits, _ = logits_in_float64(product, side.bias, logit_map)
            np.testing.assert_allclose(softmax.max, logits.max(1), rtol=4 * tiny)
            chosen = np.take_along_axis(logits, np.asarray(softmax.prediction)[:, None], 1)[:, 0]
            np.testing.assert_allclose(chosen, logits.max(1), rtol=4 * tiny)
        result = np.asarray(result, np.float64)
        assert not result[:, width:].any()
        # The derivatives of a divergence are as large as log-probabilities.
        size = np.abs(grads).max()
        half_unit = float(jnp.finfo(dtype).eps) / 2 if dtype != "float32" else 0
        subnormal = float(jnp.finfo(dtype).smallest_subnormal)
        np.testing.assert_allclose(result[:, :width], grads, rtol=half_unit, atol=rounding * size + subnormal)


@pytest.mark.parametrize(
    ("temperature", "labels", "beta"),
    [
        pytest.param(temperature, labels, beta, marks=[] if (i + j) % 2 == 0 else [pytest.mark.exhaustive])
        for i, (temperature, labels) in enumerate([(1.0, False), (1.0, True), (3.0, False), (0.5, True)])
        for j, beta in enumerate(BETAS)
    ],
)
def test_every_divergence(temperature, labels, beta, implementation):
    products, block, coefficients = make_pair(301, padding=3, labels=labels, scale=3)
    distillation_map = make_map(301, beta, temperature=temperature, labels=labels)
    check_pair(implementation, products, block, distillation_map, coefficients)


MAPS = {
    "beta": BETAS,
    "softcaps": [(None, None), (5.0, None), (None, 5.0), (5.0, 30.0)],
    "biases": [(False, False), (True, False), (False, True), (True, True)],
    "run_time_width": [False, True],
}


@pytest.mark.parametrize("options", every_pair(MAPS), ids=itertools.count())
def test_maps_of_either_side(options, implementation):
    beta, softcaps, biases = options["beta"], options["softcaps"], options["biases"]
    products, block, coefficients = make_pair(37, padding=3, biases=biases, scale=3)
    if options["run_time_width"]:
        block = DistillationBlock(*(side._replace(width=jnp.int32(37)) for side in block))
    distillation_map = make_map(37, beta, temperature=2.0, scales=(0.7, -1.3), softcaps=softcaps)
    check_pair(implementation, products, block, distillation_map, coefficients)


def test_more_padding_than_a_tile(implementation):
    products, block, coefficients = make_pair(300, padding=724, biases=(True, True))
    check_pair(implementation, products, block, make_map(300, 0.5), coefficients)
    block = DistillationBlock(*(side._replace(width=jnp.int32(300)) for side in block))
    check_pair(implementation, products, block, make_map(300, 0.5), coefficients)


@pytest.mark.parametrize(
    "width",
    [
        # XLA has no tiles.
        pytest.param(width, marks=[] if HAS_TILES or width in (1, 257, 33000) else [pytest.mark.exhaustive])
        for width in (1, 2, 8, 9, 255, 256, 257, 2049, 8192, 8193, 33000)
    ],
)
def test_widths_about_those_of_tiles(width, implementation):
    if INTERPRETED and width > 9000:
        pytest.skip("minutes, interpreted")
    beta = BETAS[width % 3]
    products, block, coefficients = make_pair(width, padding=-width % 8, biases=(True, True))
    check_pair(implementation, products, block, make_map(width, beta, temperature=1.5), coefficients)


SCALES = {
    "beta": BETAS,
    "dtypes": [("float32", "float16"), ("float16", "float32"), ("bfloat16", "bfloat16")],
    "scale": [1, 30, 1000],
}


@pytest.mark.parametrize("options", every_pair(SCALES), ids=itertools.count())
def test_dtypes_and_scales(options, implementation):
    scale, dtypes, beta = options["scale"], options["dtypes"], options["beta"]
    if INTERPRETED and "bfloat16" in dtypes:
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    products, block, coefficients = make_pair(90, padding=6, dtypes=dtypes, biases=(True, False), scale=scale)
    check_pair(implementation, products, block, make_map(90, beta), coefficients, dtype=dtypes[0])


@pytest.mark.parametrize("beta", BETAS)
def test_equal_logits_are_no_distance_apart(beta, implementation):
    products, block, coefficients = make_pair(200, scale=4, labels=False)
    products = products._replace(teacher=products.student + 2.0)  # a shift of the logits does not change the softmax
    for _, divergence, grads in run(implementation, products, block, make_map(200, beta, labels=False), coefficients):
        # Rounding errors of logarithms, weighted by probabilities.
        np.testing.assert_allclose(divergence.value, 0, atol=2e-6)
        np.testing.assert_allclose(grads, 0, atol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_disjoint_rows_are_as_far_apart_as_can_be(beta, implementation):
    # The student is certain of the first column, the teacher of the second.
    columns = jnp.arange(40)
    far = 200.0
    student, teacher = (jnp.broadcast_to(jnp.where(columns == column, far, 0), (ROWS, 40)) for column in (0, 1))
    _, block, coefficients = make_pair(40, labels=False)
    distillation_map = make_map(40, beta, labels=False)
    expected = far if beta in (0, 1) else -beta * np.log(beta) - (1 - beta) * np.log1p(-beta)
    for _, divergence, grads in run(implementation, Products(student, teacher), block, distillation_map, coefficients):
        np.testing.assert_allclose(divergence.value, expected, rtol=1e-6)
        # Only KL(teacher ‖ student) still has a gradient if the student is certain.
        pull = np.zeros((ROWS, 40))
        if beta == 0:
            pull[:, 0], pull[:, 1] = 1, -1
        np.testing.assert_allclose(grads, pull * coefficients.soft[:, None], atol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_column_that_both_mask_has_no_say(beta, implementation):
    products, block, coefficients = make_pair(40, biases=(True, True))
    masked = DistillationBlock(*(side._replace(bias=side.bias.at[7].set(-jnp.inf)) for side in block))
    distillation_map = make_map(40, beta, temperature=2.0)
    value, _, expected = in_float64(products, masked, distillation_map, coefficients)
    for _, divergence, grads in run(implementation, products, masked, distillation_map, coefficients):
        np.testing.assert_allclose(divergence.value, value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grads, expected, atol=2e-6)
        assert not np.any(grads[:, 7])


@pytest.mark.parametrize("beta", BETAS)
def test_a_column_that_the_teacher_masks(beta, implementation):
    products, block, coefficients = make_pair(40, biases=(True, True))
    masked = block._replace(teacher=block.teacher._replace(bias=block.teacher.bias.at[7].set(-jnp.inf)))
    distillation_map = make_map(40, beta)
    value, _, expected = in_float64(products, masked, distillation_map, coefficients)
    for _, divergence, grads in run(implementation, products, masked, distillation_map, coefficients):
        np.testing.assert_allclose(divergence.value, value, rtol=1e-5)
        if beta == 1:  # KL(student ‖ teacher) is infinite
            assert np.isinf(divergence.value).all()
            assert not np.isfinite(grads).any()
        else:
            np.testing.assert_allclose(grads, expected, atol=2e-6)


def test_a_coefficient_of_zero_keeps_an_infinite_divergence_out(implementation):
    products, block, coefficients = make_pair(40, biases=(True, True))
    masked = block._replace(teacher=block.teacher._replace(bias=block.teacher.bias.at[7].set(-jnp.inf)))
    nothing = jax.tree.map(jnp.zeros_like, coefficients)
    for _, _, grads in run(implementation, products, masked, make_map(40, 1.0), nothing):
        assert not np.any(grads)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("side", [0, 1])
def test_a_logit_that_is_not_a_number_is_not_hidden(side, beta, implementation):
    products, block, coefficients = make_pair(40)
    products = Products(*(a.at[1, 20].set(jnp.nan) if i == side else a for i, a in enumerate(products)))
    for _, divergence, grads in run(implementation, products, block, make_map(40, beta), coefficients):
        np.testing.assert_array_equal(np.isnan(divergence.value), np.arange(ROWS) == 1)
        assert np.isnan(grads[1]).all()
        assert np.isfinite(np.delete(np.asarray(grads), 1, axis=0)).all()


def test_the_first_of_equal_logits_is_predicted(implementation):
    random = np.random.default_rng(0)
    for width in (40, 3000):
        products = [random.integers(-2, 3, size=(ROWS, width)).astype(np.float32) for _ in range(2)]
        _, block, _ = make_pair(width)
        stats = get_distillation_rows(implementation, None).distillation_stats(
            Products(*map(jnp.asarray, products)), block, make_map(width, 0.5)
        )
        for softmax, product in zip(stats[:2], products, strict=True):
            np.testing.assert_array_equal(softmax.prediction, product.argmax(1))


@pytest.mark.filterwarnings("ignore:(overflow|invalid)")  # The interpreter computes both branches of tl.where.
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_columns_with_probability_zero(beta, implementation):
    """Columns masked in both models, or where the divergence allows it in one of them, with large coefficients."""
    width = 40
    products, block, coefficients = make_pair(width, biases=(True, True))
    lowest = np.finfo(np.float32).min

    def masked(side, start):
        return side._replace(bias=side.bias.at[start:35].set(lowest).at[35:].set(-jnp.inf))

    student, teacher = masked(block.student, 20 if beta > 0 else 30), masked(block.teacher, 20 if beta < 1 else 30)
    labels = jnp.full(ROWS, 10, jnp.int32)
    block = DistillationBlock(student._replace(labels=labels), teacher._replace(labels=labels))
    coefficients = coefficients._replace(soft=jnp.array([1e6, -1e6, 1e30, -1e30, 1, -1], jnp.float32))
    distillation_map = make_map(width, beta, temperature=0.5)
    value, _, expected = in_float64(products, block, distillation_map, coefficients)
    size = np.abs(np.asarray(coefficients.soft))[:, None]
    for stats, divergence, grads in run(implementation, products, block, distillation_map, coefficients):
        assert np.isfinite(stats.hard_log_sum).all()
        np.testing.assert_allclose(divergence.value, value, rtol=1e-5)
        np.testing.assert_allclose(grads / size, expected / size, atol=1e-5)
