"""The largest logits, and distillation from them, wherever tokens and columns are: results of one device."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hlo import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import BATCH, HIDDEN, IMPLEMENTATION, MODES, PLACES, VOCAB, assert_same, now_and_then, pick

import jliger
from jliger import losses
from jliger.testing.oracle import INTERPRETED

# Some ids are equal on several devices, and the last device has fewer columns than are asked for.
K, VOCAB_SIZE = 12, 40


@functools.cache
def head():
    """Hidden states, kernel and bias with few bits: products are exact, and many logits equal."""
    random = np.random.default_rng(0)
    hidden, kernel, bias = (random.integers(-2, 3, size) for size in ((*BATCH, HIDDEN), (HIDDEN, VOCAB), VOCAB))
    where = random.random(BATCH) < 0.8
    arrays = {"hidden": hidden, "kernel": kernel, "bias": bias}
    return {name: array.astype(np.float32) for name, array in arrays.items()} | {"where": where}


def placed(arrays, place, mesh):
    of_tokens = ("hidden", "where", "ids", "logprobs", "labels", "weights")
    names = {"kernel": place.spec("kernel", "hv")} | {name: place.tokens for name in of_tokens}
    specs = {name: names.get(name, place.spec("bias", "hv")) for name in arrays}
    return {name: jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in arrays.items()}, specs


def top_k(arrays, **options):
    hidden, kernel, bias, where = (arrays[name] for name in ("hidden", "kernel", "bias", "where"))
    options |= {"chunk_size": 4, "temperature": 2.0, "vocab_size": VOCAB_SIZE, "implementation": IMPLEMENTATION}
    return jliger.linear_top_k(hidden, kernel, K, bias=bias, where=where, **options)


def assert_top_k(found):
    arrays = head()
    logits = ((arrays["hidden"] @ arrays["kernel"] + arrays["bias"]) / 2)[..., :VOCAB_SIZE]
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :K]
    lse = np.log(np.exp(logits).sum(-1))
    logprobs = np.take_along_axis(logits, ids, -1) - lse[..., None]
    counted = arrays["where"][..., None]
    np.testing.assert_array_equal(found.ids, np.where(counted, ids, -1))
    np.testing.assert_allclose(found.logprobs, np.where(counted, logprobs, 0), atol=4e-6)
    np.testing.assert_allclose(found.logsumexp, np.where(arrays["where"], lse, 0), rtol=1e-6)


CASES = [(mode, place) for mode in MODES for place in ("dp+tp", "tp", "fsdp-v")]


@pytest.mark.parametrize(
    ("mode", "place"),
    pick(
        now_and_then(CASES, lambda _, case: case == ("auto", "dp+tp")),
        on_gpus=[("auto", "dp+tp")],
        interpreted=now_and_then([("explicit", "dp+tp")], lambda *_: False),
    ),
)
def test_equal_to_those_of_one_device(mode, place):
    place = PLACES[place]
    mesh = place.mesh(mode)
    with jax.set_mesh(mesh):
        arrays, _ = placed(head(), place, mesh)
        compiled = jax.jit(top_k).lower(arrays).compile()
        assert_top_k(jax.block_until_ready(compiled(arrays)))
    # Logits do not move: only parameters, before the loop, and each device's k largest, after it.
    for one in collectives(compiled.as_text()):
        assert not one.in_loop
        parameters_or_tokens = one.shape == (HIDDEN, VOCAB) or len(one.shape) == 1
        assert parameters_or_tokens or one.shape[-1] not in (VOCAB, VOCAB // 2), one


@pytest.mark.exhaustive
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map(check_vma):
    place = PLACES["dp+tp"]
    mesh = place.mesh("auto")
    arrays, specs = placed(head(), place, mesh)
    run = functools.partial(top_k, vocab_axis_name="model")
    around = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=P("data"), check_vma=check_vma)
    assert_top_k(jax.block_until_ready(jax.jit(around)(arrays)))


# ---- distillation ----------------------------------------------------------------------------------------------

LEARNT = ("hidden", "kernel", "bias")
KINDS = {
    "vocab": {"normalize": "vocab"},
    "remainder": {"remainder": True, "temperature": 2.0, "hard_weight": 0.5},
    "top_k": {"normalize": "top_k", "temperature": 2.0, "hard_weight": 0.5},
}


@functools.cache
def student_and_teacher():
    """The teacher's columns are on all devices; some are equal, some absent, and some are the label."""
    random = np.random.default_rng(1)
    hidden, kernel, bias = (random.normal(size=size) for size in ((*BATCH, HIDDEN), (HIDDEN, VOCAB), VOCAB))
    ids = random.integers(-4, VOCAB_SIZE, (*BATCH, 6))
    ids[..., 1] = ids[..., 2]
    labels = np.where(random.random(BATCH) < 0.5, np.maximum(ids[..., 3], 0), random.integers(0, VOCAB_SIZE, BATCH))
    labels[0, 0] = -100
    numbers = {
        "hidden": hidden / 4,
        "kernel": kernel,
        "bias": bias,
        "logprobs": np.log(0.8 * random.dirichlet(np.ones(6), BATCH)),
        "weights": random.uniform(0.5, 2, BATCH),
    }
    arrays = {name: array.astype(np.float32) for name, array in numbers.items()}
    return arrays | {"ids": ids.astype(np.int32), "labels": labels.astype(np.int32)}


def distilled(function, arrays, options):
    """Loss, metrics, and the student's gradients."""

    def loss(learnt):
        given = {**arrays, **learnt}
        rest = {name: given[name] for name in ("bias", "labels", "weights")}
        head = (given[name] for name in ("hidden", "kernel", "ids", "logprobs"))
        return function(*head, **rest, vocab_size=VOCAB_SIZE, precision="highest", **options)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)({name: arrays[name] for name in LEARNT})
    found = {"loss": value, **grads, **metrics._asdict()}
    return {name: array for name, array in found.items() if array is not None}


@functools.cache
def expected_of(kind):
    with jax.enable_x64(True):
        arrays = {
            name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in student_and_teacher().items()
        }
        found = distilled(
            jliger.reference.fused_linear_top_k_kl,
            {name: jax.numpy.asarray(array) for name, array in arrays.items()},
            {**KINDS[kind], "return_metrics": True},
        )
        return {name: np.asarray(array) for name, array in found.items()}


OFTEN = ("auto", "dp+tp", "remainder")
EVERY_KIND = [(mode, place, kind) for mode, place, kind in itertools.product(MODES, ("dp+tp", "fsdp-v"), KINDS)]


@pytest.mark.parametrize(
    ("mode", "place", "kind"),
    pick(
        now_and_then(EVERY_KIND, lambda _, case: case == OFTEN),
        on_gpus=[OFTEN],
        interpreted=now_and_then([("explicit", "dp+tp", "remainder")], lambda *_: False),
    ),
)
def test_distillation_gives_the_results_of_one_device(mode, place, kind):
    expected = expected_of(kind)  # outside of any mesh
    place = PLACES[place]
    mesh = place.mesh(mode)
    options = {**KINDS[kind], "return_metrics": True, "chunk_size": 4, "implementation": IMPLEMENTATION}
    run = functools.partial(distilled, losses.fused_linear_top_k_kl, options=options)
    with jax.set_mesh(mesh):
        arrays, _ = placed(student_and_teacher(), place, mesh)
        compiled = jax.jit(run).lower(arrays).compile()
        found = jax.block_until_ready(compiled(arrays))
    assert_same(found, expected)
    for name in LEARNT:
        assert found[name].sharding.is_equivalent_to(arrays[name].sharding, arrays[name].ndim), name
    # Logits do not move: in loops, only four numbers of each of a chunk's tokens, and one of each of the teacher's
    # columns and of the remainder. On GPUs XLA joins some of these.
    in_loop = [one for one in collectives(compiled.as_text()) if one.in_loop]
    assert sum(one.size for one in in_loop) <= 4 * (4 + 7), in_loop


@pytest.mark.exhaustive
@pytest.mark.parametrize(("check_vma", "kind"), [*itertools.product([True, False], KINDS)])
def test_distillation_inside_a_shard_map(check_vma, kind):
    expected, place = expected_of(kind), PLACES["dp+tp"]
    mesh = place.mesh("auto")
    arrays, specs = placed(student_and_teacher(), place, mesh)
    weight = float(expected["weight"])

    def loss(arrays):
        rest = {name: arrays[name] for name in ("bias", "labels", "weights")}
        options = {**KINDS[kind], "chunk_size": 4, "implementation": IMPLEMENTATION, "vocab_axis_name": "model"}
        head = (arrays[name] for name in ("hidden", "kernel", "ids", "logprobs"))
        total = losses.fused_linear_top_k_kl(
            *head, **rest, **options, reduction="sum", vocab_size=VOCAB_SIZE, precision="highest"
        )
        return jax.lax.psum(total, "data")

    around = jax.shard_map(loss, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=check_vma)
    learnt = {name: arrays[name] for name in LEARNT}
    value, grads = jax.jit(jax.value_and_grad(lambda learnt, arrays: around({**arrays, **learnt})))(learnt, arrays)
    assert_same({"loss": value / weight, **jax.tree.map(lambda grad: grad / weight, grads)},
                {name: expected[name] for name in ("loss", *LEARNT)})  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="nothing here depends on a kernel")
def test_a_teacher_that_explicit_axes_shard_otherwise():
    mesh = PLACES["dp+tp"].mesh("explicit")
    random = np.random.default_rng(1)
    ids, logprobs = random.integers(0, VOCAB, (*BATCH, K)), np.log(random.random((*BATCH, K), np.float32) / K)
    arrays = [head()["hidden"], head()["kernel"], ids.astype(np.int32), logprobs]
    specs = P("data"), P(None, "model"), P("data", None, "model"), P(None, "data")
    options = {"chunk_size": 4, "implementation": IMPLEMENTATION}
    expected = losses.fused_linear_top_k_kl(*arrays, **options)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
        np.testing.assert_allclose(losses.fused_linear_top_k_kl(*placed, **options), expected, rtol=1e-5)
        # An id that is no column, on whichever device it is.
        placed[2] = jax.device_put(np.where(np.arange(K) == K - 1, VOCAB, arrays[2]), NamedSharding(mesh, specs[2]))
        assert np.isnan(losses.fused_linear_top_k_kl(*placed, **options))
