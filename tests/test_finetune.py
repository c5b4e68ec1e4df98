"""examples/finetune.py, and what it stands on against golden files of PyTorch (tests/golden/write_finetune.py)."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from pytorch_agreement import NAMES, check_a_batch, check_fifty_steps, losses_and_gradients
from tiny_checkpoint import RECORDS, write_tokenizer

pytest.importorskip("safetensors")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = Path(__file__).parent / "golden" / "finetune"


EXHAUSTIVE_GEMMA = pytest.param("gemma", marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def decoder(import_example) -> ModuleType:
    return import_example("decoder")


@pytest.fixture(scope="module")
def pretrained(import_example) -> ModuleType:
    return import_example("pretrained")


@pytest.fixture(scope="module")
def function(decoder):
    return losses_and_gradients(decoder)


# Gemma 2 has all that Gemma has.
@pytest.mark.parametrize("name", [name if name != "gemma" else EXHAUSTIVE_GEMMA for name in NAMES])
def test_logits_loss_and_gradients_are_those_of_pytorch(pretrained, function, name):
    check_a_batch(pretrained, function, GOLDEN / name)


@pytest.mark.parametrize("name", ["gemma2", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in NAMES[:-1])])
def test_fifty_steps_track_pytorch(pretrained, function, name):
    check_fifty_steps(pretrained, function, GOLDEN / name)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "gemma", folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def finetune(import_example, checkpoint, tmp_path, capsys):
    """Runs the program; returns what it printed, and its metrics."""
    program, runs = import_example("finetune"), import_example("runs")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([json.dumps(RECORDS[0]), "{", '{"instruction": "say"}', *map(json.dumps, RECORDS[1:])]))
    text = f"--model {checkpoint} --data {data} --length 64 --batch-size 2 --learning-rate 0.01 --no-progress"

    def run(name: str, *more: str):
        out = tmp_path / name
        program.main([*text.split(), "--out", str(out), *more])
        return capsys.readouterr().out, runs.read_metrics(out)

    run.folder = tmp_path
    return run


def test_a_run_learns_resumes_and_is_exported(finetune, pretrained, decoder, checkpoint):
    options = ("--steps", "8", "--eval-every", "4", "--checkpoint-every", "4")
    printed, whole = finetune("whole", *options)
    assert "2 records were left out: line 2: it is no JSON" in printed
    assert "line 3: 'output' is missing" in printed
    assert len((finetune.folder / "whole" / "left_out.txt").read_text().splitlines()) == 2
    losses = [whole["train"][step]["loss"] for step in range(1, 9)]
    assert losses[-1] < 0.9 * losses[0]
    assert whole["eval"][8]["loss"] < 0.9 * whole["eval"][0]["loss"]

    shutil.copytree(finetune.folder / "whole", finetune.folder / "resumed")
    shutil.rmtree(finetune.folder / "resumed" / "checkpoints" / "8")
    _, resumed = finetune("resumed", *options, "--resume")
    assert resumed["train"][5]["seconds"] != whole["train"][5]["seconds"]
    assert [resumed["train"][step]["loss"] for step in range(1, 9)] == losses

    config = pretrained.read_config(checkpoint)
    exported = [finetune.folder / name / "model" for name in ("whole", "resumed")]
    first, second = (pretrained.load(folder, config, "float32") for folder in exported)
    before = pretrained.load(checkpoint, config, "float32")
    for one, other, old in zip(*map(jax.tree.leaves, (first, second, before)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.array_equal(one, old)
    assert (exported[0] / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_adapters_merged_and_as_peft_has_them(finetune, import_example, pretrained, decoder, checkpoint):
    """The merged folder, with a head of its own, gives the logits of base and adapters."""
    options = ("--steps", "3", "--lora-rank", "2", "--lora-targets", "attention", "head", "--eval-fraction", "0")
    finetune("run", *options)
    shutil.copytree(finetune.folder / "run" / "model", finetune.folder / "merged")
    # A finished run can be exported again.
    finetune("run", *options, "--resume", "--export", "adapter")
    config = pretrained.read_config(checkpoint)
    untied = pretrained.read_config(finetune.folder / "merged")
    assert (config.tie_embeddings, untied.tie_embeddings) == (True, False)
    base = pretrained.load(checkpoint, config, "float32")
    merged = pretrained.load(finetune.folder / "merged", untied, "float32")

    import safetensors.numpy

    folder = finetune.folder / "run" / "model"
    about = json.loads((folder / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (2, 4.0)
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * (4 * config.layers + 1)

    def product(name: str) -> np.ndarray:
        a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        return 2.0 * b @ a

    for layer in range(config.layers):
        name = f"model.layers.{layer}.self_attn.o_proj"
        delta = (merged["layers"]["attention_out"] - base["layers"]["attention_out"])[layer].reshape(-1, 16).T
        np.testing.assert_allclose(delta, product(name), atol=1e-6)
        assert np.abs(delta).max() > 1e-4
    np.testing.assert_allclose(merged["head"] - base["embedding"].T, product("lm_head").T, atol=1e-6)
    np.testing.assert_array_equal(merged["embedding"], base["embedding"])


def test_a_row_of_several_examples_is_the_examples(import_example, pretrained, decoder, finetune):
    """Segments and positions keep packed examples apart, also where attention has a window and a softcap."""
    instructions = import_example("instructions")
    generator = np.random.default_rng(0)
    examples = []
    for size in (9, 7, 12, 3):
        ids = generator.integers(1, 64, size + 1).astype(np.int32)
        examples.append((ids[:-1], ids[1:]))
    packed, single = (instructions.pack(examples, 16, is_packed) for is_packed in (True, False))
    assert (len(packed), len(single)) == (2, 4)
    tuning = import_example("tuning")
    config = pretrained.read_config(GOLDEN / "gemma2")
    params = pretrained.load(GOLDEN / "gemma2", config, "float32")
    of = dict(config=config, head="full", rank=0, alpha=0, groups=(), dtype="float32", mesh=None, head_options={})
    loss, count = jax.jit(tuning.Tuning(is_packed=True, **of).loss)(params, packed)
    expected, same_count = jax.jit(tuning.Tuning(is_packed=False, **of).loss)(params, single)
    assert count == same_count == 31
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
