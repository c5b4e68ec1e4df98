"""The operation against the reference: every option, dtype, scale, mask and shape."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.testing.oracle import (
    DTYPES,
    INTERPRETED,
    ON_GPU,
    assert_rule_of_two,
    check,
    equations,
    every_pair,
    exact,
    exact_and_rounding,
    fused,
    make_problem,
    pairs_as_parameters,
    unfused,
)

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="of a size for a GPU")

# ---- options -------------------------------------------------------------------------------------------------

# What each option can be, what it is by default first.
OPTIONS = {
    "dtypes": [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")],
    "reduction": ["mean", "sum", "none", "normalizer"],
    "bias": [None, "float32", "bfloat16"],
    "where": [None, "some"],
    "ignored": [0.0, 0.3],
    "ignore_index": [-100, 4],
    "weights": [False, True],
    "kernel_layout": ["hv", "vh"],
    "logit_scale": [1.0, 0.7],
    "logit_softcap": [None, 2.0],
    "temperature": [1.0, 0.6, "of tokens"],
    "label_smoothing": [0.0, 0.2],
    "z_loss": [0.0, 0.05],
    "class_weights": [False, True],
    "return_metrics": [False, True],
    "logits_dtype": [None, "float32", "bfloat16"],
    "chunk_size": [None, 4],
    "vocab_size": [None, 9],
}
DEFAULTS = {name: values[0] for name, values in OPTIONS.items()}


def problem_with(chosen, seed=0):
    chosen = dict(chosen)
    chosen["dtype"], chosen["kernel_dtype"] = chosen.pop("dtypes")
    if chosen["reduction"] == "normalizer":
        chosen |= {"reduction": "mean", "normalizer": True}
    if chosen["dtype"] == "float32":
        chosen["precision"] = "highest"
    return make_problem(seed, **chosen)


def test_the_defaults(implementation):
    check(problem_with(DEFAULTS), implementation)


def test_a_square_kernel(implementation):
    # With another shape, JAX itself would notice a swapped layout.
    check(make_problem(0, batch=(7,), vocab=8, hidden_size=8, kernel_layout="vh", precision="highest"), implementation)


# Each value is among the pairs below too; alone it says at once what is wrong.
@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values[1:]])
def test_each_option_alone(name, value, implementation):
    check(problem_with({**DEFAULTS, name: value}), implementation)


# In the interpreter, every value of every option; `logits_test.py` has every branch of the kernels.
@pytest.mark.parametrize(
    "row", pairs_as_parameters(OPTIONS) if INTERPRETED else every_pair(OPTIONS), ids=itertools.count()
)
def test_every_pair_of_options(row, implementation):
    check(problem_with(row, seed=1), implementation, str(row))


# ---- dtypes and scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtypes", "reduction"), list(zip(DTYPES, itertools.cycle(["mean", "none"]))), ids=str)
def test_activation_scales(dtypes, reduction, implementation):
    for scale in (1, 30, 1000):
        problem = make_problem(
            2,
            batch=(16,),
            hidden_size=24,
            vocab=33,
            dtype=dtypes[0],
            kernel_dtype=dtypes[1],
            scale=scale,
            bias="float32",
            reduction=reduction,
            chunk_size=8,
            precision="highest" if dtypes[0] == "float32" else None,
        )
        check(problem, implementation, f"at scale {scale}")


def test_float64_is_float64_throughout(implementation):
    if implementation == "triton":
        pytest.skip("for XLA only")
    problem = make_problem(3, bias="float32", label_smoothing=0.1, z_loss=0.1, reduction="none", chunk_size=4)
    with jax.enable_x64(True):
        inputs = {name: jnp.asarray(np.asarray(value), jnp.float64) for name, value in problem.inputs.items()}
        problem = problem.replace(inputs=inputs)
        ours = fused(problem, implementation)
    for name, truth in exact(problem).items():
        assert ours[name].dtype == np.float64
        np.testing.assert_allclose(ours[name], truth, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(INTERPRETED, reason="minutes, interpreted")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_of_many_tokens_do_not_underflow(reduction, implementation):
    # Most columns are never a label: their logits' gradients are about 1/2048², and float16 ends at 6e-8.
    problem = make_problem(4, batch=(2048,), vocab=2048, dtype="float16", reduction=reduction, scale=0.1)
    cotangent = jnp.ones_like(problem.cotangent) / (2048 if reduction == "none" else 1)
    problem = problem.replace(cotangent=cotangent, labels=problem.labels % 8)
    ours, truth = (f["kernel"][:, 8:] for f in (fused(problem, implementation), exact(problem)))
    assert np.linalg.norm(ours - truth) <= np.finfo(np.float16).eps * np.linalg.norm(truth)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_over_chunks_are_float32(dtype, reduction, implementation):
    problem = make_problem(
        24, batch=(256,), hidden_size=16, dtype=dtype, bias="float32", reduction=reduction, chunk_size=8,
        logits_dtype="float32",
    )  # fmt: skip
    # A kernel that hidden's dtype holds: all that is left to round is each logit's gradient, once.
    kernel = problem.inputs["kernel"].astype(dtype).astype(jnp.float32)
    problem = problem.replace(inputs={**problem.inputs, "kernel": kernel})
    ours, (truth, allowed) = fused(problem, implementation), exact_and_rounding(problem)
    for name in ("kernel", "bias"):
        assert ours[name].dtype == jnp.float32
        assert np.sqrt(np.mean(np.square(ours[name] - truth[name]))) <= allowed[name], name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_passes_see_the_same_logits(dtype, reduction, implementation):
    # Logits near 80 round by 0.25 in bfloat16. Probabilities sum to 1 only if the gradient's are those of the loss.
    problem = make_problem(5, batch=(1,), hidden_size=64, vocab=40, dtype=dtype, bias="float32", reduction=reduction)
    problem = problem.replace(
        inputs={**problem.inputs, "hidden": problem.inputs["hidden"] * 40}, cotangent=jnp.ones_like(problem.cotangent)
    )
    grad = np.asarray(fused(problem, implementation)["bias"], np.float64)
    assert abs(grad.sum()) <= np.abs(grad).sum() * float(jnp.finfo(dtype).eps) / 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("margin", [4.0, 7.0, 10.0])
def test_a_confident_label_keeps_its_gradient(margin, reduction, implementation):
    # 1 − p is 2e-2, 9e-4 and 5e-5: in bfloat16, p itself would round to 1.
    def loss(bias):
        hidden, kernel = jnp.full((1, 1), margin, jnp.bfloat16), jnp.asarray([[1.0, 0.0]], jnp.bfloat16)
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, jnp.zeros(1, int), bias=bias, reduction=reduction, implementation=implementation
        ).sum()

    other = 1 / (1 + np.exp(margin))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.zeros(2)), [-other, other], rtol=2**-8)


# ---- which tokens count --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "reduction"),
    [
        pytest.param(where, reduction, marks=[] if (i + j) % 2 == 0 else [pytest.mark.exhaustive])
        for i, where in enumerate(["all", "some", "none"])
        for j, reduction in enumerate(["mean", "none", "sum"])
    ],
)
def test_what_does_not_count_does_not_matter(where, reduction, implementation):
    problem = make_problem(
        6, bias="float32", where=where, ignored=0.3, weights=True, z_loss=0.1, label_smoothing=0.1, class_weights=True,
        return_metrics=True, reduction=reduction, chunk_size=4, precision="highest",
    )  # fmt: skip
    clean = check(problem, implementation)
    counted = problem.options["where"] & (problem.labels != -100)
    hidden = np.array(problem.inputs["hidden"])
    hidden[~counted] = np.resize([np.nan, np.inf, -np.inf], hidden[~counted].shape)
    labels = jnp.where(problem.options["where"], problem.labels, 10**6)
    dirty = fused(
        problem.replace(inputs={**problem.inputs, "hidden": jnp.asarray(hidden)}, labels=labels), implementation
    )
    for name, value in clean.items():
        np.testing.assert_array_equal(dirty[name], value, name)
    assert not dirty["hidden"][~counted].any()
    if reduction == "none":
        assert not dirty["loss"][~counted].any()


def test_nothing_counts(implementation):
    problem = make_problem(7, bias="float32", where="none", z_loss=0.1, return_metrics=True)
    for result in fused(problem, implementation).items():
        np.testing.assert_array_equal(result[1], -1 if result[0] == "predictions" else 0, result[0])


def test_weights_of_zero_are_no_division_by_zero(implementation):
    problem = make_problem(8, return_metrics=True).replace(weights=jnp.zeros((3, 5)))
    for name, value in fused(problem, implementation).items():
        if name != "predictions":
            np.testing.assert_array_equal(value, 0, name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_tokens_count(reduction, implementation):
    problem = make_problem(
        18, bias="float32", weights=True, z_loss=0.1, label_smoothing=0.1, class_weights=True, return_metrics=True,
        temperature="of tokens", reduction=reduction, chunk_size=4, precision="highest", ignore_index=None,
    )  # fmt: skip
    check(problem, implementation)
    poisoned = fused(problem.replace(labels=problem.labels.at[0, 0].set(-100)), implementation)
    assert np.isnan(poisoned["hidden"][0, 0]).all()
    assert np.isnan(poisoned["kernel"]).all()

    def primitives(ignore_index):
        def loss(hidden, kernel):
            options = {"ignore_index": ignore_index, "reduction": reduction, "chunk_size": 4, "implementation": "xla"}
            return jliger.fused_linear_cross_entropy(hidden, kernel, problem.labels, **options).sum()

        arrays = problem.inputs["hidden"], problem.inputs["kernel"]
        return {equation.primitive.name for equation in equations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arrays))}

    # The number of chunks is static, and no tokens are sorted.
    assert primitives(-100) >= {"while", "sort"}
    assert not primitives(None) & {"while", "sort"}


BAD_LABELS = [-1, -101, 11, 12, 10**9, np.iinfo(np.int32).min, np.iinfo(np.int32).max]


@pytest.mark.parametrize(("kernel_layout", "dtype"), [("hv", "float32"), ("vh", "float16")])
def test_a_label_out_of_range_poisons_its_token(kernel_layout, dtype, implementation):
    options = {"bias": "float32", "reduction": "none", "kernel_layout": kernel_layout, "dtype": dtype}
    problem = make_problem(9, batch=(9,), **options)
    labels = jnp.asarray([3, *BAD_LABELS, 5])
    problem = problem.replace(labels=labels)
    ours = fused(problem, implementation)
    bad = np.array([False] + [True] * len(BAD_LABELS) + [False])
    np.testing.assert_array_equal(np.isnan(ours["loss"]), bad)
    np.testing.assert_array_equal(np.isnan(ours["hidden"]), np.broadcast_to(bad[:, None], (9, 6)))
    assert np.isnan(ours["kernel"]).all()
    assert np.isnan(ours["bias"]).all()
    good = fused(problem.replace(where=jnp.asarray(~bad)), implementation)
    np.testing.assert_allclose(ours["loss"][~bad], good["loss"][~bad], rtol=1e-6)


@pytest.mark.parametrize("bad", BAD_LABELS)
def test_a_label_out_of_range_poisons_a_reduced_loss(bad, implementation):
    problem = make_problem(10, bias="float32", return_metrics=True, label_smoothing=0.1, z_loss=0.1)
    ours = fused(problem.replace(labels=problem.labels.at[1, 2].set(bad)), implementation)
    for name in ("loss", "kernel", "bias", "cross_entropy"):
        assert np.isnan(ours[name]).all(), name
    assert np.isnan(ours["hidden"][1, 2]).all()
    assert np.isfinite(ours["accuracy"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bias_of_minus_infinity_is_a_column_that_does_not_exist(reduction, implementation):
    # With a temperature, and a token that does not count.
    problem = make_problem(12, bias="float32", vocab=12, reduction=reduction, precision="highest")
    problem = problem.replace(labels=(problem.labels % 11).at[0, 0].set(-100), temperature=0.7)
    removed = {name: array[..., :11] for name, array in problem.inputs.items() if name != "hidden"}
    expected = fused(problem.replace(inputs={**problem.inputs, **removed}), implementation)
    ours = fused(
        problem.replace(inputs={**problem.inputs, "bias": problem.inputs["bias"].at[11].set(-jnp.inf)}), implementation
    )
    for name, value in ours.items():
        value = value if name in ("loss", "hidden") else value[..., :11]
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(ours["kernel"][:, 11], 0)


def test_a_label_out_of_range_that_does_not_count_is_nothing(implementation):
    problem = make_problem(11, where="some", ignore_index=10**9, return_metrics=True)
    labels = jnp.where(problem.options["where"], problem.labels, -7).at[0].set(10**9)
    for name, value in fused(problem.replace(labels=labels), implementation).items():
        assert np.isfinite(value).all(), name


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_labels_of_any_integer_dtype(dtype, implementation):
    # Of these int8 alone can hold −100: the others must not take a label that wraps around to it for one.
    problem = make_problem(12, vocab=200, batch=(5,), precision="highest")
    labels = jnp.asarray([0, 5, 100, 120, 127])
    ours = fused(problem.replace(labels=labels.astype(dtype)), implementation)
    expected = fused(problem.replace(labels=labels), implementation)
    np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=1e-6)
    if dtype == "uint8":
        with_156 = problem.replace(labels=labels.at[0].set(156))
        ours = fused(with_156.replace(labels=with_156.labels.astype(dtype)), implementation)
        np.testing.assert_allclose(ours["loss"], fused(with_156, implementation)["loss"], rtol=1e-6)
        assert np.asarray(ours["loss"]) != 0


# ---- shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": (), "vocab": 7},
        {"batch": (1,), "vocab": 2, "hidden_size": 1},
        {"batch": (1, 1), "vocab": 3},
        {"batch": (2, 1, 3), "hidden_size": 1},
        {"batch": (7,), "hidden_size": 17, "vocab": 65},
    ],
    ids=str,
)
def test_small_and_odd_shapes(shape, implementation):
    reduction = "none" if len(shape) == 2 else "mean"
    problem = make_problem(13, bias="float32", reduction=reduction, return_metrics=True, **shape)
    check(problem.replace(precision="highest"), implementation, reduction)


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tokens_at_all(batch, reduction, implementation):
    problem = make_problem(14, batch=batch, bias="float32", reduction=reduction, return_metrics=True)
    ours = fused(problem, implementation)
    assert ours["loss"].shape == (batch if reduction == "none" else ())
    for name, value in ours.items():
        np.testing.assert_array_equal(value, np.zeros(value.shape), name)


@pytest.mark.parametrize(
    ("vocab", "kernel_layout", "reduction"),
    [
        (50257, "hv", "mean"),
        (262144, "vh", "none"),
        pytest.param(50257, "vh", "none", marks=pytest.mark.exhaustive),
        pytest.param(262144, "hv", "mean", marks=pytest.mark.exhaustive),
    ],
)
def test_large_vocabularies(vocab, kernel_layout, reduction, implementation):
    problem = make_problem(
        15, batch=(3,), hidden_size=4, vocab=vocab, kernel_layout=kernel_layout, reduction=reduction,
        bias="float32", return_metrics=True, precision="highest",
    )  # fmt: skip
    problem = problem.replace(labels=jnp.asarray([0, vocab - 1, vocab // 2]))
    check(problem, implementation)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_single_column_is_certain(reduction, implementation):
    problem = make_problem(16, vocab=1, bias="float32", reduction=reduction, return_metrics=True)
    ours = fused(problem, implementation)
    assert ours["accuracy"] == 1
    for name in ("loss", "hidden", "kernel", "bias"):
        np.testing.assert_allclose(ours[name], np.zeros(ours[name].shape), atol=3e-6, err_msg=name)


# ---- results that are not gradients --------------------------------------------------------------------------


def test_predictions_are_the_first_of_equals(implementation):
    kernel = jnp.asarray([[0, 2, 1, 2, 2.0], [1, 0, 1, 0, 1]])
    hidden = jnp.asarray([[1.0, 0], [0, 1], [1, 1], [0, 0]])
    _, metrics = jliger.fused_linear_cross_entropy(
        hidden, kernel, jnp.asarray([1, 3, 4, 1]), return_metrics=True, implementation=implementation
    )
    np.testing.assert_array_equal(metrics.predictions, [1, 0, 4, 0])
    assert metrics.accuracy == 0.5


def test_metrics_carry_no_gradient(implementation):
    problem = make_problem(17, bias="float32", z_loss=0.1)

    def metric_sum(inputs):
        _, metrics = jliger.fused_linear_cross_entropy(
            inputs["hidden"], inputs["kernel"], problem.labels, bias=inputs["bias"], z_loss=0.1, return_metrics=True,
            implementation=implementation,
        )  # fmt: skip
        return metrics.cross_entropy + metrics.z_loss + metrics.accuracy + metrics.weight

    for grad in jax.tree.leaves(jax.grad(metric_sum)(problem.inputs)):
        assert not np.any(grad)


def test_what_carries_no_gradient(implementation):
    problem = make_problem(18, weights=True, class_weights=True, normalizer=True, label_smoothing=0.1)
    names = ("weights", "class_weights", "normalizer")

    def loss(arrays):
        return jliger.fused_linear_cross_entropy(
            problem.inputs["hidden"], problem.inputs["kernel"], problem.labels, label_smoothing=0.1,
            implementation=implementation, **arrays,
        )  # fmt: skip

    for grad in jax.tree.leaves(jax.grad(loss)({name: problem.options[name] for name in names})):
        assert not np.any(grad)


def test_a_normalizer_may_be_traced_or_a_number(implementation):
    problem = make_problem(19)
    args = (problem.inputs["hidden"], problem.inputs["kernel"], problem.labels)
    total = jliger.fused_linear_cross_entropy(*args, reduction="sum", implementation=implementation)
    for normalizer in (7, 7.0, jnp.float32(7), jnp.int32(7), np.float64(7)):
        result = jliger.fused_linear_cross_entropy(*args, normalizer=normalizer, implementation=implementation)
        np.testing.assert_allclose(result, total / 7, rtol=1e-6)
    assert jliger.fused_linear_cross_entropy(*args, normalizer=0, implementation=implementation) == 0


def test_parts_of_a_batch_sum_up_to_the_whole(implementation):
    # Parts of unequal counts: the mean of their means would be another number.
    problem = make_problem(20, batch=(4, 6), where="some", ignored=0.2, bias="float32")
    count = ((problem.labels != -100) & problem.options["where"]).sum()
    whole = fused(problem, implementation)
    parts = []
    for start in range(4):
        part = slice(start, start + 1)
        inputs = {**problem.inputs, "hidden": problem.inputs["hidden"][part]}
        parts.append(
            fused(
                problem.replace(
                    inputs=inputs, labels=problem.labels[part], where=problem.options["where"][part], normalizer=count
                ),
                implementation,
            )
        )
    for name in ("loss", "kernel", "bias"):
        total = sum(np.asarray(part[name], np.float64) for part in parts)
        np.testing.assert_allclose(total, whole[name], rtol=1e-5, atol=1e-6, err_msg=name)


# ---- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "context"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_precision_reaches_every_product(reduction, how, implementation):
    problem = make_problem(21, reduction=reduction)
    highest = (jax.lax.Precision.HIGHEST,) * 2

    def backward(inputs, cotangent):
        def loss(inputs):
            return jliger.fused_linear_cross_entropy(
                *inputs.values(), problem.labels, reduction=reduction, implementation=implementation,
                precision="highest" if how == "argument" else None,
            )  # fmt: skip

        with jax.default_matmul_precision("highest" if how == "context" else "bfloat16"):
            _, pull_back = jax.vjp(loss, inputs)
        # The backward pass is traced where the user's default is another.
        with jax.default_matmul_precision("bfloat16"):
            return pull_back(cotangent)

    program = jax.make_jaxpr(backward)(problem.inputs, problem.cotangent)
    precisions = [eqn.params["precision"] for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    assert len(precisions) >= 3
    assert all(precision in (highest, jax.lax.Precision.HIGHEST) for precision in precisions), precisions


# ---- sizes of the first public port, and beyond --------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [None, "float32"])
@pytest.mark.parametrize("shape", [(1, 4, 32, 16), pytest.param((4, 2048, 50304, 1024), marks=needs_gpu)], ids=str)
def test_sizes_of_the_first_public_port(shape, bias, dtype, implementation):
    batch, length, vocab, hidden_size = shape
    problem = make_problem(
        22, batch=(batch, length), vocab=vocab, hidden_size=hidden_size, dtype=dtype, bias=bias, where="some", scale=0.3
    ).replace(cotangent=jnp.ones(()), precision="highest" if dtype == "float32" else None)

    @jax.jit
    def plain(inputs):
        # Float32 parameters make the logits float32.
        hidden, promote = jax.vjp(lambda hidden: hidden.astype(jnp.float32), inputs["hidden"])
        result = unfused(problem.replace(inputs={**inputs, "hidden": hidden}, precision="highest"))
        return {**result, "hidden": promote(result["hidden"])[0]}

    ours = fused(problem, implementation)
    for name, value in plain(problem.inputs).items():
        assert ours[name].dtype == value.dtype, name
        result, value = np.asarray(ours[name], np.float32), np.asarray(value, np.float32)
        np.testing.assert_allclose(result, value, rtol=1e-3, atol=1e-3, err_msg=name)
    # Most of these gradients are smaller than that tolerance: in the large they must agree too.
    for name, value in plain(problem.inputs).items():
        result, value = np.asarray(ours[name], np.float64), np.asarray(value, np.float64)
        assert np.linalg.norm(result - value) <= 0.01 * np.linalg.norm(value), name
    assert not ours["hidden"][~problem.options["where"]].any()


@needs_gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_logits_than_32_bits_can_count(reduction, implementation):
    # 2³² logits and one chunk over all of them: the last tokens' rows lie past 2³¹ values, and past 2³² bytes.
    tokens, vocab, hidden_size = 16384, 262144, 16
    problem = make_problem(
        23, batch=(tokens,), vocab=vocab, hidden_size=hidden_size, dtype="bfloat16", kernel_dtype="bfloat16",
        reduction=reduction, chunk_size=tokens,
    )  # fmt: skip
    ours = fused(problem, implementation)
    # The last 64 tokens alone, as a loss of their own.
    last = slice(tokens - 64, tokens)
    part = problem.replace(
        inputs={**problem.inputs, "hidden": problem.inputs["hidden"][last]},
        labels=problem.labels[last],
        cotangent=problem.cotangent[last] if reduction == "none" else problem.cotangent * 64 / tokens,
        chunk_size=None,
    )
    theirs, oracle = unfused(part), exact(part)
    mine = {"hidden": ours["hidden"][last]}
    if reduction == "none":
        mine["loss"] = ours["loss"][last]
    assert_rule_of_two(mine, theirs, {name: oracle[name] for name in mine})
