"""A padded vocabulary: columns that do not exist change nothing, and nothing is computed where there are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.ops.linear_head import chunks
from jliger.ops.linear_head.chunks import recompute, stats
from jliger.ops.linear_head.types import HeadConfig, Operands
from jliger.ops.logits import Coefficients, StatsWanted
from jliger.testing.oracle import fused, make_problem

VOCAB, VOCAB_SIZE = 11, 8


def columns_of(inputs, options, columns):
    """Inputs and options with some of the columns only."""
    vocab_dim = 1 if options["kernel_layout"] == "hv" else 0
    inputs = {**inputs, "kernel": jax.lax.slice_in_dim(inputs["kernel"], columns.start, columns.stop, axis=vocab_dim)}
    sliced = {"bias": inputs["bias"][columns], "class_weights": options["class_weights"][columns]}
    return {**inputs, "bias": sliced["bias"]}, {**options, "class_weights": sliced["class_weights"]}


@pytest.mark.parametrize(("reduction", "kernel_layout"), [("mean", "vh"), ("none", "hv")])
def test_padding_is_as_if_it_were_not_there(reduction, kernel_layout, implementation):
    problem = make_problem(
        30, bias="float32", class_weights=True, label_smoothing=0.2, z_loss=0.1, return_metrics=True, chunk_size=8,
        reduction=reduction, kernel_layout=kernel_layout, precision="highest", vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    # Large logits, which would be predicted, and vectors that are not read.
    kernel, vectors = np.array(problem.inputs["kernel"]), (problem.inputs["bias"], problem.options["class_weights"])
    (kernel if kernel_layout == "vh" else kernel.T)[VOCAB_SIZE:] *= 100
    bias, class_weights = (vector.at[VOCAB_SIZE:].set(jnp.nan) for vector in vectors)
    problem = problem.replace(
        inputs={**problem.inputs, "kernel": jnp.asarray(kernel), "bias": bias}, class_weights=class_weights
    )
    inputs, options = columns_of(problem.inputs, problem.options, slice(0, VOCAB_SIZE))
    without = fused(problem.replace(inputs=inputs, **{**options, "vocab_size": None}), implementation)
    ours = fused(problem, implementation)
    grads, _ = columns_of(ours, problem.options, slice(0, VOCAB_SIZE))
    for name, value in without.items():
        np.testing.assert_allclose(grads[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    padding, _ = columns_of(ours, problem.options, slice(VOCAB_SIZE, VOCAB))
    assert not np.any(padding["kernel"])
    assert not np.any(padding["bias"])
    # A label among the columns that do not exist is out of range.
    poisoned = fused(problem.replace(labels=problem.labels.at[0, 0].set(VOCAB_SIZE)), implementation)
    assert np.isnan(poisoned["loss"]).any()
    assert np.isnan(poisoned["hidden"][0, 0]).all()


# ---- shards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_columns", [0, 100, 130, 300])
def test_blocks_of_a_shard(num_columns, implementation, monkeypatch):
    """Of 300 columns in blocks of 128, as many exist as is only known at run time."""
    for module in (recompute, stats):
        monkeypatch.setattr(module, "recompute_tile", lambda *_: (8, 128))
    random = np.random.default_rng(31)
    kernel = random.normal(size=(4, 300)) / 2
    if num_columns <= 128:
        kernel[:, 128:256] = np.nan  # A block without columns is skipped.
    hidden = jnp.asarray(random.normal(size=(6, 4)), jnp.float16)
    config = HeadConfig(
        "hv", 1.0, None, np.dtype("float32"), "highest", None, implementation, None, StatsWanted(True, True),
        vocab_size=1000,
    )  # fmt: skip
    coefficients = Coefficients(*jnp.asarray(random.normal(size=(5, 6)), jnp.float32))
    row_max, log_sum = jnp.full(6, 2.0), jnp.full(6, 3.0)

    def run(kernel, num_columns):
        bias = jnp.linspace(-1, 1, 300)[: kernel.shape[1]]
        labels = jnp.asarray([0, 3, 50, 70, 99, -1])
        counted = jnp.ones(6, bool)
        operands = Operands(hidden, kernel, bias, labels=labels, counted=counted, num_columns=num_columns)
        wanted = operands.differentiable._replace(
            hidden=np.dtype("float32"), kernel=np.dtype("float32"), bias=np.dtype("float32")
        )
        found = chunks.stats_pass(config, operands, low_memory=True)
        return found, chunks.recompute_pass(config, wanted, operands, row_max, log_sum, coefficients)

    kernel = jnp.asarray(kernel, jnp.float32)
    found, grads = jax.jit(run)(kernel, jnp.int32(num_columns))
    np.testing.assert_array_equal(grads.kernel[:, num_columns:], 0)
    np.testing.assert_array_equal(grads.bias[num_columns:], 0)
    if num_columns == 0:
        np.testing.assert_array_equal(grads.hidden, 0)
        np.testing.assert_array_equal(found.log_sum, -np.inf)
        return
    expected, expected_grads = jax.jit(run)(kernel[:, :num_columns], None)
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(grads.hidden, expected_grads.hidden, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(grads.kernel[:, :num_columns], expected_grads.kernel, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(grads.bias[:num_columns], expected_grads.bias, rtol=1e-3, atol=1e-3)


# ---- where it is not used ------------------------------------------------------------------------------------------


def test_all_columns_are_the_same_program():
    problem = make_problem(32, bias="float32", class_weights=True, label_smoothing=0.1, reduction="none")
    arrays = problem.inputs, problem.options["class_weights"]

    def program(vocab_size):
        def loss(inputs, class_weights):
            options = {**problem.options, "class_weights": None, "vocab_size": vocab_size, "implementation": "xla"}
            return jliger.fused_linear_cross_entropy(**inputs, labels=problem.labels, **options).sum()

        return jax.jit(jax.grad(loss)).lower(*arrays).as_text()

    assert program(None) == program(VOCAB) != program(VOCAB_SIZE)
