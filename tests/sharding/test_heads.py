"""Medusa heads and shifted labels on a mesh: what one device would have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import IMPLEMENTATION, crossed

import jliger
from jliger.heads import medusa
from jliger.heads.linear import LinearHead
from jliger.testing.oracle import INTERPRETED
from jliger.testing.promotion import with_promotion

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 4, reason="made for 4 devices or more"),
    pytest.mark.skipif(INTERPRETED, reason="the same kernels as one loss has, of which there are tests"),
]

NUM_HEADS, HIDDEN_SIZE, VOCAB = 3, 16, 64
random = np.random.default_rng(0)


def normal(*shape):
    return (random.normal(size=shape) / 4).astype(np.float32)


HIDDEN = normal(4, 8, HIDDEN_SIZE)
TOKENS = random.integers(0, VOCAB, (4, 8))
MASK = random.random((4, 8)) < 0.8
LABELS = np.asarray(jliger.shift_labels(TOKENS, MASK, by=range(2, 2 + NUM_HEADS)))
BLOCK = LinearHead(kernel=normal(NUM_HEADS, HIDDEN_SIZE, HIDDEN_SIZE), bias=normal(NUM_HEADS, HIDDEN_SIZE))
HEADS = medusa.MedusaHeads((BLOCK,), LinearHead(kernel=normal(NUM_HEADS, HIDDEN_SIZE, VOCAB)))


def specs_of_heads(of_head):
    return medusa.MedusaHeads(jax.tree.map(lambda _: P(), HEADS.blocks), jax.tree.map(lambda _: of_head, HEADS.heads))


def total(heads, hidden, labels, **options):
    # Divided by what all devices have, losses of parts add up.
    return medusa.loss(heads, hidden, labels, normalizer=32.0, chunk_size=4, implementation=IMPLEMENTATION, **options)


@with_promotion
def unfused(heads, hidden):
    log_softmax = jax.nn.log_softmax(heads.logits(hidden))
    picked = jnp.take_along_axis(log_softmax, jnp.maximum(LABELS, 0)[..., None], -1)[..., 0]
    of_heads = -jnp.sum(picked * (LABELS != -100), (1, 2)) / 32
    return jnp.sum(of_heads * 0.8 ** jnp.arange(1, NUM_HEADS + 1))


@functools.cache
def expected():
    with jax.set_mesh(jax.make_mesh((1,), ("one",))):
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(unfused, (0, 1)))(HEADS, HIDDEN))


def assert_same(found):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected()), strict=True):
        little = 16 * np.finfo(np.float32).eps * max(np.abs(other).max(), 1)
        np.testing.assert_allclose(one, other, rtol=0, atol=little)


@pytest.mark.parametrize(
    ("axis_type", "of_head"),
    crossed([AxisType.Auto, AxisType.Explicit], [P(), P(None, "data", "model"), P(None, None, "model")]),
    ids=str,
)
def test_medusa_under_jit(axis_type, of_head):
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)):
        specs = specs_of_heads(of_head), P("data"), P(None, "data")
        arrays = jax.tree.map(jax.device_put, (HEADS, HIDDEN, LABELS), specs)
        assert_same(jax.jit(jax.value_and_grad(total, (0, 1)))(*arrays))


@pytest.mark.parametrize(("check_vma", "parallel"), crossed([True, False], ["tokens", "vocabulary"]))
def test_medusa_in_a_shard_map(parallel, check_vma):
    def share(heads, hidden, labels):
        if parallel == "vocabulary":
            return total(heads, hidden, labels, vocab_axis_name="devices")
        return jax.lax.psum(total(heads, hidden, labels), "devices")

    specs = {
        "tokens": (specs_of_heads(P()), P("devices"), P(None, "devices")),
        "vocabulary": (specs_of_heads(P(None, None, "devices")), P(), P()),
    }[parallel]
    with jax.set_mesh(jax.make_mesh((4,), ("devices",))):
        arrays = jax.tree.map(jax.device_put, (HEADS, HIDDEN, LABELS), specs)
        loss = jax.shard_map(share, in_specs=specs, out_specs=P(), check_vma=check_vma)
        assert_same(jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_labels_of_a_sequence_that_devices_share(axis_type):
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(axis_type,) * 2)):
        tokens, mask = (jax.device_put(array, P("data", "sequence")) for array in (TOKENS, MASK))
        for shift in (jliger.shift_labels, jax.jit(jliger.shift_labels)):
            found = shift(tokens, mask)
            np.testing.assert_array_equal(found, jliger.shift_labels(TOKENS, MASK))
        if axis_type == AxisType.Explicit:
            assert jax.typeof(found).sharding.spec == P("data", "sequence")
