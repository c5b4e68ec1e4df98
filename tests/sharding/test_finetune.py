"""The step of examples/finetune.py on a mesh: parameters are read into their shards, and the loss is the same."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from sharded import example_mesh

pytest.importorskip("safetensors")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = Path(__file__).parents[1] / "golden" / "finetune"


@pytest.mark.parametrize("name", ["qwen2", pytest.param("gemma2", marks=pytest.mark.exhaustive)])
def test_a_sharded_step(import_example, name):
    decoder, pretrained, tuning = map(import_example, ("decoder", "pretrained", "tuning"))
    config, folder = pretrained.read_config(GOLDEN / name), GOLDEN / name
    expected = np.load(folder / "expected.npz")
    tokens, labels = (np.concatenate([expected[key]] * 4) for key in ("tokens", "labels"))
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    rows = np.stack([tokens, labels, np.ones_like(tokens), places], axis=1)
    mesh = example_mesh()
    own = tuning.Tuning(config, "jliger", 0, 0.0, (), "float32", True, mesh, {})
    with jax.set_mesh(mesh):
        params = pretrained.load(folder, config, "float32", own.sharding)
        for leaf, described in zip(*map(jax.tree.leaves, (params, decoder.parameters(config))), strict=True):
            assert leaf.sharding == NamedSharding(mesh, described.spec)
        (loss, weight), gradients = jax.jit(jax.value_and_grad(own.loss, has_aux=True))(params, own.on_devices(rows))
    np.testing.assert_allclose(loss / weight, expected["loss"], rtol=1e-6)
    theirs = pretrained.load(folder / "gradients", config, "float32")
    for ours, other in zip(*map(jax.tree.leaves, (gradients, theirs)), strict=True):
        np.testing.assert_allclose(ours / weight, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.exhaustive
@pytest.mark.parametrize("head", ["jliger", "full"])
def test_one_layer_is_gathered_at_a_time(import_example, head):
    """A step keeps its state sharded, and gathers a layer's matrices, and the embedding where it is the last layer."""
    decoder, pretrained, tuning = map(import_example, ("decoder", "pretrained", "tuning"))
    config = pretrained.read_config(GOLDEN / "gemma")
    mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    own = tuning.Tuning(config, head, 0, 0.0, (), "float32", True, mesh, {})
    optimizer = optax.adamw(1e-3)
    with jax.set_mesh(mesh):
        program = own.program(optimizer, lambda: None, batch_size=8, length=16)
        compiled = program.step.lower().compile()
    state, _ = compiled.output_shardings
    specs = jax.tree.map(lambda leaf: leaf.spec, own.trained())
    assert jax.tree.map(lambda leaf: leaf.spec, state["parameters"]) == specs
    assert state["optimizer"][0].mu == state["optimizer"][0].nu == state["parameters"]
    gathers = [one for one in collectives(compiled.as_text()) if one.kind == "all-gather" and one.dtype == "f32"]
    of_a_layer = {leaf.shape for leaf in decoder.layer_parameters(config).values() if leaf.is_matrix}
    assert {one.shape for one in gathers if one.in_loop} == of_a_layer
    assert {one.shape for one in gathers if not one.in_loop} == {(config.vocab_size, config.hidden_size)}
