"""The largest logits, and distillation from them, wherever tokens and columns are: results of one device."""

import functools

import jax
import numpy as np
import pytest
from hlo import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import BATCH, HIDDEN, IMPLEMENTATION, MODES, PLACES, VOCAB, now_and_then, pick

import jliger

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
    names = {"hidden": place.tokens, "where": place.tokens, "kernel": place.spec("kernel", "hv")}
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
        assert one.shape in ((HIDDEN, VOCAB), (VOCAB,)) or one.shape[-1] not in (VOCAB, VOCAB // 2), one


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_inside_a_shard_map(check_vma):
    place = PLACES["dp+tp"]
    mesh = place.mesh("auto")
    arrays, specs = placed(head(), place, mesh)
    run = functools.partial(top_k, vocab_axis_name="model")
    around = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=P("data"), check_vma=check_vma)
    assert_top_k(jax.block_until_ready(jax.jit(around)(arrays)))
