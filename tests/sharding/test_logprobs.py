"""Per-token outputs and an adapter's gradients, wherever tokens, columns and the adapter's sides are."""

import functools
import re
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import BATCH, HIDDEN, IMPLEMENTATION, MODES, PLACES, VOCAB, assert_same, now_and_then, pick

import jliger
from jliger.testing.oracle import INTERPRETED, ON_GPU

RANK = 4
DIFFERENTIABLE = ("logprobs", "logsumexp", "entropy")


def arrays():
    random = np.random.default_rng(0)
    shapes = {"hidden": (*BATCH, HIDDEN), "kernel": (HIDDEN, VOCAB), "bias": (VOCAB,), "a": (HIDDEN, RANK)}
    inputs = {name: random.normal(size=shape) / 2 for name, shape in {**shapes, "b": (RANK, VOCAB)}.items()}
    labels = random.integers(0, VOCAB, BATCH)
    where = random.random(BATCH) < 0.8
    return inputs, labels, where, random.normal(size=(3, *BATCH))


def run(function, inputs, labels, where, cotangents, **options):
    def outputs(inputs):
        adapter = jliger.LinearAdapter(inputs["a"], inputs["b"], 0.5)
        found = function(
            inputs["hidden"], inputs["kernel"], labels, bias=inputs["bias"], where=where, adapter=adapter, **options
        )
        return [getattr(found, name) for name in DIFFERENTIABLE], found

    _, pull_back, found = jax.vjp(outputs, inputs, has_aux=True)
    return found, pull_back(list(cotangents))[0]


@functools.cache
def expected():
    with jax.enable_x64(True):
        inputs, *rest = jax.tree.map(jnp.asarray, arrays())
        return jax.tree.map(np.asarray, run(jliger.reference.linear_logprobs, inputs, *rest))


CASES = [
    *((place, False) for place in pick(list(PLACES), on_gpus=["fsdp-h", "dp+tp"], interpreted=["fsdp-h+tp"])),
    *((place, True) for place in pick(["dp+sp", "fsdp-v+tp"], on_gpus=["dp+tp"], interpreted=["dp+tp"])),
]


@pytest.mark.parametrize("mode", MODES)
def test_logits_within_a_budget(mode):
    """The logits of half of each device's tokens, which are not gathered."""
    if jax.device_count() < 8:
        pytest.skip("the shapes are those of eight devices")
    random = np.random.default_rng(0)
    shape = (4, 64)
    place = PLACES["dp+sp+fsdp+tp"]
    mesh = place.mesh(mode)
    inputs = random.normal(size=(*shape, HIDDEN)), random.normal(size=(HIDDEN, VOCAB)) / 4
    labels, cotangent = random.integers(0, VOCAB, shape), random.normal(size=shape)
    labels[random.random(shape) < 0.2] = -100

    def grads(function, hidden, kernel, labels, cotangent, **options):
        def loss(hidden, kernel):
            found = function(hidden, kernel, labels, **options)
            return (cotangent * found.logprobs).sum(), found.logprobs

        return jax.grad(loss, (0, 1), has_aux=True)(hidden, kernel)

    with jax.enable_x64(True):
        arrays = *map(jnp.asarray, inputs), jnp.asarray(labels), jnp.asarray(cotangent)
        exact = jax.tree.map(np.asarray, grads(jliger.reference.linear_logprobs, *arrays))
    specs = place.tokens, place.kernel, place.tokens, place.tokens
    budget = 32 * VOCAB // 2 * 4  # for 64 tokens and half of the vocabulary on each device
    options = {"implementation": IMPLEMENTATION, "precision": "highest", "chunk_size": 8, "keep_logits": budget}
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(array.astype(np.int32 if array.dtype == np.int64 else np.float32), NamedSharding(mesh, spec))
            for array, spec in zip((*inputs, labels, cotangent), specs, strict=True)
        ]
        compiled = jax.jit(functools.partial(grads, jliger.linear_logprobs, **options)).lower(*arrays).compile()
        assert_same(jax.block_until_ready(compiled(*arrays)), exact)
    program = compiled.as_text()
    assert f"f32[32,{VOCAB // 2}]" in program
    assert not any(f"f32[{shape},{VOCAB}" in program for shape in ("4,8,4", "2,4,4", "128", "32"))


def frozen_head_grads(function, hidden, kernel, labels, cotangent, **options):
    """Log-probabilities of a frozen head, and the gradient of hidden states."""

    def loss(hidden):
        found = function(hidden, kernel, labels, **options)
        return (cotangent * found.logprobs).sum(), found.logprobs

    return jax.grad(loss, has_aux=True)(hidden)


@pytest.mark.parametrize("mode", [*MODES, *now_and_then(["manual", "manual, untyped"], lambda number, _: number == 0)])
def test_a_frozen_head(mode):
    """The gradient of each token's log-probability, from the forward pass; two products on each device."""
    random = np.random.default_rng(0)
    place = PLACES["dp+tp" if mode.startswith("manual") else "fsdp-v+tp"]
    mesh = place.mesh("explicit" if mode == "explicit" else "auto")
    inputs = random.normal(size=(*BATCH, HIDDEN)), random.normal(size=(HIDDEN, VOCAB)) / 4
    labels, cotangent = random.integers(0, VOCAB, BATCH), random.normal(size=BATCH)
    labels[random.random(BATCH) < 0.2] = -100
    with jax.enable_x64(True):
        arrays = *map(jnp.asarray, inputs), jnp.asarray(labels), jnp.asarray(cotangent)
        exact = jax.tree.map(np.asarray, frozen_head_grads(jliger.reference.linear_logprobs, *arrays))
    specs = place.tokens, place.kernel, place.tokens, place.tokens
    options = {"implementation": IMPLEMENTATION, "precision": "highest", "chunk_size": 4}
    function = functools.partial(frozen_head_grads, jliger.linear_logprobs, **options)
    if mode.startswith("manual"):
        check_vma = mode == "manual"

        def local(hidden, kernel, labels, cotangent):
            copies = 1 if check_vma else mesh.shape["model"]
            grads, logprobs = frozen_head_grads(
                jliger.linear_logprobs, hidden, kernel, labels, cotangent / copies, vocab_axis_name="model", **options
            )
            return (grads if check_vma else jax.lax.psum(grads, "model")), logprobs

        out_specs = place.tokens, place.tokens
        function = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma)
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(array.astype(np.int32 if array.dtype == np.int64 else np.float32), NamedSharding(mesh, spec))
            for array, spec in zip((*inputs, labels, cotangent), specs, strict=True)
        ]
        compiled = jax.jit(function).lower(*arrays).compile()
        assert_same(jax.block_until_ready(compiled(*arrays)), exact)
    if not (ON_GPU or INTERPRETED):
        assert len(re.findall(r' dot\(.*op_name="[^"]*while/body/', compiled.as_text())) == 2


# Modes in turn; which of them it is, is seen to by the tests of the loss.
@pytest.mark.parametrize(("place", "keep_logits", "mode"), [(*case, mode) for case, mode in zip(CASES, cycle(MODES))])
def test_equal_to_those_of_one_device(mode, place, keep_logits):
    inputs, labels, where, cotangents = arrays()
    place = PLACES[place]
    mesh = place.mesh(mode)
    kernel = place.spec("kernel", "hv")
    specs = {
        "hidden": place.tokens,
        "kernel": kernel,
        "bias": place.spec("bias", "hv"),
        "a": P((*kernel, None)[0]),  # as the kernel's rows, as a trainer would shard it
        "b": P(None, (*kernel, None, None)[1]),
    }

    def put(array, spec, dtype=None):
        return jax.device_put(jnp.asarray(array, dtype), NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        sharded = {name: put(array, specs[name], jnp.float32) for name, array in inputs.items()}
        operands = put(labels, place.tokens), put(where, place.tokens)
        compiled = jax.jit(
            lambda *arrays: run(
                jliger.linear_logprobs,
                *arrays,
                implementation=IMPLEMENTATION,
                precision="highest",
                chunk_size=4,
                keep_logits=keep_logits,
            )
        )
        found = compiled(sharded, *operands, put(cotangents, P(None, *place.tokens), jnp.float32))
    assert_same(jax.block_until_ready(found), expected())
    for name, grad in found[1].items():
        if mode == "explicit" or name in ("hidden", "kernel", "bias"):
            assert grad.sharding.is_equivalent_to(sharded[name].sharding, grad.ndim), name
