"""Results equal one device's wherever the inputs are, and gradients come back where their arguments are."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import (
    EVERYTHING,
    IMPLEMENTATION,
    LAYOUTS,
    MODES,
    PLACES,
    REDUCTIONS,
    ROUNDING_64,
    VOCAB,
    Arrays,
    arrays_of,
    assert_same,
    assert_sharded_like,
    crossed,
    now_and_then,
    oracle,
    pick,
    problem_of,
    put,
    results,
    run,
    settings_of,
)

import jliger
from jliger.testing.oracle import INTERPRETED, ON_GPU, assert_rule_of_two, exact_and_rounding, unfused

# Each place once in each mode, with forms and layouts in turn.
EACH_PLACE = [
    (mode, place, REDUCTIONS[(number + turn) % 2], LAYOUTS[(number // 2 + turn) % 2])
    for turn, mode in enumerate(MODES)
    for number, place in enumerate(PLACES)
]
# Each place once, so that any two values of mode, form and layout still meet.
OFTEN = [MODES[(number // 2 + number // 4) % len(MODES)] for number in range(len(PLACES))]
OFTEN = set(zip(OFTEN, PLACES, strict=True))


def check(problem, place, mode, *, set_mesh=True, eager=False):
    mesh = PLACES[place].mesh(mode)
    arrays = put(problem, PLACES[place], mesh)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        found = jax.block_until_ready(run(settings_of(problem), arrays)) if eager else results(problem, arrays)
    assert_same(found, oracle(problem))
    assert_sharded_like(found, arrays)


@pytest.mark.parametrize(
    ("mode", "place", "reduction", "layout"),
    pick(
        now_and_then(EACH_PLACE, lambda _, case: case[:2] in OFTEN),
        on_gpus=EACH_PLACE[: len(PLACES) : 2] + EACH_PLACE[len(PLACES) + 1 :: 2],
        interpreted=now_and_then(
            [case for case in EACH_PLACE if case[1] in ("dp+sp", "fsdp-v", "fsdp-h+tp")],
            lambda _, case: case[1] == "fsdp-h+tp",
        ),
    ),
)
def test_every_argument_sharded(mode, place, reduction, layout):
    check(problem_of(reduction, layout, chunk_size=4, **EVERYTHING), place, mode)


@pytest.mark.parametrize(
    ("mode", "place", "reduction"),
    crossed(
        MODES,
        pick([("dp", "none"), ("fsdp-v+tp", "mean")], on_gpus=[("dp+tp", "none")], interpreted=[("dp+tp", "mean")]),
    ),
)
def test_without_a_mesh_set(mode, place, reduction):
    check(problem_of(reduction, chunk_size=4, **EVERYTHING), place, mode, set_mesh=False)


@pytest.mark.parametrize(
    ("mode", "set_mesh", "reduction"),
    crossed(MODES, pick([(True, "mean"), (False, "none")], on_gpus=[(True, "mean")], interpreted=[(True, "none")])),
)
def test_eager(mode, set_mesh, reduction):
    problem = problem_of(reduction, "vh", chunk_size=4, **EVERYTHING)
    check(problem, "fsdp-h+tp", mode, set_mesh=set_mesh, eager=True)


@pytest.mark.parametrize(
    ("mode", "reduction", "options"),
    crossed(
        MODES,
        pick(
            [("sum", {}), ("mean", {"normalizer": True}), ("mean", {}), ("none", {})],
            on_gpus=[("mean", {"normalizer": True})],
            interpreted=[],
        ),
    ),
)
def test_few_arguments(mode, reduction, options):
    check(problem_of(reduction, **options), "dp+tp", mode)


@pytest.mark.parametrize("reduction", pick(REDUCTIONS, on_gpus=REDUCTIONS, interpreted=[]))
def test_no_mesh_at_all(reduction):
    # With several devices in sight XLA is asked to choose shardings, and chooses none.
    problem = problem_of(reduction, chunk_size=4, **EVERYTHING)
    assert_same(results(problem, arrays_of(problem)), oracle(problem))


@pytest.mark.parametrize("mode", MODES)
def test_arrays_of_one_device_under_a_mesh(mode):
    problem = problem_of(chunk_size=4, **EVERYTHING)
    with jax.set_mesh(PLACES["dp"].mesh(mode)):
        assert_same(results(problem, arrays_of(problem)), oracle(problem))


@pytest.mark.parametrize(
    ("mode", "place"), crossed(MODES, pick(["dp+sp+fsdp+tp", "fsdp-v"], on_gpus=["dp"], interpreted=["dp"]))
)
def test_loss_alone(mode, place):
    problem = problem_of(chunk_size=4, **EVERYTHING)
    mesh = PLACES[place].mesh(mode)
    arrays = put(problem, PLACES[place], mesh)

    def loss_and_metrics(arrays):
        inputs, labels, _, options = arrays
        options = {"implementation": IMPLEMENTATION, **settings_of(problem), **options}
        loss, metrics = jliger.fused_linear_cross_entropy(
            inputs["hidden"], inputs["kernel"], labels, bias=inputs["bias"], **options
        )
        return {"loss": loss, **{name: field for name, field in metrics._asdict().items() if field is not None}}

    with jax.set_mesh(mesh):
        found = jax.block_until_ready(jax.jit(loss_and_metrics)(arrays))
    assert_same(found, {name: oracle(problem)[name] for name in found})


@pytest.mark.parametrize("mode", MODES)
def test_tokens_of_one_leading_dimension(mode):
    check(problem_of("none", batch=(16,), chunk_size=4, **EVERYTHING), "dp+tp", mode)


# ---- shares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "place", "reduction"),
    crossed(
        MODES,
        pick(
            [("dp", "mean"), ("fsdp-h", "none"), ("dp+tp", "mean"), ("dp+tp", "none")],
            on_gpus=[("dp+tp", "mean"), ("dp+tp", "none")],
            interpreted=[],
        ),
    ),
)
def test_a_device_without_tokens_that_count(mode, reduction, place):
    # Devices go through different numbers of chunks, some through none, and still meet wherever they sum.
    problem = problem_of(reduction, chunk_size=4, **EVERYTHING)
    problem = problem.replace(where=jnp.arange(32).reshape(4, 8) >= 21)
    check(problem, place, mode)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_counts_on_any_device(mode):
    problem = problem_of(chunk_size=4, **{**EVERYTHING, "where": "none"})
    mesh = PLACES["dp+tp"].mesh(mode)
    with jax.set_mesh(mesh):
        found = results(problem, put(problem, PLACES["dp+tp"], mesh))
    predictions = found.pop("predictions")
    assert np.all(predictions == -1)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("mode", MODES)
def test_a_label_that_is_no_column_poisons_on_every_device(mode):
    problem = problem_of(bias="float32")
    problem = problem.replace(labels=problem.labels.at[0, 0].set(64))
    place = PLACES["dp+tp"]
    mesh = place.mesh(mode)
    arrays = put(problem, place, mesh)
    with jax.set_mesh(mesh):
        found = results(problem, arrays)
    assert np.all(np.isnan(found["loss"]))
    assert np.all(np.isnan(found["kernel"]))


@pytest.mark.skipif(INTERPRETED, reason="minutes, interpreted")
def test_float16_where_a_device_has_masked_columns_alone():
    problem = problem_of("sum", dtype="float16", kernel_dtype="float16", bias="float32")
    is_masked = jnp.arange(VOCAB) >= VOCAB // 2

    def masked(value):
        bias = jnp.where(is_masked, value, problem.inputs["bias"])
        return problem.replace(inputs={**problem.inputs, "bias": bias}, labels=problem.labels % (VOCAB // 2))

    place = PLACES["dp+tp"]
    mesh = place.mesh("explicit")
    with jax.set_mesh(mesh):
        found = results(problem, put(masked(-jnp.inf), place, mesh))
    # As probable, and full logits' arithmetic gives no NaN.
    truth, rounding = exact_and_rounding(masked(-1e4))
    assert_rule_of_two(found, unfused(masked(-1e4)), truth, more=rounding)
    assert not np.any(np.asarray(found["kernel"])[:, is_masked])


@pytest.mark.parametrize("mode", MODES)
def test_shares_that_chunks_do_not_divide(mode):
    check(problem_of(batch=(4, 7), chunk_size=5, **EVERYTHING), "dp", mode)


def constrained(problem, specs, mesh):
    """`run`, with some inputs sharded inside of jit, where Auto axes need not divide a dimension."""

    def function(arrays: Arrays):
        inputs = {
            name: jax.lax.with_sharding_constraint(array, NamedSharding(mesh, specs[name])) if name in specs else array
            for name, array in arrays.inputs.items()
        }
        return run(settings_of(problem), arrays._replace(inputs=inputs))

    return jax.jit(function)


@pytest.mark.parametrize(
    ("reduction", "specs"),
    crossed(
        pick(REDUCTIONS, on_gpus=["mean"], interpreted=[]),
        pick(
            [
                {"hidden": P("data")},
                {"hidden": P(None, ("data", "seq")), "kernel": P(None, "model")},
                {"hidden": P("data"), "kernel": P("data", "model")},
            ],
            on_gpus=[{"hidden": P("data"), "kernel": P("data")}],
            interpreted=[],
        ),
    ),
    ids=str,
)
def test_shares_of_different_sizes(specs, reduction):
    problem = problem_of(reduction, batch=(5, 3), hidden_size=15, vocab=63, chunk_size=4, **EVERYTHING)
    mesh = PLACES["dp+tp"].mesh("auto")
    assert_same(constrained(problem, specs, mesh)(arrays_of(problem)), oracle(problem))


@pytest.mark.parametrize(
    ("mode", "hidden", "kernel"),
    crossed(
        pick(MODES, on_gpus=[], interpreted=[]),
        [
            (P("data", None, "model"), P()),  # the hidden dimension, as a tensor-parallel layer before may leave it
            (P("data", None, "model"), P("model")),
            (P("data"), P("model")),  # an axis with nothing but the kernel's rows
            (P("data"), P(None, ("data", "model"))),  # token axes before vocabulary axes
            (P(), P("data", "seq")),
        ],
    ),
    ids=str,
)
def test_unusual_places(mode, hidden, kernel):
    problem = problem_of(chunk_size=4, **EVERYTHING)
    mesh = PLACES["dp+tp"].mesh(mode)
    arrays = jax.tree.map(lambda array: jax.device_put(array, NamedSharding(mesh, P())), arrays_of(problem))
    for name, spec in [("hidden", hidden), ("kernel", kernel)]:
        arrays.inputs[name] = jax.device_put(arrays.inputs[name], NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        found = results(problem, arrays)
    assert_same(found, oracle(problem))
    if mode == "explicit":  # with Auto axes XLA shards what is replicated where that is cheaper
        assert_sharded_like(found, arrays)


@pytest.mark.skipif(IMPLEMENTATION != "xla", reason="float64 is for XLA")
@pytest.mark.parametrize(
    ("mode", "place", "reduction"),
    crossed(MODES, [("dp+sp", "none"), ("fsdp-v+tp", "mean"), ("fsdp-h+tp", "none")]),
)
def test_float64(mode, reduction, place):
    with jax.enable_x64(True):
        problem = problem_of(reduction, chunk_size=4, **EVERYTHING)
        wide = jax.tree.map(_as_float64, (problem.inputs, problem.cotangent, problem.options))
        problem = problem.replace(inputs=wide[0], cotangent=wide[1], **wide[2])
        mesh = PLACES[place].mesh(mode)
        arrays = put(problem, PLACES[place], mesh)
        with jax.set_mesh(mesh):
            found = results(problem, arrays)
    assert all(found[name].dtype == np.float64 for name in ("loss", "hidden", "kernel", "bias"))
    assert_same(found, oracle(problem), ROUNDING_64)


def _as_float64(value):
    is_floating = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
    return value.astype(jnp.float64) if is_floating else value


@pytest.mark.skipif(not ON_GPU, reason="needs GPUs")
def test_these_run_on_triton():
    assert IMPLEMENTATION == "triton"
    assert jliger.core.backend.fitting_implementation(jnp.zeros(())) == "triton"
