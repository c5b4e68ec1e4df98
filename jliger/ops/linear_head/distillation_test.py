"""Distillation, held to the reference by the rule of two, to values worked by hand, and to what it must refuse."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jliger
from jliger import losses
from jliger.testing.distillation_oracle import DTYPES, check, exact, fused, make_problem
from jliger.testing.oracle import INTERPRETED, equations, pairs_as_parameters

BETAS = [0.0, 0.1, 0.5, 1.0]


def assert_close(result, expected):
    """What two programs find of the same: equal up to a few float32 roundings of terms of about 1."""
    little = 8 * np.finfo(np.float32).eps * max(np.abs(np.asarray(expected)).max(), 1)
    np.testing.assert_allclose(result, expected, rtol=0, atol=little)


OPTIONS = {
    "beta": BETAS,
    "temperature": [1.0, 3.0],
    "hard_weight": [0.0, 0.3],
    "dtypes": DTYPES[::5] if INTERPRETED else [DTYPES[0], *DTYPES[2:5]],
    "biases": [(False, False), (True, True)],
    "where": [None, "some"],
    "weights": [False, True],
    "reduction": ["mean", "sum"],
    "kernel_layouts": [("vh", "hv"), ("hv", "vh")],
    "logit_scales": [(1.0, 1.0), (0.5, -2.0)],
    "logit_softcaps": [(None, None), (2.0, None), (2.0, 5.0)],
    "chunk_size": [None, 8],
    "vocab_size": [None, 9],
}


@pytest.mark.parametrize("options", pairs_as_parameters(OPTIONS), ids=itertools.count())
def test_every_pair_of_options(options, implementation):
    ignored = 0.3 if options["hard_weight"] else 0.0
    options = {**options, "labels": options["hard_weight"] > 0, "ignored": ignored, "soft_weight": 0.7}
    check(make_problem(precision="highest", **options), implementation, str(options))


def test_all_tokens_count(implementation):
    problem = make_problem(
        20, beta=0.5, labels=True, hard_weight=0.3, ignore_index=None, weights=True, chunk_size=8, precision="highest"
    )
    check(problem, implementation)
    labels = problem.options["labels"].at[0, 0].set(-100)
    assert np.isnan(fused(problem.replace(labels=labels), implementation)["loss"])


@pytest.mark.parametrize("kernel_layout", ["hv", "vh"])
def test_an_adapter_of_the_student(kernel_layout, implementation):
    problem = make_problem(
        19, beta=0.5, adapter=True, biases=(True, False), kernel_layouts=(kernel_layout, "hv"), chunk_size=8,
        precision="highest",
    )  # fmt: skip
    check(problem, implementation)


LARGE = {"beta": BETAS, "scale": [32.0, 1024.0], "dtypes": DTYPES[1::2]}


@pytest.mark.parametrize("options", pairs_as_parameters(LARGE), ids=itertools.count())
def test_large_logits(options, implementation):
    check(make_problem(1, coarse=True, precision="highest", **options), implementation, str(options))


@pytest.mark.parametrize(
    ("tokens", "vocab", "beta"),
    [
        (1, 1, 0.5),
        pytest.param(1, 2, 0.0, marks=pytest.mark.exhaustive),
        pytest.param(7, 9, 1.0, marks=pytest.mark.exhaustive),
        (8, 16, 0.5),
        (9, 130, 0.0),
        (17, 1025, 0.5),
    ],
)
def test_sizes_about_those_of_chunks_and_tiles(tokens, vocab, beta, implementation):
    problem = make_problem(
        2, batch=(tokens,), vocab=vocab, beta=beta, chunk_size=8, biases=(True, True), labels=True, hard_weight=0.5,
        temperature=2.0, precision="highest",
    )  # fmt: skip
    check(problem, implementation)


def test_any_chunk_size_gives_the_same(implementation):
    problem = make_problem(3, batch=(17,), beta=0.1, biases=(True, False), where="some", precision="highest")
    expected = fused(problem, implementation)
    for chunk_size in (1, 8, 9, 1000):
        result = fused(problem.replace(chunk_size=chunk_size), implementation)
        for name, value in expected.items():
            np.testing.assert_allclose(result[name], value, rtol=1e-5, atol=2e-6, err_msg=f"{name}, {chunk_size}")


def test_float64():
    with jax.enable_x64(True):
        problem = make_problem(4, beta=0.3, labels=True, hard_weight=0.2, biases=(True, True), chunk_size=8)
        problem = problem.replace(
            inputs=jax.tree.map(lambda a: a.astype("float64"), problem.inputs),
            teacher=jax.tree.map(lambda a: a.astype("float64"), problem.teacher),
        )
        result = fused(problem, "xla")
    for name, value in exact(problem).items():
        np.testing.assert_allclose(result[name], value, rtol=1e-12, atol=1e-14, err_msg=name)


# ---- what counts ---------------------------------------------------------------------------------------------


OF_MASKS = [
    *(("all", 0.5), ("some", 0.0), ("none", 1.0)),
    *(pytest.param(*row, marks=pytest.mark.exhaustive) for row in (("some", 1.0), ("none", 0.1))),
]


@pytest.mark.parametrize(("where", "beta"), OF_MASKS)
def test_what_does_not_count_does_not_matter(beta, where, implementation):
    problem = make_problem(
        5, beta=beta, where=where, chunk_size=8, biases=(True, True), labels=True, ignored=0.2, hard_weight=0.5,
        precision="highest",
    )  # fmt: skip
    result = check(problem, implementation)
    counted = problem.options["where"] & (problem.options["labels"] != -100)
    spoilt = [jnp.where(counted[..., None], hidden, jnp.nan) for hidden in (
        problem.inputs["student_hidden"], problem.teacher[0],
    )]  # fmt: skip
    again = fused(
        problem.replace(
            inputs={**problem.inputs, "student_hidden": spoilt[0]}, teacher=(spoilt[1], problem.teacher[1])
        ),
        implementation,
    )
    for name, value in result.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    assert not np.any(result["student_hidden"][~counted])
    if where == "none":
        assert result["loss"] == result["weight"] == result["agreement"] == result["accuracy"] == 0
        assert not any(np.any(result[name]) for name in problem.inputs)


def test_nothing_counts_and_the_divergence_would_be_infinite(implementation):
    # A column that the teacher alone masks: of places past the end of the queue, too, the divergence is infinite.
    problem = make_problem(6, batch=(3,), beta=1.0, biases=(True, True), where="none")
    bias = problem.options["teacher_bias"].at[4].set(-jnp.inf)
    result = fused(problem.replace(teacher_bias=bias), implementation)
    assert result["loss"] == 0
    assert not any(np.any(result[name]) for name in problem.inputs)


def test_labels_without_a_hard_part_say_what_counts(implementation):
    problem = make_problem(7, labels=True, ignored=0.4, precision="highest")
    result = check(problem, implementation)
    assert "cross_entropy" not in result
    labels = problem.options["labels"]
    masked = problem.replace(labels=None, where=labels != -100)
    for name, value in fused(masked, implementation).items():
        assert_close(result[name], value)
    # Which label it is does not matter, not even whether it is a column.
    other = fused(problem.replace(labels=jnp.where(labels == -100, -100, 10**6)), implementation)
    np.testing.assert_array_equal(result["loss"], other["loss"])


def test_an_ignore_index_of_zero_means_nothing_without_labels(implementation):
    result = fused(make_problem(8, ignore_index=0), implementation)
    assert result["weight"] == 15


@pytest.mark.parametrize("label", [-1, 11, 2**30])
def test_a_label_out_of_range_poisons_a_hard_part(label, implementation):
    problem = make_problem(9, labels=True, hard_weight=0.1)
    result = fused(problem.replace(labels=problem.options["labels"].at[1, 2].set(label)), implementation)
    assert np.isnan(result["loss"])
    assert np.isnan(result["student_hidden"][1, 2]).all()
    assert np.isnan(result["student_kernel"]).all()
    assert np.isfinite(np.delete(result["student_hidden"].reshape(15, -1), 7, axis=0)).all()


# ---- values worked by hand -----------------------------------------------------------------------------------


@pytest.fixture(params=["reference", "fused"])
def jsd_of_logits(request, implementation):
    """The loss of given logits: hidden states that are logits, and kernels that are the identity."""
    function = jliger.reference.fused_linear_jsd
    if request.param == "fused":
        function = functools.partial(losses.fused_linear_jsd, implementation=implementation)

    def loss(student, teacher, **options):
        student, teacher = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
        identity = jnp.eye(student.shape[-1])
        return function(student, identity, teacher, identity, precision="highest", **options)

    return loss


def test_of_two_columns(jsd_of_logits):
    # Three quarters against a half.
    student, teacher = jnp.log(jnp.array([[3.0, 1.0]])), jnp.zeros((1, 2))
    p, r, m = np.array([0.75, 0.25]), np.array([0.5, 0.5]), np.array([0.625, 0.375])
    forward, reverse = (r * np.log(r / p)).sum(), (p * np.log(p / r)).sum()
    middle = ((p * np.log(p / m)).sum() + (r * np.log(r / m)).sum()) / 2
    for beta, expected in ((0.0, forward), (1.0, reverse), (0.5, middle)):
        np.testing.assert_allclose(jsd_of_logits(student, teacher, beta=beta), expected, rtol=1e-6)
    # The teacher's side of the mixture is β: of a quarter it has (3 · p + r) / 4.
    m = 0.25 * r + 0.75 * p
    expected = 0.25 * (r * np.log(r / m)).sum() + 0.75 * (p * np.log(p / m)).sum()
    np.testing.assert_allclose(jsd_of_logits(student, teacher, beta=0.25), expected, rtol=1e-5)


def test_gradients_of_two_columns(jsd_of_logits):
    student, teacher = jnp.log(jnp.array([[3.0, 1.0]])), jnp.zeros((1, 2))
    # p − r; and p (log(p / r) − KL), whose columns add up to 0.
    for beta, expected in ((0.0, 0.25), (1.0, 0.75 * 0.25 * np.log(3)), (0.5, 0.5 * 0.1875 * np.log(1.2 / (2 / 3)))):
        grad = jax.grad(lambda z, beta=beta: jsd_of_logits(z, teacher, beta=beta))(student)
        np.testing.assert_allclose(grad, [[expected, -expected]], rtol=1e-5)


def test_forward_and_reverse_are_those_of_optax(jsd_of_logits):
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 7, 30)).astype(np.float32)
    log_p, log_r = jax.nn.log_softmax(student / 2), jax.nn.log_softmax(teacher / 2)
    forward, reverse = (
        optax.losses.kl_divergence(log_p, jnp.exp(log_r)),
        optax.losses.kl_divergence(log_r, jnp.exp(log_p)),
    )
    for beta, expected in ((0.0, forward), (1.0, reverse)):
        result = jsd_of_logits(student, teacher, beta=beta, temperature=2.0)
        np.testing.assert_allclose(result, expected.mean(), rtol=1e-5)


def test_exchanging_the_models_exchanges_beta(jsd_of_logits):
    random = np.random.default_rng(1)
    student, teacher = random.normal(size=(2, 7, 30)).astype(np.float32) * 3
    for beta in BETAS:
        one = jsd_of_logits(student, teacher, beta=beta)
        other = jsd_of_logits(teacher, student, beta=1 - beta)
        np.testing.assert_allclose(one, other, rtol=2e-6)


def test_a_small_beta_is_that_part_of_forward_kl(jsd_of_logits):
    random = np.random.default_rng(2)
    student, teacher = random.normal(size=(2, 7, 30)).astype(np.float32)
    forward, reverse = (float(jsd_of_logits(student, teacher, beta=beta)) for beta in (0.0, 1.0))
    np.testing.assert_allclose(jsd_of_logits(student, teacher, beta=1e-3) / 1e-3, forward, rtol=1e-2)
    np.testing.assert_allclose(jsd_of_logits(student, teacher, beta=1 - 1e-3) / 1e-3, reverse, rtol=1e-2)


def test_with_hintons_factor_gradients_outlast_the_temperature(jsd_of_logits):
    # At a high temperature the gradient, times its square, is that of half the squared distance of centred logits.
    random = np.random.default_rng(3)
    student, teacher = random.normal(size=(2, 4, 10)).astype(np.float32)
    centred = [logits - logits.mean(1, keepdims=True) for logits in (student, teacher)]
    expected = (centred[0] - centred[1]) / 10 / 4  # columns, tokens
    for beta in (0.0, 1.0):
        grad = jax.grad(lambda z, beta=beta: jsd_of_logits(z, teacher, beta=beta, temperature=1000.0, soft_weight=1e6))(
            jnp.asarray(student)
        )
        np.testing.assert_allclose(grad, expected, atol=5e-3 * np.abs(expected).max())  # logits / temperature


def test_the_hard_part_is_the_cross_entropy(implementation):
    problem = make_problem(10, biases=(True, False), labels=True, ignored=0.3, weights=True, precision="highest")
    options = {name: problem.options[name] for name in ("weights", "precision")}
    alone = problem.replace(hard_weight=1.0, soft_weight=0.0, temperature=3.0)
    result = fused(alone, implementation)
    hidden, kernel, bias = (problem.inputs[f"student_{name}"] for name in ("hidden", "kernel", "bias"))

    def loss(hidden, kernel, bias):
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, problem.options["labels"], bias=bias, implementation=implementation, return_metrics=True,
            **options,
        )  # fmt: skip

    (expected, metrics), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(hidden, kernel, bias)
    np.testing.assert_allclose(result["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(result["cross_entropy"], expected, rtol=1e-6)
    np.testing.assert_allclose(result["accuracy"], metrics.accuracy, rtol=1e-6)
    np.testing.assert_array_equal(result["predictions"], metrics.predictions)
    for name, grad in zip(("hidden", "kernel", "bias"), grads, strict=True):
        np.testing.assert_allclose(result[f"student_{name}"], grad * problem.cotangent, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_is_jsd_at_the_ends(direction, implementation):
    problem = make_problem(11)
    kl = losses.fused_linear_kl(
        *problem.inputs.values(), *problem.teacher, direction=direction, implementation=implementation
    )
    result = fused(problem.replace(beta={"forward": 0.0, "reverse": 1.0}[direction]), implementation)
    assert_close(kl, result["loss"])
    reference = jliger.reference.fused_linear_kl(*problem.inputs.values(), *problem.teacher, direction=direction)
    np.testing.assert_allclose(kl, reference, rtol=1e-5)


# ---- gradients -----------------------------------------------------------------------------------------------


def loss_of(problem, implementation):
    def loss(inputs, teacher=problem.teacher):
        rest = {name: value for name, value in inputs.items() if name not in ("student_hidden", "student_kernel")}
        options = {**problem.options, "return_metrics": False, "implementation": implementation}
        return losses.fused_linear_jsd(inputs["student_hidden"], inputs["student_kernel"], *teacher, **rest, **options)

    return loss


def num_products(function, *args):
    return sum(e.primitive.name == "dot_general" for e in equations(jax.make_jaxpr(function)(*args)))


def test_nothing_is_computed_that_is_not_asked_for(implementation):
    problem = make_problem(12, beta=0.5, biases=(True, True))  # one chunk, so that products are counted once
    loss = loss_of(problem, implementation)
    expected = jax.grad(loss)(problem.inputs)
    assert num_products(loss, problem.inputs) == 2
    for names in itertools.chain(*(itertools.combinations(problem.inputs, size) for size in (1, 2))):
        wanted = {name: problem.inputs[name] for name in names}

        def partial(wanted):
            return loss({**problem.inputs, **wanted})

        for name, grad in jax.grad(partial)(wanted).items():
            assert_close(grad, expected[name])
        assert num_products(jax.grad(partial), wanted) == 2 + len({"student_hidden", "student_kernel"} & {*names})


def test_the_teacher_has_no_gradient(implementation):
    problem = make_problem(13)
    loss = loss_of(problem, implementation)
    for grad in jax.grad(loss, 1)(problem.inputs, problem.teacher):
        assert not np.any(grad)
    # One model as both learns as the student alone.
    hidden, kernel = problem.inputs["student_hidden"], problem.inputs["student_kernel"]

    def with_itself(kernel):
        return loss({"student_hidden": hidden, "student_kernel": kernel}, (hidden + 1, kernel))

    def with_another(kernel):
        return loss(
            {"student_hidden": hidden, "student_kernel": kernel}, (hidden + 1, problem.inputs["student_kernel"])
        )

    assert_close(jax.grad(with_itself)(kernel), jax.grad(with_another)(kernel))
    assert num_products(jax.grad(loss, 1), problem.inputs, problem.teacher) == 2


@pytest.mark.parametrize("factor", [0.0, -3.0, 65528.0])
def test_gradients_follow_the_cotangent(factor, implementation):
    problem = make_problem(14, beta=0.5, labels=True, hard_weight=0.5, precision="highest")
    result = check(problem.replace(cotangent=problem.cotangent * factor), implementation)
    if factor == 0:
        assert not any(np.any(result[name]) for name in problem.inputs)


def test_weights_of_both_parts_may_be_traced(implementation):
    problem = make_problem(15, labels=True, precision="highest")
    loss = loss_of(problem.replace(hard_weight=0.25, soft_weight=0.75), implementation)

    @jax.jit
    def traced(inputs, hard_weight, soft_weight):
        return loss_of(problem.replace(hard_weight=hard_weight, soft_weight=soft_weight), implementation)(inputs)

    weights = jnp.float32(0.25), jnp.float32(0.75)
    assert_close(traced(problem.inputs, *weights), loss(problem.inputs))
    # They carry no gradient, and one of 0 takes nothing away.
    assert not any(map(np.any, jax.grad(traced, (1, 2))(problem.inputs, *weights)))
    without = loss_of(problem.replace(hard_weight=0.0), implementation)
    assert_close(traced(problem.inputs, 0.0, 1.0), without(problem.inputs))


def test_inside_checkpoint_and_scan(implementation):
    problem = make_problem(16, beta=0.5, biases=(True, False), precision="highest")
    loss = loss_of(problem, implementation)
    expected = jax.grad(loss)(problem.inputs)

    def scanned(inputs):
        def step(total, _):
            return total + jax.checkpoint(loss)(inputs), None

        return jax.lax.scan(step, 0.0, None, length=2)[0]

    for name, grad in jax.grad(scanned)(problem.inputs).items():
        np.testing.assert_allclose(grad, 2 * expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batched", ["tokens", "student_kernel", "teacher_kernel"])
def test_vmap(batched, implementation):
    problem = make_problem(17, batch=(4, 5), beta=0.5)
    loss = loss_of(problem, implementation)
    hidden, kernel = problem.inputs["student_hidden"], problem.inputs["student_kernel"]
    teacher_hidden, teacher_kernel = problem.teacher
    kernels = [jnp.stack([a, 2 * a, -a, a + 1]) if batched == f"{name}_kernel" else a for name, a in (
        ("student", kernel), ("teacher", teacher_kernel),
    )]  # fmt: skip
    axes = (0, 0 if kernels[0].ndim == 3 else None, 0, 0 if kernels[1].ndim == 3 else None)

    def grads(hidden, kernel, teacher_hidden, teacher_kernel):
        return jax.grad(loss)({"student_hidden": hidden, "student_kernel": kernel}, (teacher_hidden, teacher_kernel))

    arguments = (hidden, kernels[0], teacher_hidden, kernels[1])
    result = jax.vmap(grads, axes)(*arguments)
    for i in range(4):
        one = grads(*(a if axis is None else a[i] for a, axis in zip(arguments, axes, strict=True)))
        for name, grad in one.items():
            np.testing.assert_allclose(result[name][i], grad, rtol=1e-5, atol=1e-6)


def test_the_same_program_gives_the_same_bits(implementation):
    problem = make_problem(18, beta=0.5, labels=True, hard_weight=0.5)
    first, second = fused(problem, implementation), fused(problem, implementation)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


# ---- what is refused -----------------------------------------------------------------------------------------

ONES = {
    "student_hidden": jnp.ones((3, 4)),
    "student_kernel": jnp.ones((4, 7)),
    "teacher_hidden": jnp.ones((3, 5)),
    "teacher_kernel": jnp.ones((5, 7)),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": 1.5}, ValueError, r"beta got 1.5; pass a finite number in \[0, 1\]"),
        ({"beta": jnp.float32(0.5)}, TypeError, "beta got .*; pass a Python number"),
        ({"temperature": 0}, ValueError, "temperature got 0; pass a number above 0"),
        ({"temperature": -1.0}, ValueError, "temperature got -1.0"),
        ({"reduction": "none"}, ValueError, "reduction got 'none'; pass one of 'mean', 'sum'"),
        ({"reduction": "sum", "normalizer": 3.0}, ValueError, "normalizer divides a mean"),
        ({"hard_weight": 0.5}, ValueError, "labels got None with a hard_weight"),
        ({"hard_weight": -0.5}, ValueError, "hard_weight got -0.5; pass a finite number of at least 0"),
        ({"soft_weight": jnp.ones(3)}, ValueError, r"soft_weight got shape \(3,\)"),
        ({"teacher_hidden": jnp.ones((4, 5))}, ValueError, r"teacher_hidden got shape \(4, 5\) with student_hidden"),
        ({"teacher_kernel": jnp.ones((5, 8))}, ValueError, r"teacher_kernel got shape \(5, 8\), for a vocabulary of 8"),
        ({"teacher_kernel": jnp.ones((7, 5))}, ValueError, r"teacher_kernel got .* teacher_kernel_layout='vh'"),
        ({"student_kernel": jnp.ones((7, 4))}, ValueError, r"student_kernel got .* student_kernel_layout='vh'"),
        ({"student_kernel": jnp.ones((4, 7), "float16")}, TypeError, "student_kernel got dtype float16 with student_"),
        ({"teacher_hidden": jnp.ones((3, 5), "int32")}, TypeError, "teacher_hidden got dtype int32"),
        ({"student_bias": jnp.ones(6)}, ValueError, r"student_bias got shape \(6,\)"),
        ({"teacher_bias": jnp.ones(6)}, ValueError, r"teacher_bias got shape \(6,\)"),
        ({"teacher_logit_softcap": -1.0}, ValueError, "teacher_logit_softcap got -1.0"),
        ({"student_logit_scale": "2"}, TypeError, "student_logit_scale got str"),
        ({"teacher_kernel_layout": "vv"}, ValueError, "teacher_kernel_layout got 'vv'"),
        ({"where": jnp.ones(3)}, TypeError, "where got dtype float32"),
        ({"labels": jnp.ones(3)}, TypeError, "labels got dtype float32"),
        ({"weights": jnp.ones(4)}, ValueError, r"weights got shape \(4,\)"),
        ({"chunk_size": 0}, ValueError, "chunk_size got 0"),
        ({"teacher_adapter": None}, TypeError, "teacher_adapter is no option here; pass one of temperature, labels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        losses.fused_linear_jsd(**{**ONES, **changes})


def test_a_direction_there_is_not():
    with pytest.raises(ValueError, match="direction got 'both'; pass one of 'forward', 'reverse'"):
        losses.fused_linear_kl(*ONES.values(), direction="both")


def test_float64_for_one_of_two():
    with jax.enable_x64(True), pytest.raises(TypeError, match="teacher_hidden got dtype float64 with student_hidden"):
        losses.fused_linear_jsd(**{**ONES, "teacher_hidden": jnp.ones((3, 5), "float64")})
