"""Norms, rotary embeddings and gated products on a mesh give the results and gradients of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import IMPLEMENTATION, MODES, Place, assert_same

import jliger
from jliger.testing.operations import random, results_and_grads
from jliger.testing.oracle import INTERPRETED

B, L, H, F = 4, 6, 8, 16
TOKENS = P("data", "seq")
PLACE = Place(TOKENS, P(None, "model"), ("data", "model", "seq"))


def rms_norm(x, scale, residual):
    return jliger.rms_norm(x, scale, residual=residual, scale_offset=1.0, implementation=IMPLEMENTATION)


def layer_norm(x, scale, offset, implementation=IMPLEMENTATION):
    return jliger.layer_norm(x, scale, offset, implementation=implementation)


def rope(x):
    positions = jnp.broadcast_to(jnp.arange(L), (B, L))
    x = x.reshape(B, L, 2, H // 2)
    return jliger.apply_rope(x, positions).reshape(B, L, H)


gated_mlp = functools.partial(jliger.gated_mlp, chunk_size=2)
KERNELS = {name: random(seed, H, F) for seed, name in enumerate(("gate_kernel", "up_kernel"), 10)}
KERNELS["down_kernel"] = random(12, F, H)
X = random(0, B, L, H)
LABELS = np.where(np.arange(B * L).reshape(B, L) % 5 == 0, -100, np.arange(B * L).reshape(B, L) % H)


def cross_entropy(logits, implementation=IMPLEMENTATION):
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "class_weights": 1 + np.arange(H) / H, "reduction": "none"}
    return jliger.softmax_cross_entropy(logits, LABELS, **options, implementation=implementation)[..., None]


WITH_KERNELS = {
    "rms_norm": (rms_norm, {"x": X, "scale": random(1, H), "residual": random(2, B, L, H)}),
    "layer_norm": (layer_norm, {"x": X, "scale": random(1, H), "offset": random(2, H)}),
    "softmax_cross_entropy": (cross_entropy, {"logits": X}),
}
# Others have no kernels to interpret.
OPERATIONS = (
    WITH_KERNELS
    if INTERPRETED
    else {
        **WITH_KERNELS,
        "swiglu": (jliger.swiglu, {"gate": X, "up": random(1, B, L, H)}),
        "apply_rope": (rope, {"x": X}),
        "gated_mlp": (gated_mlp, {"x": X, **KERNELS}),
    }
)
TENSOR_PARALLEL = {"gate_kernel": P("data", "model"), "up_kernel": P(None, "model"), "down_kernel": P("model", "seq")}


def check(mode, function, inputs, specs, *, results=None):
    """Results and gradients with random cotangents, under jit; returns what was compiled."""
    mesh = PLACE.mesh(mode)
    cotangents = jax.tree.map(lambda shape: random(5, *shape.shape), jax.eval_shape(lambda i: function(**i), inputs))
    expected = results_and_grads(function, inputs, cotangents)
    put = {name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in inputs.items()}
    spec = results or specs[next(iter(specs))]
    cotangents = jax.tree.map(lambda value: jax.device_put(value, NamedSharding(mesh, spec)), cotangents)
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(results_and_grads, function)).lower(put, cotangents).compile()
        # Waited for: interpreted kernels call back to Python, which another computation meanwhile could block.
        found = jax.block_until_ready(compiled(put, cotangents))
    assert_same(found, expected)
    if mode == "explicit":
        for name, value in put.items():
            assert found[name].sharding.is_equivalent_to(value.sharding, value.ndim), name
    return compiled


def specs_of(inputs, tokens=TOKENS, **others):
    return {name: others.get(name, tokens if value.ndim == 3 else P()) for name, value in inputs.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_equal_to_those_of_one_device(name, mode):
    function, inputs = OPERATIONS[name]
    others = TENSOR_PARALLEL if name == "gated_mlp" else {"scale": P("data")}
    compiled = check(mode, function, inputs, specs_of(inputs, **others))
    # Only parameters are gathered: tokens stay on their devices.
    gathered = [one for one in collectives(compiled.as_text()) if one.kind in ("all-gather", "all-to-all")]
    assert all(len(one.shape) <= 2 for one in gathered)


@pytest.mark.skipif(INTERPRETED, reason="kernels take whole rows, so there is none to interpret")
@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize("name", ["layer_norm", "softmax_cross_entropy"])
def test_features_are_sharded(name, mode):
    function, inputs = WITH_KERNELS[name]
    function = functools.partial(function, implementation="xla")
    specs = specs_of(inputs, P("data", None, "model"), scale=P("model"))
    compiled = check(mode, function, inputs, specs, results=P("data") if "logits" in inputs else None)
    assert not [one for one in collectives(compiled.as_text()) if one.kind == "all-gather" and len(one.shape) > 2]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name in ("rms_norm", "gated_mlp")])
def test_inside_a_shard_map(name, check_vma):
    function, inputs = OPERATIONS[name]
    mesh, specs = PLACE.mesh("auto"), specs_of(inputs)

    def local(inputs):
        def loss(inputs):
            return sum(jnp.sum(result**2) for result in jax.tree.leaves(function(**inputs)))

        grads = jax.grad(loss)(inputs)
        # With types, JAX sums the gradients of what is replicated; without, the user does.
        return grads if check_vma else {
            name: grad if specs[name] == TOKENS else jax.lax.psum(grad, ("data", "seq")) for name, grad in grads.items()
        }  # fmt: skip

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=check_vma)
    found = jax.block_until_ready(jax.jit(mapped)(inputs))
    whole = jax.grad(lambda inputs: sum(jnp.sum(one**2) for one in jax.tree.leaves(function(**inputs))))(inputs)
    assert_same(found, whole)


def test_kernels_refuse_features_over_explicit_axes():
    pytest.importorskip("jax_triton")
    mesh = PLACE.mesh("explicit")
    x = jax.device_put(X, NamedSharding(mesh, P("data", None, "model")))
    with jax.set_mesh(mesh), jliger.compute_capability(90):
        with pytest.raises(NotImplementedError, match="sharded over model"):
            jliger.rms_norm(x, jnp.ones(H), implementation="triton")
        assert np.isfinite(jliger.rms_norm(x, jnp.ones(H))).all()
