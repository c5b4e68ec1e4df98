"""examples/finetune.py, and what it stands on against golden files of PyTorch (tests/golden/write_finetune.py)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from example_runs import refusal
from pytorch_agreement import NAMES, check_a_batch, check_fifty_steps, losses_and_gradients
from tiny_checkpoint import RECORDS, write_tokenizer

safetensors = pytest.importorskip("safetensors.numpy")
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
    # A checkpoint that cannot be read costs no earlier run.
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"there is no .*; transformers writes one"):
        finetune("whole", *options, "--overwrite")
    assert exported[0].exists()


def test_adapters_merged_and_as_peft_has_them(import_example, decoder, pretrained, checkpoint, tmp_path):
    """The merged folder, with a head of its own, has the logits and the loss of base and adapters."""
    adapters, exporting = import_example("adapters"), import_example("exporting")
    config, rank, scale = pretrained.read_config(checkpoint), 2, 1.5
    base = pretrained.load(checkpoint, config, "float32")
    generator = np.random.default_rng(0)
    described = adapters.adapter_parameters(config, rank)
    own = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32) / 4, described)
    exporting.export_model(tmp_path / "merged", checkpoint, config, base, own, scale)
    untied = pretrained.read_config(tmp_path / "merged")
    assert (config.tie_embeddings, untied.tie_embeddings) == (True, False)
    merged = pretrained.load(tmp_path / "merged", untied, "float32")

    def logits_and_loss(config, params, adapters, tokens, labels):
        hidden = decoder.hidden_states(config, params, tokens, adapters=adapters, adapter_scale=scale)
        logits = decoder.full_logits(config, params, hidden, adapters, scale)
        return logits, decoder.loss_sum("jliger", config, params, hidden, labels, adapters, scale)

    function, expected = jax.jit(logits_and_loss, static_argnums=0), np.load(GOLDEN / "gemma" / "expected.npz")
    batch = expected["tokens"], expected["labels"]
    logits, loss = function(config, base, own, *batch)
    merged_logits, merged_loss = function(untied, merged, None, *batch)
    np.testing.assert_allclose(logits, merged_logits, atol=1e-5)
    np.testing.assert_allclose(loss, merged_loss, rtol=1e-6)
    assert np.abs(logits - expected["logits"]).max() > 0.1

    exporting.export_adapter(tmp_path / "peft", checkpoint, config, own, rank, scale * rank)
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], len(about["target_modules"])) == (2, 3.0, 8)
    tensors = safetensors.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * (7 * config.layers + 1)
    a, b = (tensors[f"base_model.model.model.layers.1.self_attn.o_proj.lora_{letter}.weight"] for letter in "AB")
    difference = (merged["layers"]["attention_out"] - base["layers"]["attention_out"])[1]
    np.testing.assert_allclose(difference.reshape(-1, config.hidden_size).T, scale * b @ a, atol=1e-6)


@pytest.mark.exhaustive
def test_a_run_of_adapters(finetune, pretrained, checkpoint):
    options = ("--steps", "6", "--lora-rank", "2", "--lora-targets", "attention", "head", "--accumulate", "2")
    _, metrics = finetune("run", *options)
    assert metrics["train"][6]["loss"] < 0.95 * metrics["train"][1]["loss"]
    merged = pretrained.read_config(finetune.folder / "run" / "model")
    assert merged == replace(pretrained.read_config(checkpoint), tie_embeddings=False)
    # A finished run can be exported again.
    finetune("run", *options, "--resume", "--export", "adapter")
    tensors = safetensors.load_file(finetune.folder / "run" / "model" / "adapter_model.safetensors")
    assert len(tensors) == 2 * (4 * merged.layers + 1)


def test_a_random_checkpoint_and_its_data_can_be_used(import_example, pretrained, tmp_path):
    program, instructions = import_example("random_checkpoint"), import_example("instructions")
    folder = tmp_path / "random"
    program.main(["--out", str(folder)])
    config = pretrained.read_config(folder)
    assert pretrained.load(folder, config, "float32")["head"].shape == (config.hidden_size, config.vocab_size)
    data = instructions.read_dataset(folder / "data.jsonl", instructions.ModelTokenizer(folder), 128)
    assert len(data.examples) > 200
    assert not data.problems
    assert "--overwrite writes into it" in refusal(program, ["--out", str(folder)])


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


def test_only_comparable_batches_are_compared(import_example):
    """Speed at different batches is compared only if full logits filled the memory; memory only at the same batch."""
    sweep = import_example("sweep_finetune")

    def record(head, batch, gib):
        memory = {"memory_bytes": {"total": gib * 2**30}, "peak_bytes": None}
        speed = {"tokens_per_second": 100.0 + 10 * (head == "jliger")}
        return {"shape": "a", "lora_rank": 0, "head": head, "batch": batch, "out_of_memory": False, **memory, **speed}

    def of(gib):
        records = [record("full", 8, 1), record("full", 16, gib), record("jliger", 16, 5), record("jliger", 64, 70)]
        rows = sweep.compared({"environment": {"bytes_limit": 80 * 2**30}, "records": records})
        assert [(row["head"], row["batch"]) for row in rows] == [("full", 16), ("jliger", 16), ("jliger", 64)]
        return [(row["faster"], row["saved"]) for row in rows[1:]]

    assert of(20) == [(pytest.approx(0.1), 0.75), (None, None)]
    assert of(75) == [(pytest.approx(0.1), pytest.approx(1 - 5 / 75)), (pytest.approx(0.1), None)]


def test_a_model_measured_again_replaces_its_own_records_alone(import_example, tmp_path, monkeypatch):
    sweep = import_example("sweep_finetune")
    about = {"device": "a", "devices": 1, "versions": {}, "xla_flags": "", "bytes_limit": None}
    figures = {"milliseconds": 1.0, "tokens_per_second": 1.0, "memory_bytes": {"total": 1}, "peak_bytes": None}
    common = {"length": 8, "dtype": "float32", "param_dtype": "float32", "head": "full", "out_of_memory": False}

    def child(name, program, arguments, timeout, variables):
        record = {"shape": name, "lora_rank": arguments[3], "batch": child.batch, **common, **figures}
        return {"environment": {**about, "python": "3"}, "records": [record]}

    monkeypatch.setattr(sweep, "run_child", child)
    monkeypatch.setattr(sweep, "plot", lambda *given, **options: None)
    out = tmp_path / "finetune.json"
    models = ["--models", "qwen3-0.6b"]
    for child.batch, more in (1, ["llama-3-8b:16"]), (2, ["--add"]):
        sweep.main(["--out", str(out), *models, *more])
    found = json.loads(out.read_text())
    assert [(each["shape"], each["batch"]) for each in found["records"]] == [("llama-3-8b", 1), ("qwen3-0.6b", 2)]
    command = "python examples/sweep_finetune.py --out finetune.json --models qwen3-0.6b"
    commands = [f"{command} llama-3-8b:16", f"{command} --add"]
    assert [each["command"] for each in found["records"]] == commands
    assert found["environment"]["command"] == "; ".join(commands)
    assert out.with_suffix(".txt").read_text().strip().endswith("; ".join(commands))
    # Nothing that was measured is lost by accident, or mixed with another device's figures.
    about["device"] = "b"
    common["length"] = 9
    for more, message in ([], "--overwrite replaces it"), (["--add"], "device was a and is b, length was 8 and is 9"):
        assert message in refusal(sweep, ["--out", str(out), *models, *more])
    assert json.loads(out.read_text()) == found


@pytest.fixture
def measure(import_example, monkeypatch) -> ModuleType:
    """examples/measure_finetune.py, with the tiny Llama in place of a shape, on a device that knows its memory."""
    measure = import_example("measure_finetune")
    monkeypatch.setitem(measure.SHAPES, "llama-3-8b", import_example("runs").read_json(GOLDEN / "llama/config.json"))
    monkeypatch.setattr(measure, "device_memory", {"bytes_limit": 1_000_000}.get)
    return measure


@pytest.mark.parametrize(
    ("fixed", "of_a_row", "tried"), [(200_000, 10_000, [40, 76]), (0, 200_000, [40, 4]), (0, 23_000, [40])]
)
def test_the_largest_batch_is_found(measure, monkeypatch, tmp_path, fixed, of_a_row, tried):
    """The compiler's account of one batch says which one fills the memory; it is not tried if the first nearly does."""
    args = measure.parse_args(["--shape", "llama-3-8b", "--batch", "1", "--length", "8", str(tmp_path)])
    tuning = measure.tuning_of(args, "full", None)

    def prepare(args, tuning, batch_size):
        memory = {"total": fixed + batch_size * of_a_row, "arguments": fixed, "aliased": 0}
        return measure.Prepared(tuning, batch_size, None, measure.Compiled(None, 0.0, memory, "xla"))

    batches = []
    monkeypatch.setattr(measure, "prepare", lambda *given: batches.append(given[-1]) or prepare(*given))
    assert measure.largest(args, tuning, 40).batch_size == tried[-1]
    assert batches == tried


@pytest.mark.exhaustive
def test_steps_are_measured(measure, tmp_path):
    arguments = ["--shape", "llama-3-8b", "--length", "8", "--batch", "2", "--largest", "full", "jliger"]
    measure.main([*arguments, "--timed-steps", "2", "--", str(tmp_path / "record.json")])
    records = json.loads((tmp_path / "record.json").read_text())["records"]
    assert [record["head"] for record in records[:4]] == ["jliger", "full"] * 2
    batches = [record["batch"] for record in records]
    assert batches[:2] == [2, 2]
    assert batches[2] == batches[3] > 2
    full = records[3]["memory_bytes"]["total"]
    assert measure.NEAR * 1_000_000 <= full <= 1_000_000
    assert all(record["tokens_per_second"] > 0 and len(record["losses"]) == 3 for record in records)
