"""Gradients as data: what is computed for which argument, under every transformation, and nothing else changed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.testing.oracle import ON_GPU, assert_rule_of_two, check, equations, exact, fused, make_problem, unfused
from jliger.testing.promotion import with_promotion

REDUCTIONS = ["mean", "none"]  # the two forms of the operation
NAMES = ("hidden", "kernel", "bias")
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(NAMES, size)]


def make(seed=0, reduction="mean", **changes):
    """A problem of two chunks with everything in it."""
    options = {"batch": (3, 5), "bias": "float32", "ignored": 0.2, "z_loss": 0.1, "label_smoothing": 0.1, **changes}
    return make_problem(seed, reduction=reduction, chunk_size=8, precision="highest", **options)


def loss_of(problem, implementation):
    """The loss times its cotangent, summed, as a function of inputs."""

    def loss(inputs):
        inputs = {**problem.inputs, **inputs}
        value = jliger.fused_linear_cross_entropy(
            inputs["hidden"],
            inputs["kernel"],
            problem.labels,
            bias=inputs.get("bias"),
            implementation=implementation,
            **problem.options,
        )
        return jnp.sum(value * problem.cotangent)

    return loss


def assert_close(result, expected):
    """Equal up to a few float32 roundings of terms of about 1, such as all here are sums of."""
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        little = 8 * np.finfo(np.float32).eps * max(np.abs(np.asarray(other)).max(), 1)
        np.testing.assert_allclose(one, other, rtol=0, atol=little)


def products(function, *args):
    """How many products a program has, and how many sums over its tokens."""
    result = list(equations(jax.make_jaxpr(function)(*args)))
    sums = [
        e
        for e in result
        if e.primitive.name == "reduce_sum" and e.invars[0].aval.ndim == 2 and e.params["axes"] == (0,)
    ]
    return sum(e.primitive.name == "dot_general" for e in result), len(sums)


# ---- cotangents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("factor", [0.0, -3.0, 65528.0])
def test_gradients_follow_the_cotangent(factor, reduction, implementation):
    problem = make(reduction=reduction)
    problem = problem.replace(cotangent=problem.cotangent * factor)
    result = check(problem, implementation)
    if factor == 0:
        assert not any(np.any(result[name]) for name in NAMES)


def test_a_cotangent_for_one_token_alone(implementation):
    # Its gradient is that token's own, and the first token's cotangent scales nothing else.
    problem = make(reduction="none", ignored=0.0)
    for token in [(0, 0), (2, 4)]:
        one = problem.replace(cotangent=jnp.zeros((3, 5)).at[token].set(2.0))
        result = check(one, implementation)
        assert np.any(result["hidden"][token])
        assert not np.any(np.delete(result["hidden"].reshape(15, -1), token[0] * 5 + token[1], axis=0))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_backward_pass_called_again_gives_the_same(reduction, implementation):
    problem = make(reduction=reduction)
    loss = loss_of(problem, implementation)
    value, pull_back = jax.vjp(loss, problem.inputs)
    first = pull_back(jnp.ones_like(value) * 3)
    second = pull_back(jnp.ones_like(value) * 3)
    doubled = pull_back(jnp.ones_like(value) * 6)
    for a, b, c in zip(*map(jax.tree.leaves, (first, second, doubled)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(2 * a, c)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inside_a_model_with_other_losses(reduction, implementation):
    problem = make(reduction=reduction)
    mix = jnp.asarray(np.random.default_rng(1).normal(size=(6, 6)), jnp.float32)

    def model(loss_fn, mix, inputs):
        hidden = jnp.tanh(inputs["hidden"] @ mix)
        losses = loss_fn(hidden, inputs["kernel"], problem.labels, bias=inputs["bias"], **problem.options)
        # The kernel is tied: its second use makes its gradient a sum. The sine makes cotangents differ.
        return jnp.sum(jnp.sin(losses) * problem.cotangent) + 1e-2 * jnp.sum(hidden @ inputs["kernel"])

    ours = functools.partial(jliger.fused_linear_cross_entropy, implementation=implementation)
    theirs = jliger.reference.fused_linear_cross_entropy
    with jax.default_matmul_precision("highest"):
        result, expected = (jax.grad(functools.partial(model, f), (0, 1))(mix, problem.inputs) for f in (ours, theirs))
    assert_close(result, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_derivatives_are_refused(reduction, implementation):
    problem = make(reduction=reduction)
    loss = loss_of(problem, implementation)

    def norm_of_gradient(inputs):
        return sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(jax.grad(loss)(inputs)))

    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(loss, (problem.inputs,), (problem.inputs,))
    with pytest.raises(NotImplementedError, match="differentiable once, in reverse mode"):
        jax.grad(norm_of_gradient)(problem.inputs)


@pytest.mark.parametrize("name", ["mean", "logprobs", "kl"])
def test_second_derivatives_in_forward_mode(name, implementation):
    random = np.random.default_rng(0)
    hidden, kernel, teacher = (random.normal(size=size) for size in ((3, 2), (2, 5), (2, 5)))
    labels = jnp.array([1, -100, 4])

    def loss(ops, hidden, kernel, **options):
        if name == "kl":
            return ops.fused_linear_kl(hidden, kernel, hidden, jnp.asarray(teacher, hidden.dtype), **options)
        if name == "logprobs":
            result = ops.linear_logprobs(hidden, kernel, labels, **options)
            return (result.logprobs**2 + result.entropy).sum()
        return ops.fused_linear_cross_entropy(hidden, kernel, labels, reduction=name, z_loss=0.1, **options) ** 2

    def ours(hidden, kernel):
        ops = jliger.losses if name == "kl" else jliger
        return loss(ops, hidden, kernel, implementation=implementation, precision="highest")

    primals = tuple(jnp.asarray(array, jnp.float32) for array in (hidden, kernel))

    if implementation == "triton":
        with pytest.raises(NotImplementedError, match="differentiable once, in reverse mode"):
            jax.hessian(ours, (0, 1))(*primals)
        return
    # A `vmap` of `jax.jvp` of `jax.grad`.
    result = jax.jit(jax.hessian(ours, (0, 1)))(*primals)
    with jax.enable_x64(True):
        primals = tuple(jnp.asarray(array, jnp.float64) for array in primals)
        expected = jax.jit(jax.hessian(functools.partial(loss, jliger.reference), (0, 1)))(*primals)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), result, expected)


# ---- what is computed for whom -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "reduction"),
    [
        # All three with both passes; the others alternate between the passes.
        pytest.param(names, reduction, marks=[] if (i + j) % 2 or len(names) == 3 else [pytest.mark.exhaustive])
        for i, names in enumerate(SUBSETS)
        for j, reduction in enumerate(REDUCTIONS)
    ],
    ids=str,
)
def test_frozen_arguments(names, reduction, implementation):
    problem = make(reduction=reduction)
    loss = loss_of(problem, implementation)
    trained = {name: problem.inputs[name] for name in names}
    result = jax.jit(jax.grad(loss))(trained)
    assert_rule_of_two(result, unfused(problem), {name: exact(problem)[name] for name in names})


# Products of one chunk: logits, twice in the recompute pass, and one for each gradient but the bias's.
@pytest.mark.parametrize(("reduction", "logits"), [("mean", 1), ("none", 2)])
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_nothing_is_computed_for_a_frozen_argument(names, reduction, logits, implementation):
    problem = make(reduction=reduction).replace(chunk_size=16)
    loss = loss_of(problem, implementation)
    result = products(jax.grad(loss), {name: problem.inputs[name] for name in names})
    assert result == (logits + ("hidden" in names) + ("kernel" in names), int("bias" in names))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_gradient_is_computed_without_differentiation(reduction, implementation):
    problem = make(reduction=reduction).replace(chunk_size=16)
    loss = loss_of(problem, implementation)
    assert products(loss, problem.inputs) == (1, 0)
    assert products(lambda inputs: loss(jax.lax.stop_gradient(inputs)), problem.inputs) == (1, 0)

    def beside_something_else(inputs, other):
        return loss(inputs) * other

    assert products(jax.grad(beside_something_else, argnums=1), problem.inputs, 2.0) == (1, 0)


@pytest.mark.parametrize("skipped", [None, 0.0])
def test_a_gradient_of_a_vmap_over_weights_alone(skipped):
    """Without gradients, nothing that `vmap` batches reaches the products."""
    problem = make(reduction="sum", bias=None, label_smoothing=0.0)

    def loss(hidden, weight, **options):
        weights = jnp.full(problem.labels.shape, weight)
        inputs = (problem.inputs | {"hidden": hidden}).values()
        options = problem.options | {"weights": weights, **options}
        return jliger.fused_linear_cross_entropy(*inputs, problem.labels, implementation="xla", **options)

    def of_both(hidden):
        return jax.vmap(lambda weight: loss(hidden, weight, skip_gradients_below=skipped))(jnp.array([0.5, 2.0])).sum()

    hidden = problem.inputs["hidden"]
    assert_close(jax.jit(jax.grad(of_both))(hidden), jax.grad(loss)(hidden, 2.5))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_integer_and_frozen_leaves_of_a_partial_gradient(reduction, implementation):
    # stop_gradient on one argument inside the loss freezes it as well.
    problem = make(reduction=reduction).replace(chunk_size=16)
    loss = loss_of(problem, implementation)

    def with_frozen_hidden(inputs):
        return loss({**inputs, "hidden": jax.lax.stop_gradient(inputs["hidden"])})

    assert (
        products(jax.grad(with_frozen_hidden), problem.inputs)[0]
        == products(jax.grad(loss), {name: problem.inputs[name] for name in ("kernel", "bias")})[0]
    )
    grads = jax.grad(with_frozen_hidden)(problem.inputs)
    assert not np.any(grads["hidden"])
    assert np.any(grads["kernel"])


# ---- memory --------------------------------------------------------------------------------------------------


def temporary_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("reduction", "chunk_size"), [("mean", 64), ("none", 128)])
def test_no_more_logits_than_a_chunk(reduction, chunk_size, implementation):
    if implementation == "triton" and not ON_GPU:
        pytest.skip("the interpreter's memory is not XLA's")
    tokens, hidden_size, vocab = 32768, 32, 8192
    hidden = jax.ShapeDtypeStruct((tokens, hidden_size), jnp.float32)
    kernel = jax.ShapeDtypeStruct((hidden_size, vocab), jnp.float32)
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def loss(hidden, kernel, labels):
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, labels, reduction=reduction, chunk_size=chunk_size, implementation=implementation
        ).sum()

    # Logits, their gradients and what XLA makes of them in between; a few copies of hidden, and of the kernel.
    arrays = 4 * (tokens * hidden_size + hidden_size * vocab)
    chunk_of_logits = 4 * chunk_size * vocab
    # On a GPU products have a workspace as well.
    allowed = 6 * chunk_of_logits + 4 * arrays + (2**26 if ON_GPU else 2**20)
    assert allowed < 4 * tokens * vocab / 4
    assert temporary_bytes(loss, hidden, kernel, labels) <= allowed - 2 * chunk_of_logits
    assert temporary_bytes(jax.value_and_grad(loss, (0, 1)), hidden, kernel, labels) <= allowed


# ---- transformations -----------------------------------------------------------------------------------------


def transformed(loss):
    """Ways to the same gradients."""
    policies = jax.checkpoint_policies
    return {
        "value_and_grad": lambda inputs: jax.value_and_grad(loss)(inputs)[1],
        "jit of grad": jax.jit(jax.grad(loss)),
        "grad of jit": jax.grad(jax.jit(loss)),
        "vjp": lambda inputs: jax.vjp(loss, inputs)[1](jnp.ones(()))[0],
        "vjp of jit": lambda inputs: jax.vjp(jax.jit(loss), inputs)[1](jnp.ones(()))[0],
        "remat": jax.jit(jax.grad(jax.checkpoint(loss))),
        "remat, nothing saved": jax.jit(jax.grad(jax.checkpoint(loss, policy=policies.nothing_saveable))),
        "remat, everything saved": jax.jit(jax.grad(jax.checkpoint(loss, policy=policies.everything_saveable))),
        "remat, products saved": jax.grad(jax.checkpoint(loss, policy=policies.dots_saveable)),
        "remat of remat": jax.grad(jax.checkpoint(jax.checkpoint(loss))),
        "cond": jax.jit(
            jax.grad(lambda inputs: jax.lax.cond(jnp.any(inputs["bias"] < 9), loss, lambda _: 0.0, inputs))
        ),
        "scan": jax.jit(
            jax.grad(lambda inputs: jax.lax.scan(lambda c, _: (c + loss(inputs) / 2, None), 0.0, length=2)[0])
        ),
        "remat in scan": jax.jit(
            jax.grad(
                lambda inputs: jax.lax.scan(jax.checkpoint(lambda c, _: (c + loss(inputs) / 2, None)), 0.0, length=2)[0]
            )
        ),
        "twice in one program": jax.jit(lambda inputs: jax.tree.map(lambda a, b: (a + b) / 2, *_twice(loss, inputs))),
    }


def _twice(loss, inputs):
    return jax.grad(loss)(inputs), jax.grad(lambda inputs: loss(inputs) * 1.0)(inputs)


@pytest.mark.parametrize(
    ("reduction", "bias"),
    [("mean", "float32"), ("none", "float32"), pytest.param("mean", None, marks=pytest.mark.exhaustive)],
)
def test_every_transformation_gives_the_same_gradients(reduction, bias, implementation):
    problem = make(reduction=reduction, bias=bias or "float32")
    if bias is None:
        problem = problem.replace(inputs={name: problem.inputs[name] for name in ("hidden", "kernel")})
    loss = loss_of(problem, implementation)
    expected = {name: value for name, value in fused(problem, implementation).items() if name in problem.inputs}
    ways = transformed(loss)
    if bias is None:
        del ways["cond"]
    for way, gradient in ways.items():
        result = gradient(problem.inputs)
        for name, value in expected.items():
            # A few float32 roundings of terms of about 1.
            np.testing.assert_allclose(result[name], value, rtol=0, atol=1e-6, err_msg=f"{name} {way}")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_op_by_op_gives_the_same_gradients(reduction, implementation):
    problem = make(reduction=reduction)
    expected = fused(problem, implementation)
    with jax.disable_jit(), jax.debug_nans(True):
        result = jax.grad(loss_of(problem, implementation))(problem.inputs)
    assert_close(result, {name: expected[name] for name in result})


@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.exhaustive)])
def test_remat_when_other_arguments_are_frozen_each_time(reduction, implementation):
    # One checkpointed function, traced once for shapes that stay the same, differentiated in this and in that.
    problem = make(reduction=reduction)
    loss = loss_of(problem, implementation)
    expected = jax.grad(loss)(problem.inputs)
    rematted = jax.checkpoint(jax.jit(loss))
    for names in (*SUBSETS, *SUBSETS[::-1]):

        def of_some(some):
            return rematted({**problem.inputs, **some})

        result = jax.grad(of_some)({name: problem.inputs[name] for name in names})
        assert_close(result, {name: expected[name] for name in names})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_accumulated_over_microbatches(reduction, implementation):
    problem = make(reduction=reduction, batch=(4, 5)).replace(cotangent=jnp.ones(()), reduction="sum")
    count = jnp.sum(problem.labels != -100)

    def part_loss(kernel, bias, hidden, labels):
        options = {**problem.options, "reduction": "sum" if reduction == "mean" else "none"}
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, labels, bias=bias, implementation=implementation, **options
        ).sum()

    @jax.jit
    def accumulated(inputs, labels):
        def step(sums, part):
            grads = jax.grad(part_loss, (0, 1))(inputs["kernel"], inputs["bias"], *part)
            return jax.tree.map(jnp.add, sums, grads), None

        zeros = jax.tree.map(jnp.zeros_like, (inputs["kernel"], inputs["bias"]))
        sums, _ = jax.lax.scan(step, zeros, (inputs["hidden"], labels))
        return jax.tree.map(with_promotion(lambda grad: grad / count), sums)

    whole = unfused(problem.replace(reduction="mean"))
    assert_close(accumulated(problem.inputs, problem.labels), (whole["kernel"], whole["bias"]))


def test_arguments_may_be_donated(implementation):
    # The step's results may take the place of its arguments, which nothing may then still read.
    problem = make(dtype="float32")
    grads = jax.grad(loss_of(problem, implementation))(problem.inputs)
    expected = jax.tree.map(lambda value, grad: value - 0.1 * grad, problem.inputs, grads)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(inputs):
        grads = jax.grad(loss_of(problem.replace(inputs={}), implementation))(inputs)
        return jax.tree.map(lambda value, grad: value - 0.1 * grad, inputs, grads)

    assert_close(step(jax.tree.map(jnp.copy, problem.inputs)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equal_to_the_bit_from_run_to_run(reduction, dtype, implementation):
    problem = make(reduction=reduction, dtype=dtype, batch=(40,))
    gradient = jax.jit(jax.value_and_grad(loss_of(problem, implementation)))
    first = jax.tree.leaves(gradient(problem.inputs))
    for _ in range(3):
        for one, other in zip(first, jax.tree.leaves(gradient(problem.inputs)), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_arguments_are_as_they_were(reduction, implementation):
    problem = make(reduction=reduction, where="some", weights=True, class_weights=True)
    arrays = (problem.inputs, problem.labels, [v for v in problem.options.values() if isinstance(v, jax.Array)])
    before = jax.tree.map(np.array, arrays)
    fused(problem, implementation)
    jax.grad(loss_of(problem, implementation))(problem.inputs)
    jax.tree.map(np.testing.assert_array_equal, arrays, before)
