"""Tests the row functions of `top_k` and `top_k_kl` of every backend against the same formulas in NumPy and float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger.ops.logits import Block, LogitMap
from jliger.ops.logits.top_k import first_of, get_top_logits, merge_top_logits
from jliger.ops.logits.top_k_kl import StudentCoefficients, StudentMap, get_student_rows
from jliger.ops.logits.top_k_types import NO_COLUMN, TopLogits
from jliger.testing.oracle import every_pair

ROWS = 3


def logits_of(product, block, logit_map):
    """The logits in float64, −inf in columns that do not exist, and their derivative by the product."""
    width = logit_map.width if block.width is None else int(block.width)
    raw = np.asarray(product, np.float64)
    logits = (raw + (0 if block.bias is None else np.asarray(block.bias, np.float64))) * logit_map.scale
    slope = np.full_like(logits, logit_map.scale)
    if logit_map.softcap is not None:
        tanh = np.tanh(logits / logit_map.softcap)
        logits, slope = logit_map.softcap * tanh, slope * (1 - tanh**2)
    if block.inverse_temperature is not None:
        logits = logits * np.asarray(block.inverse_temperature, np.float64)[:, None]
    outside = np.arange(raw.shape[1]) >= width
    if logit_map.masked:
        outside = outside | (raw == -np.inf)
    return np.where(outside, -np.inf, logits), np.where(outside, 0, slope)


def assert_largest(found, logits, k):
    """The first k of a stable sort of float32 logits, and nothing where there are fewer columns."""
    order = np.argsort(-logits.astype(np.float32), axis=1, kind="stable")[:, :k]
    num = min(k, logits.shape[1])
    np.testing.assert_array_equal(found.ids[:, :num], order)
    np.testing.assert_allclose(found.logits[:, :num], np.take_along_axis(logits, order, 1), rtol=1e-6)
    assert np.all(found.ids[:, num:] == NO_COLUMN)
    assert np.all(found.logits[:, num:] == -np.inf)


# Width, padding, the width at run time, k: few columns, fewer than k, groups that are cut, none at all, many groups.
WIDTHS = [
    *((13, 3, None, 16), (301, 3, None, 5), (2000, 0, 37, 40)),
    *(
        pytest.param(*case, marks=pytest.mark.exhaustive)
        for case in ((11, 0, None, 4), (300, 0, 0, 3), (2050, 6, None, 9))
    ),
]


@pytest.mark.parametrize(("width", "padding", "at_run_time", "k"), WIDTHS)
def test_largest_logits(width, padding, at_run_time, k, implementation):
    random = np.random.default_rng(width)
    # Few different values, so that many logits are equal; and masked columns, which still have an order.
    product = jnp.asarray(np.round(2 * random.normal(size=(ROWS, width + padding))) / 2, jnp.float32)
    bias = jnp.asarray(np.where(random.random(width + padding) < 0.1, np.inf, 0), jnp.float32)
    inverse = jnp.asarray(2.0 ** np.arange(ROWS), jnp.float32)
    block = Block(
        bias, None, jnp.zeros(ROWS, jnp.int32), inverse, None if at_run_time is None else jnp.int32(at_run_time)
    )
    logit_map = LogitMap(-1.0, None, width)
    found = get_top_logits(implementation, None)(product, block, logit_map, k)
    logits, _ = logits_of(product, block, logit_map)
    assert_largest(found, logits[:, : width if at_run_time is None else at_run_time], k)


def test_numbers_of_either_sign_and_any_size_are_in_order(implementation):
    values = np.array([-np.inf, -3e38, -1.0, -1e-30, 1e-30, 1.0, 3e38], np.float32)
    product = jnp.asarray(np.random.default_rng(0).permutation(np.tile(values, 20))[None])
    block, width = Block(None, None, jnp.zeros(1, jnp.int32)), product.shape[1]
    found = get_top_logits(implementation, None)(product, block, LogitMap(1.0, None, width), 64)
    assert_largest(found, np.asarray(product, np.float64), 64)


@pytest.mark.parametrize("kinds", [("zero",), ("nan", "inf", "zero")])
def test_zeros_are_equal_and_nan_comes_first(kinds, implementation):
    values = np.tile(np.array([-0.0, 0.0, -1.0, np.nan, np.inf], np.float32), 30)
    columns = {"nan": np.isnan(values), "inf": values == np.inf, "zero": values == 0}
    values = np.where(columns["nan"] & ("nan" not in kinds) | columns["inf"] & ("inf" not in kinds), -5, values)
    expected = np.concatenate([np.flatnonzero(columns[kind]) for kind in kinds])[:100]
    block, logit_map = Block(None, None, jnp.zeros(1, jnp.int32)), LogitMap(1.0, None, values.size)
    found = get_top_logits(implementation, None)(jnp.asarray(values[None]), block, logit_map, expected.size)
    np.testing.assert_array_equal(found.ids[0], expected)
    nothing = TopLogits(jnp.full_like(found.ids, NO_COLUMN), jnp.full_like(found.logits, -jnp.inf))
    np.testing.assert_array_equal(merge_top_logits(nothing, found).ids[0], expected)


def test_merging_prefers_the_lower_id():
    left = TopLogits(jnp.array([[2, 0]]), jnp.array([[5.0, 4.0]]))
    right = TopLogits(jnp.array([[9, NO_COLUMN]]), jnp.array([[5.0, -jnp.inf]]))
    for both in (merge_top_logits(left, right), merge_top_logits(right, left)):
        np.testing.assert_array_equal(both.ids, [[2, 9]])
    masked = TopLogits(jnp.array([[NO_COLUMN, 7]]), jnp.full((1, 2), -jnp.inf))
    np.testing.assert_array_equal(first_of(masked, 1).ids, [[7]])


STUDENTS = {
    "temperature": [1.0, 2.5],
    "labels": [False, True],
    "softcap": [None, 3.0],
    "scale": [1.0, -0.5],
    "bias": [False, True],
    "masked": [False, True],
    "dtype": ["float32", "float16"],
    "width": [(11, 0), (1029, 3), (512, 0)],
    "at_run_time": [False, True],
}
BRANCHES = [
    pytest.param(branch, marks=[pytest.mark.exhaustive] if number >= 2 else [])
    for number, branch in enumerate(every_pair(STUDENTS))
]


@pytest.mark.parametrize("branch", BRANCHES, ids=itertools.count())
def test_statistics_and_gradients_of_a_student(branch, implementation):
    width, padding = branch["width"]
    random = np.random.default_rng(width)
    product = random.normal(size=(ROWS, width + padding))
    columns = 7
    ids = np.sort(np.stack([random.choice(width - 2, columns, replace=False) for _ in range(ROWS)]), axis=1)
    ids[1, :3] = -1
    if branch["masked"]:
        np.put_along_axis(product, np.maximum(ids, 0), -np.inf, axis=1)
    product = jnp.asarray(product, branch["dtype"])
    bias = jnp.asarray(random.normal(size=width + padding), jnp.float32) if branch["bias"] else None
    labels = jnp.asarray([ids[0, 2], width - 3, -1], jnp.int32)
    block = Block(bias, None, labels, None, jnp.int32(width - 2) if branch["at_run_time"] else None)
    logit_map = LogitMap(branch["scale"], branch["softcap"], width, branch["masked"])
    student_map = StudentMap(logit_map, branch["temperature"], branch["labels"])
    soft, hard, label = jnp.asarray(random.uniform(0.5, 1, size=(3, ROWS)), jnp.float32)
    coefficients = StudentCoefficients(
        soft, hard if student_map.with_hard_sum else None, label if branch["labels"] else None
    )
    shares = jnp.asarray(random.normal(size=ids.shape), jnp.float32)
    rows = get_student_rows(implementation, None)

    @jax.jit
    def run(product, block, coefficients, ids, shares):
        stats = rows.student_stats(product, block, student_map)
        dtype = jnp.float32
        grads = rows.student_grads(product, block, student_map, stats, coefficients, ids, shares, dtype=dtype)
        both = rows.student_stats_and_grads(product, block, student_map, coefficients, ids, shares, dtype=dtype)
        return (stats, grads), both

    alone, both = run(product, block, coefficients, jnp.asarray(ids, jnp.int32), shares)
    logits, slope = logits_of(product, block, logit_map)
    below = logits - logits.max(1, keepdims=True)
    sums = [np.log(np.exp(below / tau).sum(1)) for tau in (branch["temperature"], 1.0)]
    expected = np.exp(below / branch["temperature"] - sums[0][:, None]) * np.asarray(soft, np.float64)[:, None]
    if student_map.with_hard_sum:
        expected += np.exp(below - sums[1][:, None]) * np.asarray(hard, np.float64)[:, None]
    if branch["labels"]:
        expected -= (np.arange(expected.shape[1]) == np.asarray(labels)[:, None]) * np.asarray(label, np.float64)[
            :, None
        ]
    for stats, _ in (alone, both):
        np.testing.assert_allclose(stats.softmax.max, logits.max(1), rtol=1e-6)
        np.testing.assert_allclose(stats.softmax.log_sum, sums[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(stats.softmax.prediction, logits.argmax(1))
        if student_map.with_hard_sum:
            np.testing.assert_allclose(stats.hard_log_sum, sums[1], rtol=1e-5, atol=1e-6)
    row, place = np.nonzero(ids >= 0)
    given = expected * slope
    given[row, ids[row, place]] = np.asarray(shares)[row, place]
    np.testing.assert_allclose(alone[1], given, rtol=2e-5, atol=1e-6)
    expected[row, ids[row, place]] -= np.asarray(shares)[row, place]
    # Masked columns are the caller's to write: `student_stats_and_grads` gets no masked products.
    if not branch["masked"]:
        np.testing.assert_allclose(both[1], expected * slope, rtol=2e-5, atol=1e-6)
