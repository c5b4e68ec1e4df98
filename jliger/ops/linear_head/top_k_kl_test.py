"""Distillation from a teacher's top k, held to the reference by the rule of two, and to values worked independently."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jliger
from jliger import losses
from jliger.testing.oracle import INTERPRETED, assert_rule_of_two, equations, every_pair

BATCH, HIDDEN, VOCAB, K = (3, 5), 6, 43, 5
ARRAYS = ("where", "weights", "labels")


def make_problem(seed=0, dtype="float32", kernel_dtype="float32", mass=0.8, vocab=VOCAB, **options):
    """Differentiable inputs, the teacher's columns, and options, with arrays in place of True.

    Some ids are absent, some equal. Labels are sometimes the teacher's columns.
    """
    if INTERPRETED and "bfloat16" in (dtype, kernel_dtype):
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(HIDDEN, vocab))
    inputs = {
        "hidden": jnp.asarray(random.normal(size=(*BATCH, HIDDEN)), dtype),
        "kernel": jnp.asarray(kernel.T if options.get("kernel_layout") == "vh" else kernel, kernel_dtype),
    }
    if options.pop("bias", False):
        inputs["bias"] = jnp.asarray(random.normal(size=vocab), jnp.float32)
    ids = random.integers(0, options.get("vocab_size") or vocab, (*BATCH, K))
    ids[..., 0] = np.where(random.random(BATCH) < 0.3, -1, ids[..., 0])
    ids[..., 1] = np.where(random.random(BATCH) < 0.3, ids[..., 2], ids[..., 1])
    probabilities = mass * random.dirichlet(np.ones(K), BATCH)
    teacher = jnp.asarray(ids, jnp.int32), jnp.asarray(np.log(probabilities), jnp.float32)
    if options.get("hard_weight"):
        labels = np.where(random.random(BATCH) < 0.5, ids[..., 2], random.integers(0, 40, BATCH))
        options["labels"] = jnp.asarray(np.where(random.random(BATCH) < 0.2, -100, labels), jnp.int32)
    if options.pop("where", False):
        options["where"] = jnp.asarray(random.random(BATCH) < 0.6)
    if options.pop("weights", False):
        options["weights"] = jnp.asarray(random.uniform(0.1, 2, BATCH), jnp.float32)
    return inputs, teacher, options


def run(function, inputs, teacher, options, factor=2.0):
    """Loss, metrics, and gradients of every input, under one jit."""
    static = {name: value for name, value in options.items() if name not in ARRAYS}
    arrays = {name: options[name] for name in ARRAYS if name in options}

    @jax.jit
    def results(inputs, teacher, arrays):
        def loss(inputs):
            rest = {name: value for name, value in inputs.items() if name not in ("hidden", "kernel")}
            value, metrics = function(
                inputs["hidden"], inputs["kernel"], *teacher, **rest, **arrays, **static, return_metrics=True
            )
            return factor * value, (value, metrics)

        grads, (value, metrics) = jax.grad(loss, has_aux=True)(inputs)
        named = {"loss": value, **grads, **metrics._asdict()}
        return {name: array for name, array in named.items() if array is not None}

    return results(inputs, teacher, arrays)


def exact(inputs, teacher, options):
    """The results of plain JAX in float64."""
    options = {name: value for name, value in options.items() if name not in ("precision", "chunk_size")}

    def wide(array):
        is_floating = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jnp.floating)
        return jnp.asarray(np.asarray(array), jnp.float64) if is_floating else array

    with jax.enable_x64(True):
        arguments = jax.tree.map(wide, (inputs, teacher, options))
        found = run(jliger.reference.fused_linear_top_k_kl, *arguments)
        return {name: np.asarray(value) for name, value in found.items()}


fused = losses.fused_linear_top_k_kl


def check(inputs, teacher, options, implementation, what=""):
    """Holds the fused loss to the rule of two; returns its results."""
    options = {"precision": "highest", **options}
    ours = run(fused, inputs, teacher, {**options, "implementation": implementation})
    theirs = run(jliger.reference.fused_linear_top_k_kl, inputs, teacher, options)
    truth = exact(inputs, teacher, options)
    numbers = [{k: v for k, v in one.items() if "predictions" not in k} for one in (ours, theirs, truth)]
    # Terms of both signs add up to the divergence: a rounding of each is allowed.
    tiny = 4 * np.finfo(np.float32).eps
    more = {"loss": float(tiny), "divergence": float(tiny)}
    if "bias" in inputs:
        # The reference adds the bias, and sums its gradient, in float32; here logit gradients are in hidden's dtype.
        half_unit = float(jnp.finfo(inputs["hidden"].dtype).eps) / 2
        more["bias"] = half_unit * float(np.abs(truth["bias"]).max())
    assert_rule_of_two(*numbers, what, more)
    for name in ("predictions", "teacher_predictions"):
        np.testing.assert_array_equal(ours[name], theirs[name])
        assert ours[name].dtype == jnp.int32
    for name, value in inputs.items():
        assert ours[name].dtype == value.dtype
    return ours


OPTIONS = {
    "kind": ["vocab", "remainder", "top_k"],
    "temperature": [1.0, 2.5],
    "hard_weight": [0.0, 0.3],
    "dtypes": [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")],
    "bias": [False, True],
    "where": [False, True],
    "weights": [False, True],
    "reduction": ["mean", "sum"],
    "kernel_layout": ["hv", "vh"],
    "logit_softcap": [None, 2.0],
    "logit_scale": [1.0, -0.5],
    "chunk_size": [None, 8],
    "vocab_size": [None, 41],
}


def kind_of(kind):
    return {"normalize": "top_k" if kind == "top_k" else "vocab", "remainder": kind == "remainder"}


BRANCHES = [
    pytest.param(branch, marks=[pytest.mark.exhaustive] if number else [])
    for number, branch in enumerate(every_pair(OPTIONS))
]


@pytest.mark.parametrize("options", BRANCHES, ids=itertools.count())
def test_every_pair_of_options(options, implementation):
    options = dict(options)
    what = str(options)
    options |= kind_of(options.pop("kind"))
    options["soft_weight"] = 0.7
    check(*make_problem(1, *options.pop("dtypes"), **options), implementation, what)


# ---- identities ------------------------------------------------------------------------------------------------


def test_one_certain_column_is_the_cross_entropy(implementation):
    inputs, (ids, _), _ = make_problem(2, bias=True)
    labels, options = jnp.maximum(ids[..., :1], 0), {"implementation": implementation, "precision": "highest"}
    found = run(fused, inputs, (labels, jnp.zeros(labels.shape)), options, factor=1.0)

    def loss(inputs):
        hidden, kernel, bias = (inputs[name] for name in ("hidden", "kernel", "bias"))
        return jliger.fused_linear_cross_entropy(hidden, kernel, labels[..., 0], bias=bias, **options)

    expected, grads = jax.jit(jax.value_and_grad(loss))(inputs)
    np.testing.assert_allclose(found["loss"], expected, rtol=4e-7)
    for name, grad in grads.items():
        np.testing.assert_allclose(found[name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["vocab", "remainder", "top_k"])
def test_all_columns_are_the_whole_teacher(kind, implementation):
    # The sum of all probabilities is 1 up to rounding; there is no other column that the rest could be of.
    inputs, _, _ = make_problem(3)
    random = np.random.default_rng(0)
    teacher = [jnp.asarray(random.normal(size=size), jnp.float32) for size in ((*BATCH, 4), (4, VOCAB))]
    options = {"temperature": 2.0, "implementation": implementation, "precision": "highest"}
    tau = 1.0 if kind == "top_k" else 2.0
    logprobs = jax.nn.log_softmax((teacher[0] @ teacher[1]) / tau)
    ids = jnp.broadcast_to(jnp.arange(VOCAB), logprobs.shape)
    found = run(fused, inputs, (ids, logprobs), {**options, **kind_of(kind)}, factor=1.0)

    def loss(inputs):
        return losses.fused_linear_kl(inputs["hidden"], inputs["kernel"], *teacher, **options)

    expected, grads = jax.jit(jax.value_and_grad(loss))(inputs)
    np.testing.assert_allclose(found["loss"], expected, rtol=4e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-6)


def test_values_by_hand(implementation):
    # Logits log(8, 4, 2, 1, 1): probabilities 1/2, 1/4, 1/8, 1/16, 1/16. The teacher names columns 1 and 2.
    z = jnp.log(jnp.array([[8.0, 4.0, 2.0, 1.0, 1.0]]))
    ids, r = jnp.array([[2, 1]]), np.array([0.5, 0.25])
    p = np.array([1 / 8, 1 / 4])

    def loss(z, **options):
        return fused(z, jnp.eye(5), ids, jnp.log(jnp.asarray(r[None], jnp.float32)), implementation=implementation,
                     precision="highest", **options)  # fmt: skip

    vocab = (r * np.log(r / p)).sum()
    np.testing.assert_allclose(loss(z), vocab, rtol=1e-6)
    np.testing.assert_allclose(loss(z, remainder=True), vocab + 0.25 * np.log(0.25 / (5 / 8)), rtol=1e-5)
    both = r / r.sum(), p / p.sum()
    np.testing.assert_allclose(loss(z, normalize="top_k"), (both[0] * np.log(both[0] / both[1])).sum(), rtol=1e-6)
    # p · (1 − ρ / P) in the other columns: what the student gives them is to shrink to ρ, in the same proportions.
    grad = jax.grad(functools.partial(loss, remainder=True))(z)
    others = np.array([1 / 2, 1 / 16, 1 / 16]) * (1 - 0.25 / (5 / 8))
    np.testing.assert_allclose(grad[0], [others[0], 1 / 4 - 0.25, 1 / 8 - 0.5, *others[1:]], atol=1e-6)


# ---- other libraries' conventions, computed as they do ---------------------------------------------------------


@pytest.mark.parametrize("saved", ["logits", pytest.param("logprobs", marks=pytest.mark.exhaustive)])
def test_the_top_k_loss_of_maxtext_and_tunix(saved, implementation):
    # Both take the softmax of the teacher's k largest logits over the temperature, and that of the student's logits in
    # the same columns; the divergence is multiplied by the temperature's square, and mixed with the cross entropy.
    # MaxText keeps logits on disk, and leaves out padding; tunix takes the mean over all tokens.
    inputs, _, _ = make_problem(4)
    random = np.random.default_rng(1)
    tau, alpha, k = 3.0, 0.4, 4
    labels = jnp.asarray(random.integers(0, VOCAB, BATCH), jnp.int32).at[1, 2:].set(-100)
    kept, ids = jax.lax.top_k(jnp.asarray(random.normal(size=(*BATCH, VOCAB)), jnp.float32) * 2, k)
    kept = kept if saved == "logits" else kept - 5.0

    def theirs(inputs, kept):
        z = inputs["hidden"] @ inputs["kernel"]
        log_p = jax.nn.log_softmax(jnp.take_along_axis(z, ids, axis=-1) / tau)
        soft = optax.losses.kl_divergence(log_p, jax.nn.softmax(kept / tau))
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(labels, 0))
        mask = labels != -100
        return jnp.where(mask, alpha * tau**2 * soft + (1 - alpha) * hard, 0).sum() / mask.sum()

    def ours(inputs, kept):
        options = {"temperature": tau, "soft_weight": alpha * tau**2, "hard_weight": 1 - alpha, "normalize": "top_k"}
        return fused(inputs["hidden"], inputs["kernel"], ids, kept, labels=labels, implementation=implementation,
                     precision="highest", **options)  # fmt: skip

    found, grads = jax.value_and_grad(ours)(inputs, kept)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda array: jnp.asarray(np.asarray(array), jnp.float64), (inputs, kept))
        expected, wide_grads = jax.value_and_grad(theirs)(*wide)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, wide_grads[name], rtol=1e-4, atol=1e-6)


# ---- what counts, and what is wrong ----------------------------------------------------------------------------


def test_an_id_out_of_range_poisons_its_token(implementation):
    inputs, (ids, logprobs), options = make_problem(5, where=True)
    where = options["where"].at[1, 2].set(True).at[0, 0].set(False)
    # Of a token that does not count, nothing matters.
    ids = ids.at[0, 0].set(10**6)
    logprobs, hidden = logprobs.at[0, 0].set(jnp.nan), inputs["hidden"].at[0, 0].set(jnp.nan)
    options = {"where": where, "implementation": implementation}
    compiled = jax.jit(lambda hidden, ids: jax.value_and_grad(fused, (0, 1))(
        hidden, inputs["kernel"], ids, logprobs, **options))  # fmt: skip
    loss, grads = compiled(hidden, ids)
    assert np.isfinite(loss)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert not np.any(grads[0][~where])
    loss, (of_hidden, of_kernel) = compiled(hidden, ids.at[1, 2, 3].set(VOCAB))
    assert np.isnan(loss)
    assert np.isnan(of_hidden[1, 2]).all()
    assert np.isnan(of_kernel).all()
    assert np.isfinite(np.delete(of_hidden.reshape(15, -1), 7, axis=0)).all()


def test_an_only_id_that_is_out_of_range_poisons_all_gradients(implementation):
    hidden, kernel = jnp.ones((3, 4)), jnp.ones((4, 9))
    ids, logprobs = jnp.array([[1], [9], [2]]), jnp.log(jnp.full((3, 1), 0.4))
    options = {"normalize": "top_k", "implementation": implementation}
    loss, (of_hidden, of_kernel) = jax.value_and_grad(fused, (0, 1))(hidden, kernel, ids, logprobs, **options)
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(of_hidden), [[False] * 4, [True] * 4, [False] * 4])
    assert np.isnan(of_kernel).all()


def test_a_float16_product_that_overflows_is_one_of_the_other_columns(implementation):
    hidden = jnp.full((2, 1), 300, jnp.float16)
    kernel = jnp.asarray([[-300, 1e-3, 2e-3, -300, 0]], jnp.float16)
    ids, logprobs = jnp.array([[1], [0]]), jnp.log(jnp.full((2, 1), 0.5))
    loss = fused(hidden, kernel, ids, logprobs, remainder=True, logit_softcap=2.0, implementation=implementation)
    logits = 2 * np.tanh(np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64) / 2)
    p = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), np.asarray(ids), 1)
    np.testing.assert_allclose(loss, np.mean(np.log(0.5 / p) / 2 + np.log(0.5 / (1 - p)) / 2), rtol=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["vocab", "remainder", "top_k"])
def test_a_token_without_columns_and_columns_without_probability(kind, implementation):
    inputs, (ids, logprobs), _ = make_problem(6)
    ids = ids.at[0, 0].set(-1)  # nothing is known
    logprobs = logprobs.at[0, 1].set(-jnp.inf)  # nothing is likely
    # The student excludes a column that the teacher does not name, and all that the teacher's other columns could be.
    bias = jnp.zeros(VOCAB).at[jnp.setdiff1d(jnp.arange(VOCAB), ids[0, 2], size=2)].set(-jnp.inf)
    found = run(fused, {**inputs, "bias": bias}, (ids, logprobs), {"implementation": implementation, **kind_of(kind)})
    expected = exact({**inputs, "bias": bias}, (ids, logprobs), kind_of(kind))
    for name in ("loss", "hidden", "kernel", "bias"):
        if not (name == "loss" and np.isinf(expected["loss"])):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-6, err_msg=name)


def test_a_student_that_leaves_nothing_to_the_others(implementation):
    # All others together have a probability of e⁻⁶⁰: 1 − Σ p would be 0, and ρ / P too large for a product with 0.
    z = jnp.full((1, 8), -60.0).at[0, 3].set(0.0)
    logprobs = jnp.log(jnp.array([[0.75]]))

    def loss(z):
        return fused(z, jnp.eye(8), jnp.array([[3]]), logprobs, remainder=True, implementation=implementation,
                     precision="highest")  # fmt: skip

    value, grad = jax.value_and_grad(loss)(z)
    np.testing.assert_allclose(value, 0.75 * np.log(0.75) + 0.25 * (np.log(0.25 / 7) + 60), rtol=1e-6)
    expected = np.full(8, -0.25 / 7)
    expected[3] = 0.25
    np.testing.assert_allclose(grad[0], expected, rtol=1e-6)


# ---- gradients -------------------------------------------------------------------------------------------------


def num_products(function, *args):
    return sum(e.primitive.name == "dot_general" for e in equations(jax.make_jaxpr(function)(*args)))


def test_nothing_is_computed_that_is_not_asked_for(implementation):
    inputs, teacher, _ = make_problem(7)

    def loss(hidden, kernel):
        return fused(hidden, kernel, *teacher, implementation=implementation)

    arrays = inputs["hidden"], inputs["kernel"]
    assert num_products(loss, *arrays) == 1
    assert num_products(jax.grad(loss), *arrays) == num_products(jax.grad(loss, 1), *arrays) == 2
    assert num_products(jax.grad(loss, (0, 1)), *arrays) == 3


@pytest.mark.exhaustive
def test_under_vmap_and_remat_with_an_adapter(implementation):
    # Each sequence by itself, as one mean of means; under checkpoint the gradients are those of one pass.
    inputs, teacher, _ = make_problem(8)
    hidden, kernel = inputs["hidden"], inputs["kernel"]
    sides = jnp.ones((HIDDEN, 2)) / 3, jnp.linspace(-1, 1, 2 * VOCAB).reshape(2, VOCAB)
    options = {"remainder": True, "implementation": implementation, "precision": "highest"}

    def one(hidden, ids, logprobs, sides):
        return fused(hidden, kernel, ids, logprobs, adapter=jliger.LinearAdapter(*sides, 0.5), **options)

    @jax.jit
    def batched(hidden, sides):
        return jax.checkpoint(jax.vmap(one, (0, 0, 0, None)))(hidden, *teacher, sides).mean()

    found, grads = jax.value_and_grad(batched, (0, 1))(hidden, sides)
    merged = kernel + 0.5 * sides[0] @ sides[1]
    expected, of_hidden = jax.value_and_grad(jliger.reference.fused_linear_top_k_kl)(
        hidden, merged, *teacher, remainder=True, precision="highest"
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(grads[0], of_hidden, rtol=1e-4, atol=1e-6)
    assert np.any(grads[1][0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["vocab", "remainder", "top_k"])
def test_float64(kind):
    options = {**kind_of(kind), "hard_weight": 0.2, "temperature": 2.0}
    inputs, teacher, options = make_problem(9, bias=True, chunk_size=8, **options)
    expected = exact(inputs, teacher, options)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda array: jnp.asarray(np.asarray(array), jnp.float64), inputs)
        found = run(fused, wide, teacher, {**options, "implementation": "xla"})
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-14, err_msg=name)


def test_more_columns_than_the_kernels_take():
    inputs, _, _ = make_problem()
    teacher = jnp.full((*BATCH, 4097), -1), jnp.zeros((*BATCH, 4097))
    with jliger.compute_capability(90):
        with pytest.raises(ValueError, match="teacher_ids got 4097 columns for each token"):
            fused(*inputs.values(), *teacher, implementation="triton")
        jax.eval_shape(functools.partial(fused, *inputs.values()), *teacher)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"normalize": "k"}, ValueError, "normalize got 'k'"),
        ({"remainder": "no"}, TypeError, "remainder got 'no'; pass True or False"),
        ({"normalize": "top_k", "remainder": True}, ValueError, "remainder got True with normalize='top_k'"),
        ({"temperature": 0}, ValueError, "temperature got 0"),
        ({"temperature": jnp.ones(())}, TypeError, "temperature"),
        ({"hard_weight": 0.5}, ValueError, "labels got None with a hard_weight"),
        ({"reduction": "none"}, ValueError, "reduction got 'none'"),
        ({"label_smoothing": 0.1}, TypeError, "label_smoothing is no option"),
        ({"teacher_ids": jnp.zeros((*BATCH, K))}, TypeError, "teacher_ids got dtype float32; pass integers"),
        ({"teacher_ids": jnp.zeros(BATCH, int)}, ValueError, r"teacher_ids got shape \(3, 5\)"),
        ({"teacher_logprobs": jnp.zeros((*BATCH, K + 1))}, ValueError, r"teacher_logprobs got shape \(3, 5, 6\)"),
        ({"teacher_logprobs": jnp.zeros((*BATCH, K), int)}, TypeError, "teacher_logprobs got dtype int"),
    ],
)
def test_refuses(changes, error, match):
    inputs, (ids, logprobs), _ = make_problem()
    arguments = {**inputs, "teacher_ids": ids, "teacher_logprobs": logprobs, **changes}
    with pytest.raises(error, match=match):
        fused(**arguments)
