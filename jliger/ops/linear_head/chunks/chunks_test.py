"""Tests that results do not depend on how tokens and vocabulary are split, and how many tokens are multiplied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.ops.linear_head.chunks import fused as fused_module
from jliger.ops.linear_head.chunks import fused_pass, matmuls, merge_stats
from jliger.ops.linear_head.chunks import recompute as recompute_module
from jliger.ops.linear_head.chunks import stats as stats_module
from jliger.ops.linear_head.types import GradientDtypes, HeadConfig, Operands
from jliger.ops.logits import Coefficients, RowStats, StatsWanted
from jliger.ops.logits.objectives import LossArrays
from jliger.testing.oracle import INTERPRETED, assert_rule_of_two, check, exact, fused, make_problem, unfused

REDUCTIONS = ["mean", "none"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_chunk_size_gives_the_same(reduction, implementation):
    problem = make_problem(
        0, batch=(17,), bias="float32", ignored=0.3, z_loss=0.1, reduction=reduction, return_metrics=True,
        precision="highest",
    )  # fmt: skip
    expected = check(problem, implementation)
    # Each is a compilation: the two reductions share them out.
    for chunk_size in (1, 5, 17) if reduction == "mean" else (1, 16, 1000):
        result = fused(problem.replace(chunk_size=chunk_size), implementation)
        for name, value in expected.items():
            # The order of summation over tokens differs.
            np.testing.assert_allclose(result[name], value, rtol=1e-5, atol=2e-6, err_msg=f"{name}, {chunk_size}")


def dynamic(problem, implementation, differentiate):
    """A function of `where`, compiled once, so that the number of counted tokens is only known on the device."""
    options = {name: value for name, value in problem.options.items() if name != "where"}

    def loss(inputs, where):
        value, metrics = jliger.fused_linear_cross_entropy(
            inputs["hidden"], inputs["kernel"], problem.labels, bias=inputs["bias"], where=where,
            implementation=implementation, **options,
        )  # fmt: skip
        return jnp.sum(value * problem.cotangent), (value, metrics.predictions)

    if not differentiate:
        return functools.partial(jax.jit(lambda inputs, where: {"value": loss(inputs, where)[1][0]}), problem.inputs)

    def value_and_grads(inputs, where):
        (_, (value, predictions)), grads = jax.value_and_grad(loss, has_aux=True)(inputs, where)
        return {"value": value, "predictions": predictions, **grads}

    return functools.partial(jax.jit(value_and_grads), problem.inputs)


def masks(tokens):
    """Masks with none, one, all, and numbers around each quarter of a chunk counted; scattered and contiguous."""
    random = np.random.default_rng(0)
    counts = {0, 1, tokens - 1, tokens}
    for quarter in range(1, 5):
        counts |= {c for c in (256 * quarter - 1, 256 * quarter, 256 * quarter + 1) if c <= tokens}
    for count in sorted(counts):
        spread = np.zeros(tokens, bool)
        spread[random.permutation(tokens)[:count]] = True
        yield spread
    yield np.arange(tokens) >= tokens // 2


@pytest.mark.parametrize("differentiate", [True, False], ids=["differentiated", "not"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens_and_chunk", [(1024, None), (2600, 1024), (40, 8), (40, 16)], ids=str)
def test_any_number_of_tokens_that_count(tokens_and_chunk, reduction, differentiate, implementation):
    tokens, chunk_size = tokens_and_chunk
    if INTERPRETED and tokens > 40:
        pytest.skip("minutes, interpreted")
    problem = make_problem(
        1, batch=(tokens,), vocab=7, hidden_size=4, bias="float32", reduction=reduction, return_metrics=True,
        chunk_size=chunk_size, precision="highest",
    )  # fmt: skip
    compiled = dynamic(problem, implementation, differentiate)
    hidden, kernel, bias = (np.asarray(problem.inputs[name], np.float64) for name in ("hidden", "kernel", "bias"))
    logits = hidden @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    one_hot = np.eye(7)[np.asarray(problem.labels)]
    losses = -np.log((p * one_hot).sum(1))
    every_mask = list(masks(tokens)) if tokens > 40 else [np.arange(tokens) % 5 < n for n in range(6)]
    for where in every_mask:
        counted = where.astype(np.float64)
        weights = counted / max(counted.sum(), 1) if reduction == "mean" else counted
        result = compiled(jnp.asarray(where))
        expected = {"value": (losses * weights).sum() if reduction == "mean" else losses * weights}
        if differentiate:
            dz = (p - one_hot) * (weights * np.asarray(problem.cotangent, np.float64))[:, None]
            expected |= {"hidden": dz @ kernel.T, "kernel": hidden.T @ dz, "bias": dz.sum(0)}
            np.testing.assert_array_equal(result["predictions"], np.where(where, logits.argmax(1), -1))
        for name, value in expected.items():
            # A few float32 roundings; in the worst case one for each summed token.
            little = 4e-7 * max(1.0, np.abs(value).max()) * (1 if reduction == "mean" else 4)
            np.testing.assert_allclose(result[name], value, rtol=1e-5, atol=little, err_msg=f"{name} {where.sum()}")


def wide(implementation):
    """A number of tokens and columns for which the vocabulary has several blocks, the last one narrower."""
    return (1030, 2203) if implementation == "xla" else (8200, 20011)


@pytest.mark.parametrize(
    ("dtype", "kernel_layout", "bias", "padding"),
    [("float32", "hv", "float32", 0), ("float32", "vh", None, 300), ("bfloat16", "vh", None, 0)],
)
def test_several_blocks_of_columns(dtype, kernel_layout, bias, padding, implementation):
    if INTERPRETED:
        pytest.skip("minutes, interpreted")
    tokens, vocab = wide(implementation)
    problem = make_problem(
        2, batch=(tokens,), vocab=vocab, hidden_size=4, dtype=dtype, bias=bias, kernel_layout=kernel_layout,
        reduction="none", chunk_size=tokens, label_smoothing=0.1, class_weights=True, z_loss=0.01,
        return_metrics=True, precision="highest", vocab_size=vocab - padding if padding else None,
    )  # fmt: skip
    # Labels around every possible block boundary.
    edges = [np.arange(first, vocab - padding, 128) for first in (0, 127)]
    edges = np.concatenate([*edges, np.arange(vocab - padding - 3, vocab - padding)])
    labels = jnp.asarray(np.resize(edges, tokens), jnp.int32)
    problem = problem.replace(labels=labels, where=jnp.arange(tokens) % 7 != 3)
    ours, oracle = fused(problem, implementation), exact(problem)
    assert_rule_of_two(ours, unfused(problem), oracle)
    np.testing.assert_array_equal(ours["predictions"] >= 0, problem.options["where"])
    if dtype == "float32":
        np.testing.assert_array_equal(ours["predictions"], oracle["predictions"])


def test_merged_stats_are_those_of_the_whole():
    random = np.random.default_rng(3)
    logits = random.normal(size=(50, 24)) * 30
    logits[:, 5] = logits[:, 20]  # equal maxima in some rows
    logits[:10, [5, 20]] = 200
    labels, u = random.integers(0, 24, 50), random.uniform(size=24)

    def stats(start, end):
        block = logits[:, start:end]
        has_label = (labels >= start) & (labels < end)
        label_logit = np.where(has_label, np.take_along_axis(logits, labels[:, None], 1)[:, 0], 0)
        return RowStats(*map(jnp.asarray, (
            block.max(1), np.log(np.exp(block - block.max(1, keepdims=True)).sum(1)), label_logit,
            block.argmax(1) + start, (block * u[start:end]).sum(1),
        )))  # fmt: skip

    with jax.enable_x64(True):
        blocks = [stats(start, end) for start, end in [(0, 7), (7, 8), (8, 21), (21, 24)]]
        for result in (
            functools.reduce(merge_stats, blocks),
            merge_stats(blocks[0], functools.reduce(merge_stats, blocks[1:])),
        ):
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), result, stats(0, 24))


@dataclasses.dataclass(frozen=True)
class Squares:
    """The rule of `Σ_t w_t · (log p_t[label])²`, whose coefficients depend on the log-probability itself."""

    needs_stats: bool = True

    def __call__(self, stats, arrays, in_units):
        (weights,) = arrays.per_token
        logprob = stats.label_logit - stats.max - stats.log_sum
        by_logprob = 2 * weights * logprob
        return Coefficients(probability=-by_logprob, label=-by_logprob)


def test_coefficients_that_depend_on_the_statistics(implementation):
    keys = jax.random.split(jax.random.key(5), 3)
    hidden, kernel = jax.random.normal(keys[0], (17, 6)), jax.random.normal(keys[1], (6, 11))
    labels, weights = jnp.arange(17) % 11, jax.random.normal(keys[2], (17,))
    counted = jnp.arange(17) % 5 != 2
    config = HeadConfig(
        "hv", 1.0, None, np.dtype("float32"), "highest", 4, implementation, None, StatsWanted()
    )  # fmt: skip
    operands = Operands(hidden, kernel, labels=labels, counted=counted)
    wanted = GradientDtypes(hidden=np.dtype("float32"), kernel=np.dtype("float32"))
    stats, grads, _ = fused_pass(config, wanted, operands, Squares(), LossArrays((weights,)))

    def loss(hidden, kernel):
        log_p = jax.nn.log_softmax(jnp.dot(hidden, kernel, precision="highest"))
        squares = jnp.square(jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0])
        return jnp.sum(jnp.where(counted, weights * squares, 0))

    expected = jax.grad(loss, (0, 1))(hidden, kernel)
    for one, other in zip((grads.hidden, grads.kernel), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(stats.prediction >= 0, counted)


@pytest.mark.skipif(INTERPRETED, reason="minutes, interpreted")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tokens_that_do_not_count_are_not_multiplied(reduction, implementation, monkeypatch):
    sizes = []

    def logits_product(config, hidden, *args):
        jax.debug.callback(lambda: sizes.append(hidden.shape[0]))
        return matmuls.logits_product(config, hidden, *args)

    for module in (fused_module, stats_module, recompute_module):
        monkeypatch.setattr(module, "logits_product", logits_product)
    problem = make_problem(
        4, batch=(2048,), vocab=9, hidden_size=3, bias="float32", reduction=reduction, chunk_size=512,
        return_metrics=True,
    )  # fmt: skip
    compiled = dynamic(problem, implementation, differentiate=True)
    for count in (0, 1, 512, 513, 2048):
        sizes.clear()
        jax.block_until_ready(compiled(jnp.arange(2048) % 4 * 512 + jnp.arange(2048) // 4 < count))
        jax.effects_barrier()
        # The first chunk is computed even if nothing counts; without a reduction, the backward pass repeats them.
        assert sizes == [512] * max(1, -(-count // 512)) * (2 if reduction == "none" else 1), count
