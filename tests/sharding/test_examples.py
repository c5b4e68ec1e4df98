"""Steps of the examples on a mesh: losses and gradients are those of one device, and sharded as the parameters are."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import example_mesh

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = P(("data", "fsdp"))


def assert_same_on_a_mesh(loss, params, specs, batch):
    """Compares the loss and its gradients on a mesh with those of one device."""
    differentiate = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, batch)[0]))
    expected, expected_grads = differentiate(params, batch)
    mesh = example_mesh()
    with jax.set_mesh(mesh):
        own = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)
        found, grads = differentiate(own, jax.device_put(batch, NamedSharding(mesh, ROWS)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for one, other, leaf in zip(*map(jax.tree.leaves, (grads, expected_grads, own)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
        # XLA may shard the gradients of what is replicated.
        assert leaf.sharding.is_fully_replicated or one.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@pytest.mark.exhaustive
@pytest.mark.parametrize("head", ["jliger", "full"])
def test_medusa(import_example, head):
    decoder, speculation = map(import_example, ("decoder", "speculation"))
    config = decoder.DecoderConfig(64, 16, 32, 1, 2, 2, 8)
    model = speculation.Medusa(config, 2, speculation.Head(head), end_of_text=0)
    backbone = decoder.initial_parameters(config, jax.random.key(0))
    params = {"backbone": backbone, "heads": model.initial_parameters(backbone)}
    specs = {"backbone": jax.tree.map(lambda leaf: leaf.spec, decoder.parameters(config))}
    specs["heads"] = model.specs(params["heads"])
    assert_same_on_a_mesh(model.stage_2, params, specs, jax.random.randint(jax.random.key(1), (8, 8), 0, 64))


@pytest.mark.exhaustive
@pytest.mark.parametrize("head", ["jliger", "full"])
def test_orpo(import_example, head):
    llama, preference = map(import_example, ("llama", "preference"))
    config = llama.LlamaConfig(64, 16, 32, 1, 2, 2)
    loss = preference.Preference("orpo", preference.Head(head), config, 1.0, 3, end_of_text=0)
    specs = jax.tree.map(lambda leaf: leaf.spec, llama.parameters(config))
    batch = {"tokens": jax.random.randint(jax.random.key(1), (8, 9), 0, 64)}
    assert_same_on_a_mesh(loss, llama.initial_parameters(config, jax.random.key(0)), specs, batch)
