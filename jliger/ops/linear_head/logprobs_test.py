"""Log-probabilities, log-sum-exp and entropy, with any cotangents; and adapters, under both operations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.ops.linear_head import chunks
from jliger.testing.oracle import (
    DTYPES,
    INTERPRETED,
    ON_GPU,
    assert_rule_of_two,
    equations,
    found_by,
    make_problem,
    pairs_as_parameters,
)

OUTPUTS = ("logprobs", "logsumexp", "entropy")
PAIRS = pairs_as_parameters(
    {
        "dtype": ["float32", "bfloat16", "float16"],
        "rank": [None, 3],
        "kernel_layout": ["hv", "vh"],
        "bias": [None, "float32"],
        "where": [None, "some"],
        "ignored": [0.0, 0.3],
        "chunk_size": [None, 8],
        "keep_logits": [False, True],
        "logit_softcap": [None, 2.0],
        "logit_scale": [1.0, 0.6],
        "temperature": [1.0, 0.7, "of tokens"],
        "vocab_size": [None, 9],
        "batch": [(5,), (3, 7)],
        "vocab": [11, 40],
        "used": [OUTPUTS, ("logprobs",), ("entropy",), ("logprobs", "entropy")],
    }
)


def make(seed=0, rank=None, used=OUTPUTS, **options):
    """A problem, with an adapter if it has a rank, and random cotangents for the outputs that are used."""
    options = {"precision": "highest", **options}
    problem = make_problem(seed, **options)
    random = np.random.default_rng(seed + 1)
    if rank is not None:
        sides = {"a": (problem.inputs["hidden"].shape[-1], rank), "b": (rank, options.get("vocab", 11))}
        factors = {name: jnp.asarray(random.normal(size=size) / 2, jnp.float32) for name, size in sides.items()}
        problem = problem.replace(inputs={**problem.inputs, **factors, "scale": jnp.float32(0.7)})
    cotangents = {name: jnp.asarray(random.normal(size=problem.labels.shape), jnp.float32) for name in used}
    return problem.replace(cotangent=cotangents)


def adapter_of(inputs):
    return jliger.LinearAdapter(inputs["a"], inputs["b"], inputs["scale"]) if "a" in inputs else None


def outputs_and_grads(function, inputs, labels, cotangents, options):
    """What the function finds, and the gradient of every input by the outputs that have a cotangent.

    With `frozen_head` among the options, only hidden states are differentiated; other gradients are 0.
    """
    frozen = set(inputs) - {"hidden"} if options.get("frozen_head") else set()
    options = {name: value for name, value in options.items() if name != "frozen_head"}

    def outputs(inputs):
        inputs = {name: jax.lax.stop_gradient(value) if name in frozen else value for name, value in inputs.items()}
        result = function(
            inputs["hidden"], inputs["kernel"], labels, bias=inputs.get("bias"), adapter=adapter_of(inputs), **options
        )
        return {name: getattr(result, name) for name in cotangents}, result

    used, pull_back, result = jax.vjp(outputs, inputs, has_aux=True)
    grads = pull_back({name: cotangents[name].astype(used[name].dtype) for name in used})[0]
    return {**result._asdict(), **{f"d {name}": grad for name, grad in grads.items()}}


def check(problem, implementation, what=""):
    """The rule of two, for values and gradients."""
    options = problem.options

    def result(function, inputs, cotangents, options):
        arrays = inputs, problem.labels, cotangents
        return found_by(outputs_and_grads, function, *arrays, options=options)

    ours = result(
        jliger.linear_logprobs, problem.inputs, problem.cotangent, {"implementation": implementation, **options}
    )
    theirs = result(jliger.reference.linear_logprobs, problem.inputs, problem.cotangent, options)
    with jax.enable_x64(True):
        as_float64 = jax.tree.map(
            lambda array: jnp.asarray(np.asarray(array), jnp.float64), (problem.inputs, problem.cotangent)
        )
        options = {name: value for name, value in options.items() if name not in ("precision", "logits_dtype")}
        oracle = result(jliger.reference.linear_logprobs, *as_float64, options)
        oracle = {name: np.asarray(value) for name, value in oracle.items()}
    # The bias's gradient is a sum of logit gradients that are rounded to hidden's dtype; the reference sums first.
    half_unit = float(jnp.finfo(problem.inputs["hidden"].dtype).eps) / 2
    more = {}
    if "bias" in problem.inputs and half_unit > 1e-6:
        more["d bias"] = 2 * half_unit * np.sqrt(problem.labels.size)
    if "scale" in problem.inputs:
        # One number that many terms cancel in: a rounding of each.
        terms = np.abs(np.asarray(problem.inputs["a"], np.float64) * oracle["d a"] / 0.7)
        more["d scale"] = 4 * np.finfo(np.float32).eps * terms.sum()
        # By itself the reference's error is luck: that of its terms, if they are independent, is what to go by.
        errors = np.asarray(theirs["d a"], np.float64) - oracle["d a"]
        more["d scale"] += 2 * np.linalg.norm(np.asarray(problem.inputs["a"], np.float64) * errors / 0.7)
    assert_rule_of_two(
        {name: value for name, value in ours.items() if name != "predictions"},
        theirs,
        {name: value for name, value in oracle.items() if name != "predictions"},
        what,
        more,
    )
    for name, value in problem.inputs.items():
        assert ours[f"d {name}"].dtype == value.dtype
    assert ours["logprobs"].dtype == ours["entropy"].dtype == jnp.float32
    return ours, oracle


@pytest.mark.parametrize("row", PAIRS, ids=range(len(PAIRS)))
def test_every_pair_of_options(row, implementation):
    ours, oracle = check(make(3, **row), implementation, str(row))
    np.testing.assert_array_equal(ours["predictions"] == -1, oracle["predictions"] == -1)


@pytest.mark.parametrize("keep_logits", [False, True])
def test_all_tokens_count(keep_logits, implementation):
    options = {"bias": "float32", "temperature": "of tokens", "chunk_size": 8, "keep_logits": keep_logits}
    check(make(5, batch=(3, 7), ignore_index=None, **options), implementation)


@pytest.mark.parametrize(
    ("scale", "dtypes"),
    [
        pytest.param(scale, dtypes, marks=[] if (i + j) % 2 == 0 else [pytest.mark.exhaustive])
        for i, scale in enumerate([30, 1000])
        for j, dtypes in enumerate(DTYPES)
    ],
    ids=str,
)
def test_activation_scales(scale, dtypes, implementation):
    precision = "highest" if dtypes[0] == "float32" else None
    problem = make(
        4, batch=(16,), hidden_size=24, vocab=33, dtype=dtypes[0], kernel_dtype=dtypes[1], scale=scale, chunk_size=8,
        precision=precision,
    )  # fmt: skip
    check(problem, implementation)


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("where", ["none", "some", "all"])
def test_what_does_not_count_is_zero(where, keep_logits, implementation):
    problem = make(5, where=where, keep_logits=keep_logits)
    hidden = jnp.where(problem.options["where"][..., None], problem.inputs["hidden"], jnp.nan)
    ours, _ = check(problem, implementation)
    poisoned = outputs_and_grads(
        jliger.linear_logprobs, {**problem.inputs, "hidden": hidden}, problem.labels, problem.cotangent,
        {"implementation": implementation, **problem.options},
    )  # fmt: skip
    for name, value in poisoned.items():
        np.testing.assert_array_equal(value, ours[name], err_msg=name)
    for name in OUTPUTS:
        assert not np.any(np.asarray(ours[name])[~np.asarray(problem.options["where"])])


def test_a_label_out_of_range_poisons_its_own_logprob(implementation):
    problem = make(6, batch=(6,))
    labels = problem.labels.at[2].set(11)
    result = jliger.linear_logprobs(
        problem.inputs["hidden"], problem.inputs["kernel"], labels, implementation=implementation
    )
    np.testing.assert_array_equal(np.isnan(result.logprobs), np.arange(6) == 2)
    assert np.isfinite(result.logsumexp).all()
    assert np.isfinite(result.entropy).all()

    def total(hidden):
        options = {"vocab_size": 10, "implementation": implementation}
        return jliger.linear_logprobs(hidden, problem.inputs["kernel"], labels, **options).logprobs.sum()

    labels = problem.labels.at[2].set(10)
    grads = jax.grad(total)(problem.inputs["hidden"])  # of a frozen kernel
    np.testing.assert_array_equal(np.isnan(grads).all(1), (np.arange(6) == 2) | (np.asarray(labels) == 10))
    np.testing.assert_array_equal(np.isnan(grads).any(1), np.isnan(grads).all(1))


def test_of_equal_logits(implementation):
    # log V in nats; a maximum, so its gradient is 0.
    hidden, kernel = jnp.ones((3, 4)), jnp.full((4, 7), 0.25)

    def entropy(kernel):
        return jliger.linear_logprobs(hidden, kernel, jnp.arange(3), implementation=implementation).entropy.sum()

    value, grad = jax.value_and_grad(entropy)(kernel)
    np.testing.assert_allclose(value, 3 * np.log(7), rtol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_of_one_certain_token(implementation):
    hidden = 1e4 * jnp.eye(3)
    result = jliger.linear_logprobs(hidden, jnp.eye(3), jnp.array([0, 1, 0]), implementation=implementation)
    np.testing.assert_array_equal(result.entropy, 0)
    np.testing.assert_array_equal(result.logprobs, [0, 0, -1e4])
    np.testing.assert_array_equal(result.predictions, [0, 1, 2])


def test_a_temperature_is_a_scale(implementation):
    problem = make(7)
    hidden, kernel = problem.inputs["hidden"], problem.inputs["kernel"]
    result = jliger.linear_logprobs(
        hidden, kernel, problem.labels, logit_scale=1 / 0.7, precision="highest", implementation=implementation
    )
    expected = jax.nn.log_softmax(jnp.dot(hidden, kernel, precision="highest") / 0.7)
    expected = jnp.take_along_axis(expected, problem.labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(result.logprobs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("used", [("logprobs",), OUTPUTS])
def test_an_entropy_that_is_not_used_has_no_part_in_the_backward_pass(used, implementation, monkeypatch):
    seen = []

    def recording(*args):
        seen.append(args[-1])
        return form(*args)

    form = chunks.recompute_pass
    monkeypatch.setattr(chunks, "recompute_pass", recording)
    jax.clear_caches()
    problem = make(8, used=used)

    def grads(inputs):
        return outputs_and_grads(
            jliger.linear_logprobs, inputs, problem.labels, problem.cotangent, {"implementation": implementation}
        )

    jax.jit(grads).lower(problem.inputs)
    assert seen
    assert all((coefficients.probability_logit is not None) == ("entropy" in used) for coefficients in seen)


# ---- logits that are kept within a budget --------------------------------------------------------------------


BUDGETS = [  # no row; one chunk, and more than what counts; several chunks that the rows do not fill; all rows; more
    (0, {}),
    (8, {"dtype": "bfloat16", "rank": 3, "bias": "float32", "where": "some"}),
    pytest.param(
        24, {"kernel_layout": "vh", "temperature": "of tokens", "bias": "float32"}, marks=pytest.mark.exhaustive
    ),
    pytest.param(37, {"dtype": "float16", "logit_softcap": 2.0}, marks=pytest.mark.exhaustive),
    (10**9, {"used": ("logprobs",), "where": "none"}),
]


@pytest.mark.parametrize(("rows", "options"), BUDGETS, ids=str)
def test_logits_within_a_budget(rows, options, implementation):
    size = 4 if options.get("dtype", "float32") == "float32" else 2
    options = {"batch": (37,), "ignored": 0.2, "chunk_size": 10, "keep_logits": rows * 11 * size, **options}
    check(make(12, **options), implementation)


def test_logits_that_have_moved_are_computed_again(monkeypatch):
    """XLA may choose other shardings of Auto axes for the backward pass; logits that are elsewhere are not used."""
    problem = make(13, batch=(23,), chunk_size=8)
    seen = []

    def moved(config, wanted, operands, *others):
        seen.append(operands.logits.shape)
        rows = operands.logit_rows
        logits = operands.logits.at[5:].set(7)
        operands = operands._replace(logit_rows=jnp.where(rows < 5, rows, rows + 100), logits=logits)
        return form(config, wanted, operands, *others)

    form = chunks.partly_saved_pass
    monkeypatch.setattr(chunks, "partly_saved_pass", moved)

    @functools.partial(jax.jit, static_argnums=1)
    def grads(inputs, keep_logits):
        options = {"implementation": "xla", "keep_logits": keep_logits, **problem.options}
        return outputs_and_grads(jliger.linear_logprobs, inputs, problem.labels, problem.cotangent, options)

    result, expected = grads(problem.inputs, 16 * 11 * 4), grads(problem.inputs, False)
    assert seen == [(16, 11)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), result, expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("batched", ["hidden", "kernel"])
def test_a_budget_of_logits_is_shared_by_examples(batched):
    problem = make_problem(14, batch=(24,), precision="highest")
    inputs = {name: problem.inputs[name] for name in ("hidden", "kernel")}
    axes = {name: 0 if name == batched else None for name in inputs}
    inputs[batched] = jnp.stack([inputs[batched], inputs[batched] / 2])

    def grads(keep_logits):
        def loss(inputs):
            options = {"precision": "highest", "chunk_size": 8, "keep_logits": keep_logits, "implementation": "xla"}
            result = jliger.linear_logprobs(inputs["hidden"], inputs["kernel"], problem.labels, **options)
            return jnp.sin(result.logprobs).sum()

        return jax.jit(jax.vmap(jax.grad(loss), (axes,)))

    result, expected = grads(2 * 16 * 11 * 4), grads(False)
    made = {out.aval.shape for one in equations(jax.make_jaxpr(result)(inputs)) for out in one.outvars}
    assert (2, 1, 16, 11) in made
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), result(inputs), expected(inputs))


def test_a_budget_of_logits_is_used_and_not_exceeded(implementation):
    if INTERPRETED:
        pytest.skip("looks at compiled programs, which interpreted kernels are no part of")
    num_tokens, vocab = 2048, 2048
    labels = jnp.zeros(num_tokens, jnp.int32)

    def memory(keep_logits):
        def loss(hidden, kernel):
            options = {"keep_logits": keep_logits, "chunk_size": 128, "implementation": implementation}
            return jnp.sin(jliger.linear_logprobs(hidden, kernel, labels, **options).logprobs).sum()

        shapes = jax.ShapeDtypeStruct((num_tokens, 8), jnp.float32), jax.ShapeDtypeStruct((8, vocab), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    row = vocab * 4
    least, half, most = (memory(rows * row) for rows in (0, 512, 1536))
    assert half <= least + 512 * row
    # One buffer, to a chunk: what else there is does not depend on the budget.
    assert abs(most - half - 1024 * row) <= 128 * row


@pytest.mark.parametrize(
    ("keep_logits", "error", "message"),
    [
        (-1, ValueError, "keep_logits got -1; pass bytes, at least 0"),
        (1e9, TypeError, r"keep_logits got 1000000000\.0"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(keep_logits, error, message):
    with pytest.raises(error, match=message):
        jliger.linear_logprobs(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(2, jnp.int32), keep_logits=keep_logits)


# ---- a frozen head -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "where": "some", "temperature": "of tokens"},
        {"dtype": "float16", "rank": 3, "bias": "float32", "kernel_layout": "vh", "logit_softcap": 2.0},
        pytest.param({"where": "none"}, marks=pytest.mark.exhaustive),
        pytest.param({"used": ("logsumexp",), "rank": 3}, marks=pytest.mark.exhaustive),
        pytest.param({"used": ("logprobs", "entropy"), "bias": "float32"}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_frozen_head(options, implementation):
    options = {"batch": (37,), "chunk_size": 16, "used": ("logprobs",), "frozen_head": True, **options}
    check(make(16, **options), implementation)


def products_in_loops(function, *arrays):
    """How many products the loops of a compiled program compute in each iteration, all loops together."""
    text = jax.jit(function).lower(*arrays).compile().as_text()
    return len(re.findall(r' dot\(.*op_name="[^"]*/while/body/', text))


@pytest.mark.parametrize(("used", "number"), [(("logprobs",), 2), (("logprobs", "entropy"), 3)])
def test_products_with_a_frozen_head(used, number):
    if ON_GPU or INTERPRETED:
        pytest.skip("reads the products in a program that XLA compiled for a CPU")
    problem = make(17, batch=(64,), vocab=128, hidden_size=32, used=used)

    def grads(hidden):
        inputs = {"hidden": hidden, "kernel": problem.inputs["kernel"]}
        options = {"chunk_size": 16, "implementation": "xla", "frozen_head": True}
        found = outputs_and_grads(jliger.linear_logprobs, inputs, problem.labels, problem.cotangent, options)
        return [found[name] for name in (*used, "d hidden")]

    assert products_in_loops(grads, problem.inputs["hidden"]) == number


# ---- adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "kernel_layout", "dtype"),
    [
        ("none", "vh", "float32"),
        ("mean", "hv", "bfloat16"),
        *(
            pytest.param(*row, marks=pytest.mark.exhaustive)
            for row in (("mean", "vh", "float32"), ("none", "hv", "bfloat16"))
        ),
    ],
)
def test_an_adapter_under_the_loss(reduction, kernel_layout, dtype, implementation):
    problem = make(
        9, rank=5, batch=(19,), vocab=23, dtype=dtype, kernel_layout=kernel_layout, chunk_size=8, ignored=0.2,
        reduction=reduction, z_loss=0.01, label_smoothing=0.1,
    )  # fmt: skip
    shape = problem.labels.shape if reduction == "none" else ()
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def loss_and_grads(function, inputs, cotangent, **options):
        def loss(inputs):
            return function(
                inputs["hidden"], inputs["kernel"], problem.labels, adapter=adapter_of(inputs), **options
            )  # fmt: skip

        value, pull_back = jax.vjp(loss, inputs)
        return {"loss": value, **pull_back(cotangent.astype(value.dtype))[0]}

    options = problem.options
    ours = loss_and_grads(
        jliger.fused_linear_cross_entropy, problem.inputs, cotangent, implementation=implementation, **options
    )
    theirs = loss_and_grads(jliger.reference.fused_linear_cross_entropy, problem.inputs, cotangent, **options)
    with jax.enable_x64(True):
        inputs, wide = jax.tree.map(
            lambda array: jnp.asarray(np.asarray(array), jnp.float64), (problem.inputs, cotangent)
        )
        oracle = loss_and_grads(jliger.reference.fused_linear_cross_entropy, inputs, wide, **options)
        oracle = {name: np.asarray(value) for name, value in oracle.items()}
    assert_rule_of_two(ours, theirs, oracle)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_neither_the_sum_nor_a_frozen_kernels_gradient_is_formed(reduction, implementation):
    if INTERPRETED:
        pytest.skip("looks at programs, which interpreted kernels are no part of")
    problem = make(10, rank=3, batch=(8,), vocab=40, hidden_size=16)

    def loss(adapter):
        return jliger.fused_linear_cross_entropy(
            problem.inputs["hidden"], problem.inputs["kernel"], problem.labels, adapter=adapter, reduction=reduction,
            implementation=implementation,
        ).sum()  # fmt: skip

    result = equations(jax.make_jaxpr(jax.grad(loss))(adapter_of(problem.inputs)))
    made = {
        tuple(sorted(out.aval.shape)) for one in result if one.primitive.name == "dot_general" for out in one.outvars
    }
    assert (16, 40) not in made
    assert (3, 40) in made or (8, 40) in made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": (6, 3), "b": (4, 11)}, "one rank"),
        ({"a": (5, 3), "b": (3, 11)}, r"adapter\.a got shape \(5, 3\)"),
        ({"a": (6, 3), "b": (3, 12)}, r"adapter\.b got shape \(3, 12\)"),
        ({"a": (6, 3), "b": (3, 11), "scale": (2,)}, r"adapter\.scale got shape"),
    ],
)
def test_an_adapter_that_does_not_fit(changes, message):
    adapter = jliger.LinearAdapter(
        jnp.ones(changes["a"]), jnp.ones(changes["b"]), jnp.ones(changes.get("scale", ()))
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        jliger.linear_logprobs(jnp.ones((2, 6)), jnp.ones((6, 11)), jnp.zeros(2, jnp.int32), adapter=adapter)


@pytest.mark.parametrize(
    ("dtype", "keep_logits", "size"), [("float32", False, -1e6), ("bfloat16", True, 1e6), ("float16", False, 1e4)]
)
def test_entropy_gradients_of_masked_columns(dtype, keep_logits, size, implementation):
    """Columns masked by a bias of −inf, or of the lowest number, do not exist for the rest."""
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    hidden, kernel = jnp.asarray([[1, -2, 0.5, 1], [0, 1, 1, -1]], dtype), jnp.eye(4, 7, dtype=dtype)
    bias = jnp.array([0, 0.5, 0, 0, -jnp.inf, jnp.finfo(jnp.float32).min, -jnp.inf])

    def entropy(hidden, kernel, bias):
        options = {"bias": bias, "keep_logits": keep_logits, "implementation": implementation}
        return (size * jliger.linear_logprobs(hidden, kernel, jnp.zeros(2, jnp.int32), **options).entropy).sum()

    with jax.default_matmul_precision("highest"):  # on a GPU, float32 products are else rounded to TF32
        result = jax.jit(jax.grad(entropy, argnums=(0, 1, 2)))(hidden, kernel, bias)
    with jax.disable_jit(), jax.debug_nans(True):
        entropy(hidden, kernel, bias)
    with jax.enable_x64(True):
        hidden, kernel, bias = (np.asarray(array, np.float64) for array in (hidden, kernel, bias))
        log_p = jax.nn.log_softmax((hidden @ kernel + bias)[:, :4])
        p = jnp.exp(log_p)
        by_logit = np.zeros((2, 7))
        by_logit[:, :4] = -size * p * (log_p - (p * log_p).sum(1, keepdims=True))
    expected = (by_logit @ kernel.T, hidden.T @ by_logit, by_logit.sum(0))
    eps = float(jnp.finfo(dtype).eps)
    for ours, exact in zip(result, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64) / size, exact / size, atol=4 * eps)


# ---- a temperature -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_logits", [False, True])
def test_a_temperature_that_is_not_above_zero_poisons_its_token_alone(keep_logits, implementation):
    problem = make_problem(5, batch=(4,), ignored=0.0)
    labels = problem.labels.at[3].set(-100)
    temperature = jnp.asarray([0.7, 0.0, -1.0, 0.0])

    @jax.jit
    def run(hidden, temperature):
        options = {"keep_logits": keep_logits, "implementation": implementation}

        def total(hidden, temperature):
            kernel = problem.inputs["kernel"]
            result = jliger.linear_logprobs(hidden, kernel, labels, temperature=temperature, **options)
            return result.logprobs.sum() + result.entropy.sum(), result

        return jax.grad(total, (0, 1), has_aux=True)(hidden, temperature)

    (hidden_grad, temperature_grad), result = run(problem.inputs["hidden"], temperature)
    for field in (result.logprobs, result.logsumexp, result.entropy):
        np.testing.assert_array_equal(np.isnan(field), [False, True, True, False])
    np.testing.assert_array_equal(np.isnan(hidden_grad).all(1), [False, True, True, False])
    assert not np.any(hidden_grad[3])
    assert not np.any(temperature_grad)


def test_a_temperature_that_cannot_be_is_refused():
    hidden, kernel, labels = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(2, jnp.int32)
    for temperature, error, message in [
        (0, ValueError, "temperature got 0; pass a finite number above 0"),
        (-0.5, ValueError, "temperature got -0.5"),
        (float("inf"), ValueError, "temperature got inf"),
        (jnp.ones(3), ValueError, r"temperature got shape \(3,\); pass one number, or one for each token, \(2,\)"),
        (jnp.ones(2, bool), TypeError, "temperature got dtype bool; pass real numbers"),
    ]:
        with pytest.raises(error, match=message):
            jliger.linear_logprobs(hidden, kernel, labels, temperature=temperature)


def test_a_temperature_of_one_costs_nothing():
    arguments = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(2, jnp.int32)

    def program(**options):
        return list(equations(jax.make_jaxpr(lambda *arrays: jliger.linear_logprobs(*arrays, **options))(*arguments)))

    without, one, other = program(), program(temperature=1.0), program(temperature=2.0)
    assert len(one) == len(without) < len(other)
