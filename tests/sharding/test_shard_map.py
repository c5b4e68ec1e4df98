"""Inside a user's shard_map a device's share is all there is, but for a vocabulary that `vocab_axis_name` spreads."""

import functools
import itertools
import math

import jax
import pytest
from jax.sharding import PartitionSpec as P
from sharded import (
    BATCH,
    IMPLEMENTATION,
    LAYOUTS,
    MODES,
    PLACES,
    REDUCTIONS,
    Place,
    assert_same,
    crossed,
    now_and_then,
    oracle,
    pick,
    problem_of,
    put,
    settings_of,
    specs_of,
)

import jliger
from jliger.testing.oracle import every_pair

OPTIONS = {"bias": "float32", "where": "some", "ignored": 0.1, "weights": True, "class_weights": True}
OPTIONS |= {"label_smoothing": 0.1, "z_loss": 0.01}


def local_loss(settings, vocab_axes, arrays):
    """This device's part of the problem's loss times its cotangent: parts add up over the axes of tokens."""
    inputs, labels, cotangent, options = arrays
    options = {"implementation": IMPLEMENTATION, "vocab_axis_name": vocab_axes or None, **settings, **options}
    loss = jliger.fused_linear_cross_entropy(inputs["hidden"], inputs["kernel"], labels, bias=inputs["bias"], **options)
    return (loss * cotangent).sum()


def loss_and_grads(problem, place, mesh, *, check_vma, vocab_axes, token_axes, inside, manual=None):
    """Loss times cotangent, and gradients, with `value_and_grad` inside of the shard_map or around it."""
    specs = specs_of(problem, place)
    local = functools.partial(local_loss, settings_of(problem), vocab_axes)

    def of_inputs(arrays):
        return lambda inputs: local(arrays._replace(inputs=inputs))

    def summed(arrays):
        return jax.lax.psum(local(arrays), token_axes)

    def both(arrays):
        if check_vma:
            loss, grads = jax.value_and_grad(of_inputs(arrays))(arrays.inputs)
            return jax.lax.psum(loss, token_axes), grads
        # Nothing is typed: what is differentiated is the sum of all devices' losses, and what is replicated has its
        # gradient's sum over devices made by the user.
        copies = math.prod(mesh.shape[axis] for axis in vocab_axes)
        loss, grads = jax.value_and_grad(lambda inputs: of_inputs(arrays)(inputs) / copies)(arrays.inputs)
        axes = {name: token_axes for name in grads} | {"hidden": vocab_axes}
        grads = {name: jax.lax.psum(grad, axes[name]) if axes[name] else grad for name, grad in grads.items()}
        return jax.lax.psum(loss, (*token_axes, *vocab_axes)), grads

    shard_map = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(specs,), check_vma=check_vma, axis_names=manual or set()
    )
    if inside:
        return jax.jit(shard_map(both, out_specs=(P(), specs.inputs)))
    around = shard_map(summed, out_specs=P())

    def outer(arrays):
        return jax.value_and_grad(lambda inputs: around(arrays._replace(inputs=inputs)))(arrays.inputs)

    return jax.jit(outer)


def check(problem, place, mode="auto", lies=None, **options):
    """Against the oracle; arrays lie as `lies` says, which may be over more axes than the shard_map is."""
    mesh = place.mesh(mode)
    arrays = put(problem, lies or place, mesh)
    loss, grads = jax.block_until_ready(loss_and_grads(problem, place, mesh, **options)(arrays))
    expected = oracle(problem)
    total = (expected["loss"] * problem.cotangent).sum()
    assert_same({"loss": loss, **grads}, {"loss": total, **{name: expected[name] for name in grads}})


def make(reduction, layout, **options):
    """A mean needs a divisor that is the same on each device."""
    normalizer = {"normalizer": True} if reduction == "mean" else {}
    return problem_of(reduction, layout, chunk_size=4, **normalizer, **{**OPTIONS, **options})


OF_FOUR = {
    "check_vma": [True, False],
    "reduction": REDUCTIONS,
    "shared_vocab": [False, True],
    "inside": [False, True],
}
# Every combination of these; the layout is one or the other in turn, so that each two, three and four of the
# five are seen together.
EVERY_CASE = [
    (
        check_vma,
        reduction,
        LAYOUTS[(check_vma + (reduction == "none") + shared_vocab + inside) % 2],
        shared_vocab,
        inside,
    )
    for check_vma, reduction, shared_vocab, inside in itertools.product(*OF_FOUR.values())
]
# Any two values of the first four things still meet.
OFTEN = {case for case in EVERY_CASE if case[:2] + case[3:] in {tuple(row.values()) for row in every_pair(OF_FOUR)}}


@pytest.mark.parametrize(
    ("check_vma", "reduction", "layout", "shared_vocab", "inside"),
    pick(
        now_and_then(EVERY_CASE, lambda _, case: case in OFTEN),
        on_gpus=[case for case in EVERY_CASE if case[3]],
        interpreted=[(True, "mean", "hv", True, False), (False, "none", "vh", True, True)],
    ),
)
def test_every_way_to_write_it(check_vma, reduction, layout, shared_vocab, inside):
    check(
        make(reduction, layout),
        PLACES["dp+tp" if shared_vocab else "dp"],
        check_vma=check_vma,
        vocab_axes=("model",) if shared_vocab else (),
        token_axes=("data",),
        inside=inside,
    )


@pytest.mark.parametrize(
    ("vocab_axes", "check_vma", "reduction"),
    crossed([("seq", "model"), ("model", "data")], pick([(True, "none"), (False, "mean")], on_gpus=[], interpreted=[])),
    ids=str,
)
def test_a_vocabulary_over_several_axes(vocab_axes, check_vma, reduction):
    token_axis = next(axis for axis in ("data", "seq") if axis not in vocab_axes)
    place = Place(P(token_axis), P(None, vocab_axes), vocab_axes)
    check(
        make(reduction, "hv"), place, check_vma=check_vma, vocab_axes=vocab_axes, token_axes=(token_axis,), inside=False
    )


# Not interpreted: Jax takes callbacks to Python only where all axes are manual.
@pytest.mark.parametrize(
    ("mode", "shared_vocab", "check_vma"),
    crossed(
        MODES,
        pick(
            [(False, True), (True, True), (True, False), (False, False)],
            on_gpus=[(False, True), (True, True)],
            interpreted=[],
        ),
    ),
)
def test_some_axes_manual_and_the_others_unused(shared_vocab, mode, check_vma):
    check(
        make("mean", "hv"),
        PLACES["dp+tp" if shared_vocab else "dp"],
        mode,
        check_vma=check_vma,
        vocab_axes=("model",) if shared_vocab else (),
        token_axes=("data",),
        inside=False,
        manual={"data", "model"} if shared_vocab else {"data"},
    )


@pytest.mark.parametrize(
    ("lies", "reduction", "check_vma", "inside"),
    pick(
        [
            (PLACES["dp+tp"], "mean", True, False),
            (Place(P("data", "seq"), P("model"), ("data", "seq")), "none", False, True),
        ],
        on_gpus=[(PLACES["dp+tp"], "mean", True, False)],
        interpreted=[],
    ),
)
def test_explicit_axes_that_a_shard_map_leaves(lies, reduction, check_vma, inside):
    check(
        make(reduction, "hv"),
        PLACES["dp"],
        "explicit",
        lies,
        check_vma=check_vma,
        vocab_axes=(),
        token_axes=("data",),
        inside=inside,
        manual={"data"},
    )


def test_a_vocabulary_over_axes_of_two_kinds_is_refused():
    place, lies = (Place(P("data"), P(None, axes), ("data", "model", "seq")) for axes in ("model", ("model", "seq")))
    options = {"check_vma": True, "token_axes": ("data",), "inside": False, "manual": {"data", "model"}}
    with pytest.raises(
        NotImplementedError, match=r"vocab_axis_name got \('model',\) with arrays that .* Explicit axes, .*'seq'"
    ):
        check(make("mean", "hv"), place, "explicit", lies, vocab_axes=("model",), **options)


@pytest.mark.parametrize("check_vma", pick([True, False], on_gpus=[True], interpreted=[True]))
def test_tokens_of_two_axes(check_vma):
    check(
        make("none", "vh"),
        PLACES["dp+sp"],
        check_vma=check_vma,
        vocab_axes=(),
        token_axes=("data", "seq"),
        inside=True,
    )


@pytest.mark.parametrize(
    ("reduction", "check_vma"),
    crossed(REDUCTIONS, pick([True, False], on_gpus=[True], interpreted=[True])),
)
def test_metrics_of_a_shared_vocabulary(check_vma, reduction):
    # Predictions are columns of the whole vocabulary, and each device of a group knows them.
    problem = problem_of(reduction, return_metrics=True, z_loss=0.1)
    place = PLACES["dp+tp"]
    mesh = place.mesh("auto")
    specs = specs_of(problem, place)

    def metrics(hidden, kernel, labels):
        return jliger.fused_linear_cross_entropy(
            hidden,
            kernel,
            labels,
            vocab_axis_name="model",
            implementation=IMPLEMENTATION,
            **settings_of(problem),
        )[1].predictions

    function = jax.shard_map(
        metrics,
        mesh=mesh,
        in_specs=(specs.inputs["hidden"], specs.inputs["kernel"], specs.labels),
        out_specs=specs.labels,
        check_vma=check_vma,
    )
    arrays = put(problem, place, mesh)
    found = jax.jit(function)(arrays.inputs["hidden"], arrays.inputs["kernel"], arrays.labels)
    jax.block_until_ready(found)
    assert found.shape == BATCH
    assert_same(found, oracle(problem)["predictions"])


def test_an_axis_that_is_none_is_refused():
    problem = problem_of()
    with pytest.raises((ValueError, NameError), match="model"):
        jliger.fused_linear_cross_entropy(**problem.inputs, labels=problem.labels, vocab_axis_name="model")
