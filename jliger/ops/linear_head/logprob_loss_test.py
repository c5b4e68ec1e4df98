"""`fused_linear_loss`: values, auxiliary results and gradients against full logits; what is and is not computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.ops.linear_head import logprob_loss
from jliger.ops.logits import xla
from jliger.testing.oracle import INTERPRETED, equations
from jliger.testing.unit_losses import check, fused, make, reference_loss, row_loss, token_loss, values_and_grads

EXACT = {"precision": "highest"}


@pytest.mark.parametrize(
    ("shape", "chunk_size", "options"),
    [
        ((3, 5), 4, {"rank": 2}),
        ((11,), None, {"kernel_layout": "vh", "temperature": 0.7}),
        ((1,), 8, {"logit_softcap": 2.0, "logit_scale": 0.6}),
        pytest.param((), None, {}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_tokens(shape, chunk_size, options, implementation):
    options = dict(options)
    inputs, labels, args, where = make(shape, "tokens", rank=options.pop("rank", 0))
    if options.get("kernel_layout") == "vh":
        inputs["kernel"] = inputs["kernel"].T
    options |= {"where": where, "chunk_size": chunk_size, **EXACT}
    check(token_loss, inputs, labels, args, units="tokens", implementation=implementation, **options)


@pytest.mark.parametrize(
    ("shape", "chunk_size"),
    # Several rows per chunk; one longer than a chunk; pairs; rows of one token; a single row.
    [
        pytest.param((7, 5), 12, marks=pytest.mark.exhaustive),
        ((4, 5), 3),
        ((5, 2, 3), None),
        pytest.param((6,), 4, marks=pytest.mark.exhaustive),
        pytest.param((1, 4), None, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_rows(shape, chunk_size, implementation):
    inputs, labels, args, where = make(shape, "rows")
    options = {"where": where, "chunk_size": chunk_size, **EXACT}
    check(row_loss, inputs, labels, args, units="rows", implementation=implementation, **options)


@pytest.mark.skipif(INTERPRETED, reason="many tokens, of which the kernels know nothing new")
def test_chunks_of_several_sizes(implementation):
    inputs, labels, args, _ = make((40, 130), "rows", features=2, vocab=3)
    # From few tokens a row to all of them: chunks of all four sizes, and with the most rows.
    counted = np.repeat([0, 1, 30, 60, 130], 8)
    where = jnp.asarray(np.arange(130) < counted[:, None])
    options = {"where": where, "chunk_size": 1300, **EXACT}
    check(row_loss, inputs, labels, args, units="rows", implementation=implementation, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.exhaustive)])
def test_low_precision(dtype, implementation):
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    inputs, labels, args, where = make((40,), "tokens", dtype, features=24, vocab=33)
    check(token_loss, inputs, labels, args, units="tokens", implementation=implementation, where=where, chunk_size=16)


def test_small_losses_in_float16(implementation):
    """Each token's gradient is kept in units of its own coefficient, so that none underflows."""
    inputs, labels, _, _ = make((6,), "tokens", "float16")
    sizes = jnp.asarray([1e-12, 1.0, 1e-9, 0.0, 1e-6, 1e-11])

    def scaled(result, size):
        return size * result.logprobs**2

    def grads(sizes, factor):
        def loss(hidden, kernel):
            return factor * jliger.fused_linear_loss(
                scaled, hidden, kernel, labels, (sizes,), units="tokens", chunk_size=4, implementation=implementation
            )

        return jax.grad(loss, (0, 1))(inputs["hidden"], inputs["kernel"])

    alone = grads(jnp.where(sizes == 0, 0.0, 1.0), 1.0)[0].astype(jnp.float32)
    hidden = grads(sizes[jnp.array([0, 2, 2, 3, 2, 0])], 1e9)[0].astype(jnp.float32)
    expected = alone * 1e9 * sizes[jnp.array([0, 2, 2, 3, 2, 0])][:, None]
    np.testing.assert_allclose(hidden, expected, rtol=3e-3, atol=1e-4)
    # The kernel's gradient, of tokens that are all small.
    np.testing.assert_allclose(
        grads(jnp.full((6,), 1e-12), 1e12)[1], grads(jnp.ones((6,)), 1.0)[1], rtol=2e-3, atol=1e-3
    )


def test_nothing_counts(implementation):
    inputs, labels, args, _ = make((3, 4), "rows")
    where = jnp.zeros((3, 4), bool)
    inputs["hidden"] = jnp.full_like(inputs["hidden"], jnp.nan)
    args = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), args)
    result = values_and_grads(
        fused, row_loss, inputs, labels, args, units="rows", where=where, implementation=implementation
    )
    for value in result.values():
        np.testing.assert_array_equal(value, np.zeros_like(value))


def test_a_label_out_of_range_poisons(implementation):
    inputs, labels, args, _ = make((6,), "tokens")
    labels = labels.at[2].set(99)
    result = values_and_grads(fused, token_loss, inputs, labels, args, units="tokens", implementation=implementation)
    assert np.isnan(result["loss"])
    assert np.isnan(result["d kernel"]).any()
    assert np.isnan(result["d hidden"]).all(axis=1).tolist() == [False, False, True, False, False, False]


def test_closed_over_arrays(implementation):
    """Floats, integers and bools, traced and not; under jit, vmap and remat."""
    inputs, labels, args, where = make((4, 3), "rows")
    table = np.arange(3.0, dtype=np.float32)

    def value_and_grad(function, factor, index, flag):
        def loss_fn(result, weight, more):
            loss, aux = row_loss(result, weight, more)
            return jnp.where(flag, factor * loss, 0.0) + table[1] * result.logprobs[index], aux

        @jax.checkpoint
        def loss(hidden):
            return function(loss_fn, hidden, inputs["kernel"], labels, args, units="rows", where=where)[0]

        return jax.value_and_grad(loss)(inputs["hidden"])

    factors, indices, flag = jnp.array([0.5, 2.0]), jnp.array([1, 2]), jnp.array(True)
    ours = functools.partial(fused, implementation=implementation, **EXACT)

    @jax.jit
    def mapped(factors, indices, flag):
        return jax.vmap(lambda factor, index: value_and_grad(ours, factor, index, flag))(factors, indices)

    values, grads = mapped(factors, indices, flag)
    for index in range(2):
        theirs = functools.partial(reference_loss, **EXACT)
        value, grad = value_and_grad(theirs, factors[index], indices[index], flag)
        np.testing.assert_allclose(values[index], value, rtol=1e-5)
        np.testing.assert_allclose(grads[index], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batched_kernel", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_vmap(batched_kernel, implementation):
    inputs, labels, args, where = make((2, 4, 3), "tokens")
    args = args[0][..., 0], args[1]  # one number and a row's numbers, `[2, 4]` and `[2, 4, 3]`
    args = args[0], jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 3)), jnp.float32)
    kernels = jnp.stack([inputs["kernel"], inputs["kernel"] / 2]) if batched_kernel else inputs["kernel"]

    def grads(function, hidden, kernel, labels, weight, more, where):
        def loss(hidden, kernel):
            return function(row_loss, hidden, kernel, labels, (weight, more), units="rows", where=where)[0]

        wanted = (0, 1) if batched_kernel else 0
        return jax.value_and_grad(loss, wanted)(hidden, kernel)

    in_axes = (0, 0 if batched_kernel else None, 0, 0, 0, 0)
    arrays = (inputs["hidden"], kernels, labels, *args, where)
    ours = functools.partial(grads, functools.partial(fused, implementation=implementation, chunk_size=6, **EXACT))
    found = jax.jit(jax.vmap(ours, in_axes))(*arrays)
    theirs = functools.partial(grads, functools.partial(reference_loss, **EXACT))
    expected = jax.vmap(theirs, in_axes)(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def products(function, *arrays):
    return sum(equation.primitive.name == "dot_general" for equation in equations(jax.make_jaxpr(function)(*arrays)))


def test_number_of_products():
    inputs, labels, args, _ = make((5,), "tokens", rank=2)

    def loss(hidden, kernel, adapter=None):
        options = {"units": "tokens", "implementation": "xla", "adapter": adapter}
        return fused(token_loss, hidden, kernel, labels, args, **options)[0]

    hidden, kernel = inputs["hidden"], inputs["kernel"]
    adapter = jliger.LinearAdapter(inputs["a"], inputs["b"])
    assert products(loss, hidden, kernel) == 1
    assert products(jax.grad(loss, (0, 1)), hidden, kernel) == 3
    assert products(jax.grad(loss), hidden, kernel) == 2
    # The kernel frozen: logits and hidden gradients by it; and the adapter's, of which two are of its first matrix.
    assert products(jax.grad(loss, 2), hidden, kernel, adapter) == 6


def test_an_entropy_that_is_not_read_is_not_computed(monkeypatch):
    inputs, labels, args, _ = make((5,), "tokens")
    calls = []

    def row_stats(product, block, logit_map, wanted):
        calls.append(("stats", wanted.mean_logit))
        return original_stats(product, block, logit_map, wanted)

    def row_grads(*arguments, dtype):
        calls.append(("grads", arguments[-1].probability_logit is not None))
        return original_grads(*arguments, dtype=dtype)

    original_stats, original_grads = xla.row_stats, xla.row_grads
    monkeypatch.setattr(xla, "row_stats", row_stats)
    monkeypatch.setattr(xla, "row_grads", row_grads)

    def computed(loss_fn):
        calls.clear()

        def loss(hidden):
            options = {"units": "tokens", "has_aux": True, "implementation": "xla"}
            return jliger.fused_linear_loss(loss_fn, hidden, inputs["kernel"], labels, args, **options)

        jax.make_jaxpr(jax.grad(loss, has_aux=True))(inputs["hidden"])
        return set(calls)

    assert computed(lambda *arguments: token_loss(*arguments)) == {("stats", True), ("grads", True)}
    assert computed(lambda result, *_: (result.logprobs, None)) == {("stats", False), ("grads", False)}
    # Read, but not by the loss.
    assert computed(lambda result, *_: (result.logprobs, result.entropy)) == {("stats", True), ("grads", False)}


def test_calls_with_one_function_compile_once():
    inputs, labels, args, _ = make((5,), "tokens")
    sizes = []
    for _ in range(3):
        jliger.fused_linear_loss(token_loss_alone, inputs["hidden"], inputs["kernel"], labels, args, units="tokens")
        sizes.append(logprob_loss._summed_losses._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


def token_loss_alone(result, weight, more):
    return token_loss(result, weight, more)[0]


def test_gradients_elsewhere_raise():
    inputs, labels, args, _ = make((5,), "tokens")

    def loss(args, factor):
        def loss_fn(result, weight, more):
            return factor * token_loss_alone(result, weight, more)

        return jliger.fused_linear_loss(loss_fn, inputs["hidden"], inputs["kernel"], labels, args, units="tokens")

    with pytest.raises(NotImplementedError, match="args are differentiated"):
        jax.grad(loss)(args, 2.0)
    with pytest.raises(NotImplementedError, match="loss_fn is differentiated"):
        jax.jit(jax.grad(loss, 1))(args, 2.0)
    constant = jax.grad(lambda args: loss(jax.lax.stop_gradient(args), 2.0))(args)
    np.testing.assert_array_equal(constant[0], 0)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"units": "pairs"}, ValueError, "units got 'pairs'"),
        ({"args": [1]}, TypeError, "args got a list"),
        ({"args": (jnp.ones(4),)}, ValueError, r"args\[0\] got shape \(4,\)"),
        ({"loss_fn": lambda result: result.logprobs[None]}, TypeError, r"returned shape \(1,\)"),
        ({"loss_fn": lambda result: result.predictions}, TypeError, "dtype int32"),
        ({"loss_fn": lambda result: result}, TypeError, "returned a LinearLogprobs"),
        ({"has_aux": True}, TypeError, "with has_aux=True"),
        ({"labels": jnp.array(1), "hidden": jnp.ones(6), "units": "rows"}, ValueError, "labels got a scalar"),
        ({"keep_logits": True}, TypeError, "keep_logits is no option"),
        ({"loss_fn": jnp.ones((5, 6)), "hidden": len}, TypeError, r"loss_fn got a .*; pass the function first"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors(changes, error, match):
    inputs, labels, _, _ = make((5,), "tokens")
    arguments = {"loss_fn": lambda result: result.logprobs, "labels": labels, "units": "tokens"}
    arguments |= {"hidden": inputs["hidden"], "kernel": inputs["kernel"], **changes}
    with pytest.raises(error, match=match):
        jliger.fused_linear_loss(**arguments)
