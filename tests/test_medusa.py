"""examples/medusa.py, at sizes where a run takes seconds, and whole."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import losses
from tiny_checkpoint import write_tokenizer

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = "--hidden-size 16 --layers 1 --heads 2 --vocab-size 300 --batch-size 2 --length 16 --prompts 3 --prompt-length 4"
STEPS = "--new-tokens 6 --eval-batches 1 --backbone-steps 2 --stage-1-steps 2 --stage-2-steps 2 --no-progress"
OPTIONS = f"{TINY} {STEPS}".split()


@pytest.fixture(scope="module")
def medusa(import_example) -> ModuleType:
    return import_example("medusa")


@pytest.fixture
def run(medusa, corpus_folder, tmp_path):
    """Runs the program; returns its folder and its summary."""

    def run_it(*more: str):
        out = tmp_path / "run"
        folders = ["--corpus", str(corpus_folder), "--cache-dir", str(tmp_path / "cache"), "--out", str(out)]
        medusa.main([*OPTIONS, *folders, *more])
        return out, json.loads((out / "summary.json").read_text())

    return run_it


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a folder as Hugging Face has it, of a tiny model of this type."""

    def make(name: str) -> str:
        folder = tmp_path / "checkpoint"
        shutil.copytree(Path(__file__).parent / "golden" / "finetune" / name, folder)
        write_tokenizer(folder)
        return str(folder)

    return make


def test_two_steps(run, checkpoint):
    """Of a decoder that is there already: the steps of one that is trained from scratch take as long to compile."""
    out, summary = run("--head", "jliger", "--medusa-heads", "2", "--stages", "1", "--model", checkpoint("llama"))
    assert list(losses(out / "2_heads" / "stage_1" / "jliger")) == [1, 2]
    before, after = (each["loss"] for each in summary["evaluations"])
    # The decoder is frozen, and each head learns.
    assert before[0] == after[0]
    assert all(new < old for new, old in zip(after[1:], before[1:], strict=True))
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_text_for_a_decoder_from_scratch(medusa, corpus_folder, tmp_path):
    args = medusa.parse_args([*OPTIONS, "--corpus", str(corpus_folder), "--cache-dir", str(tmp_path)])
    text, config = medusa.text_of(args)
    assert (config.vocab_size, config.hidden_size, config.head_size) == (300, 16, 8)
    assert text.prompts.shape == (3, 4)
    assert [batch.shape for batch in text.batches] == [(2, 17)]
    assert text.train.max() < 300


@pytest.mark.exhaustive
def test_two_steps_of_each_stage(run):
    out, summary = run("--head", "jliger", "--medusa-heads", "2")
    assert [list(losses(out / "2_heads" / f"stage_{stage}" / "jliger")) for stage in (1, 2)] == [[1, 2], [1, 2]]
    assert [(each["heads"], each["after"]) for each in summary["evaluations"]] == [
        (2, "no training"),
        (2, "stage 1"),
        (2, "stage 2"),
    ]
    before, frozen, after = (each["loss"] for each in summary["evaluations"])
    # Stage 2 changes the decoder, stage 1 does not.
    assert before[0] == frozen[0] != after[0]


@pytest.mark.exhaustive
def test_both_ways_to_compute_the_losses_agree(run):
    _, summary = run("--medusa-heads", "1", "3")
    assert len(summary["records"]) == 8
    assert all(record["apart"] < 1e-5 for record in summary["records"] if record["head"] == "jliger")


@pytest.fixture(scope="module")
def model(import_example, medusa):
    """A decoder whose likeliest tokens differ from place to place, and heads, of which some guesses are right."""
    speculation = import_example("speculation")
    config = medusa.DecoderConfig(8, 16, 16, 1, 2, 2, 8)
    model = speculation.Medusa(config, 2, speculation.Head("jliger"), end_of_text=0)

    def shapes():
        backbone = medusa.decoder.initial_parameters(config, jax.random.key(0))
        return {"backbone": backbone, "heads": model.initial_parameters(backbone)}

    # NumPy's numbers take no compilation.
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(leaf.dtype), jax.eval_shape(shapes))
    return model, jax.tree.map(jnp.asarray, params)


def test_speculative_decoding_gives_the_tokens_of_greedy_decoding(medusa, model):
    model, params = model
    prompts = np.random.default_rng(1).integers(8, size=(16, 3), dtype=np.int32)
    tokens, found, passes = map(np.asarray, model.speculate(params, prompts, 12))
    assert tokens.shape == (16, 15)
    np.testing.assert_array_equal(tokens[:, :3], prompts)

    @jax.jit
    def own_tokens(backbone, tokens):
        hidden = model.hidden_states(backbone, tokens)
        return medusa.decoder.full_logits(model.config, backbone, hidden).argmax(axis=-1)

    own = own_tokens(params["backbone"], tokens)
    np.testing.assert_array_equal(tokens[:, 3:], own[:, 2:-1])
    # Some guesses are accepted and some are not; no row goes on when it is done.
    assert len(set(passes.tolist())) > 1
    assert ((found >= 12) & (found <= 14)).all()
    assert (passes <= found).all()
    assert (3 * passes >= found).all()


def test_labels_stay_in_their_document(model):
    model, _ = model
    labels = jax.jit(model.labels)(jnp.array([[5, 6, 0, 7, 4, -1]]))
    none = -100
    expected = [[6, 0, none, 4, none, none], [0, none, none, none, none, none], [none] * 6]
    np.testing.assert_array_equal(labels[:, 0], expected)


@pytest.mark.exhaustive
def test_the_frozen_stage_has_no_gradient_of_the_backbone(model):
    model, params = model
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 1, 8)
    of_backbone = jax.grad(lambda backbone: model.stage_2({**params, "backbone": backbone}, tokens)[0])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_backbone(params["backbone"])))
    of_heads = jax.grad(lambda heads: model.stage_1(heads, tokens, params["backbone"])[0])(params["heads"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_heads))


@pytest.mark.exhaustive
def test_a_checkpoint_is_the_decoder(run, checkpoint):
    _, summary = run("--model", checkpoint("gemma2"), "--medusa-heads", "1", "--stages", "1")
    assert summary["logit_softcap"] is not None
    assert all(record["apart"] < 1e-4 for record in summary["records"] if record["head"] == "jliger")


@pytest.mark.exhaustive
def test_heads_are_good_for_something(medusa, tmp_path):
    """The example as it is, with one head: under three minutes on an idle machine with two cores."""
    jax.config.update("jax_disable_most_optimizations", False)
    out = tmp_path / "run"
    medusa.main(["--head", "jliger", "--no-progress", "--out", str(out), "--cache-dir", str(tmp_path / "cache")])
    evaluations = json.loads((out / "summary.json").read_text())["evaluations"]
    for count in (3, 5):
        before, first, second = (each for each in evaluations if each["heads"] == count)
        assert before["acceptance_length"] < first["acceptance_length"]
        assert before["acceptance_length"] < second["acceptance_length"]
        assert all(new > old for new, old in zip(first["accuracy"][1:], before["accuracy"][1:], strict=True))


@pytest.mark.exhaustive
def test_both_ways_are_measured_in_the_cases_that_are_asked_for(import_example, tmp_path):
    program, shapes = map(import_example, ("measure_medusa", "shapes"))
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", {**shapes.SHAPES["llama-3-8b"], **sizes, **heads})
        records = {}
        for head in ("full", "jliger"):
            file = tmp_path / f"{head}.json"
            own = ["--head", head, "--cases", "1:1:2", "2:2:4", "--length", "8", "--timed-steps", "1"]
            own += ["--dtype", "float32", "--param-dtype", "float32", "--", str(file)]
            program.main(["--shape", "tiny", *own])
            records[head] = json.loads(file.read_text())["records"]
    for full, fused in zip(*records.values(), strict=True):
        assert fused["losses"] == pytest.approx(full["losses"], rel=1e-5)
        assert fused["memory_bytes"]["temporary"] < full["memory_bytes"]["temporary"]
    assert [record["case"] for record in records["full"]] == ["1 heads, stage 1, batch 2", "2 heads, stage 2, batch 4"]


def test_bad_arguments(medusa, tmp_path, capsys):
    refused = [
        (["--medusa-heads", "17"], "at most 16"),
        (["--mesh", "fsdp=4"], "--batch-size 2: 4 devices of --mesh can't share it"),
        (["--devices", "4"], "--devices 4 goes with --mesh, such as fsdp=4"),
        (["--mesh", "data=2"], "--prompts 3: 2 devices of --mesh can't share it"),
    ]
    for arguments, message in refused:
        with pytest.raises(SystemExit) as ended:
            medusa.main([*OPTIONS, *arguments, "--out", str(tmp_path / "run")])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
