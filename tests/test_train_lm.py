"""examples/train_lm.py end to end, at sizes where a run takes seconds."""

import json
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from example_runs import content, interruption, losses, refusal

import jliger

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 12


@pytest.fixture(scope="module")
def train_lm(import_example) -> ModuleType:
    return import_example("train_lm")


@pytest.fixture(scope="module")
def options(corpus_folder, tmp_path_factory) -> list[str]:
    """A tiny run; options given after these count instead."""
    cache = tmp_path_factory.mktemp("cache")
    text = f"--corpus {corpus_folder} --cache-dir {cache} --vocab-size 512 --heldout-fraction 0.2"
    text += " --hidden-size 16 --layers 1 --heads 2 --batch-size 8 --length 64 --chunk-size 64 --no-progress"
    text += (
        f" --steps {STEPS} --warmup-steps 2 --learning-rate 0.03 --checkpoint-every 4 --eval-every 6 --eval-batches 2"
    )
    return text.split()


@pytest.fixture(scope="module")
def finished(train_lm, options, tmp_path_factory) -> Path:
    """A run of both heads from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train_lm.main([*options, "--out", str(out)])
    return out


def test_both_heads_have_one_curve_and_jliger_less_memory(finished):
    full, fused = losses(finished / "full"), losses(finished / "jliger")
    assert list(full) == list(fused) == list(range(1, STEPS + 1))
    # A loss near 6 has a spacing of 5e-7; the parameters' rounding differences grow over the steps by then.
    np.testing.assert_allclose(list(fused.values()), list(full.values()), rtol=1e-5)
    assert full[STEPS] < full[1] - 0.5
    summary = json.loads((finished / "summary.json").read_text())
    heads, comparison = summary["heads"], summary["comparison"]
    assert comparison["temporary_memory_saving_percent"] > 0
    assert comparison["total_memory_saving_percent"] > 0
    assert heads["jliger"]["memory_bytes"]["temporary"] < heads["full"]["memory_bytes"]["temporary"]
    assert heads["jliger"]["heldout"]["loss"] == pytest.approx(heads["full"]["heldout"]["loss"], rel=1e-5)
    assert 0 < heads["jliger"]["heldout"]["accuracy"] < 1
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_both_heads_side_by_side(train_lm, options, finished, capsys):
    before = content(finished / "jliger")
    train_lm.main([*options, "--out", str(finished), "--resume"])
    report = capsys.readouterr().out
    assert "full logits" in report
    assert "% saved" in report
    assert "the same curve to float32 rounding" in report
    assert content(finished / "jliger") == before


@pytest.mark.exhaustive
def test_tied_embeddings_in_bfloat16(train_lm, options, tmp_path, capsys):
    out = tmp_path / "run"
    train_lm.main([*options, "--out", str(out), "--steps", "4", "--tie-embeddings", "--dtype", "bfloat16"])
    assert "the same curve to bfloat16 rounding" in capsys.readouterr().out
    full, fused = losses(out / "full"), losses(out / "jliger")
    # bfloat16 keeps 8 bits: each hidden state and logit is rounded by up to 2**-9 of itself.
    np.testing.assert_allclose(list(fused.values()), list(full.values()), rtol=2e-2)


def test_a_gpu_gets_triton_by_itself(train_lm, options):
    pytest.importorskip("jax_triton")
    pytest.importorskip("jax_cuda13_plugin")
    from language_model import Head, language_model_loss
    from llama import LlamaConfig
    from training import TrainingConfig, text_training

    config, learning = LlamaConfig(512, 16, 48, 1, 2, 2), TrainingConfig.of(train_lm.parse_args(options))
    tokens = np.zeros(1000, np.int32)
    with jliger.compute_capability(90):
        loss_fn = language_model_loss(Head("jliger"), config)
        program = text_training("jliger", Path("unused"), loss_fn, config, learning, tokens).program
        assert "triton_kernel_call" in program.step.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.exhaustive
def test_resuming_a_killed_run_gives_the_uninterrupted_curve(
    train_lm, options, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    killed_at = 7
    training = sys.modules["training"]
    write = training.write_metrics

    def kill(folder, event, step, **values):
        if event == "train" and step == killed_at:
            raise KeyboardInterrupt
        write(folder, event, step, **values)

    arguments = [*options, "--out", str(out), "--head", "jliger"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_metrics", kill)
        assert "--resume" in interruption(train_lm, arguments, capsys)
    assert list(losses(out / "jliger")) == list(range(1, killed_at))
    with (out / "jliger" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    # As if killed between the checkpoint and its manifest.
    (out / "jliger" / "checkpoints" / "4" / "sha256.json").unlink()
    train_lm.main([*arguments, "--resume"])
    assert "jliger: continues from step 4\n" in capsys.readouterr().out
    # To the bit: the same program on the same numbers.
    assert losses(out / "jliger") == losses(finished / "jliger")
    lines = (out / "jliger" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}") and '"train"' in line]
    # From the checkpoint of step 4, and nothing was taken out of the file.
    assert steps == [*range(1, killed_at), *range(5, STEPS + 1)]


def largest_file(folder: Path) -> Path:
    """The one that holds the arrays."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bytes(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    stored = bytearray(path.read_bytes())
    middle = len(stored) // 2
    stored[middle : middle + 4] = bytes(255 - byte for byte in stored[middle : middle + 4])
    path.write_bytes(stored)


def truncate(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    path.write_bytes(path.read_bytes()[:100])


def remove_arrays(checkpoint: Path) -> None:
    largest_file(checkpoint).unlink()


def damage_metadata(checkpoint: Path) -> None:
    (checkpoint / "_CHECKPOINT_METADATA").write_text("{")


def damage_all(checkpoint: Path) -> None:
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        path.write_bytes(b"\x00damaged")


@pytest.mark.parametrize(
    "damage",
    [
        flip_bytes,
        *(
            pytest.param(damage, marks=pytest.mark.exhaustive)
            for damage in (truncate, remove_arrays, damage_metadata, damage_all)
        ),
    ],
)
def test_a_corrupt_checkpoint_is_named_and_left_alone(train_lm, options, finished, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    checkpoint = out / "jliger" / "checkpoints" / str(STEPS)
    damage(checkpoint)
    before = content(out)
    message = refusal(train_lm, [*options, "--out", str(out), "--head", "jliger", "--resume"])
    assert f"step {STEPS}" in message
    assert str(checkpoint) in message
    assert "continue from step 8" in message
    assert content(out) == before


@pytest.mark.exhaustive
def test_going_on_from_the_checkpoint_before_a_corrupt_one(train_lm, options, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.move(out / "jliger" / "checkpoints" / str(STEPS), tmp_path / "moved away")
    train_lm.main([*options, "--out", str(out), "--head", "jliger", "--resume"])
    assert losses(out / "jliger") == losses(finished / "jliger")
    assert (out / "jliger" / "checkpoints" / str(STEPS)).is_dir()


def test_an_existing_run_is_not_overwritten(train_lm, options, finished):
    before = content(finished)
    message = refusal(train_lm, [*options, "--out", str(finished)])
    assert "--resume" in message
    assert "--overwrite" in message
    assert content(finished) == before


def test_files_that_are_no_run_are_not_overwritten(train_lm, options, tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    for flags in ([], ["--overwrite"]):
        assert "no run" in refusal(train_lm, [*options, "--out", str(tmp_path), *flags])
    assert content(tmp_path) == {"thesis.txt": b"the only copy"}
    assert "is a file" in refusal(train_lm, [*options, "--out", str(tmp_path / "thesis.txt")])


def test_resume_needs_a_run_with_the_same_settings(train_lm, options, finished, tmp_path):
    before = content(finished)
    message = refusal(train_lm, [*options, "--out", str(finished), "--resume", "--seed", "1", "--hidden-size", "32"])
    assert "seed was 0 and is 1" in message
    assert "hidden_size was 16 and is 32" in message
    assert content(finished) == before
    assert "no run" in refusal(train_lm, [*options, "--out", str(tmp_path / "absent"), "--resume"])
    assert not (tmp_path / "absent").exists()


@pytest.mark.exhaustive
def test_overwrite_starts_anew_and_keeps_other_files(train_lm, options, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "notes.txt").write_text("mine")
    train_lm.main([*options, "--out", str(out), "--head", "full", "--overwrite", "--stop-at", "2"])
    assert losses(out / "full") == {step: losses(finished / "full")[step] for step in (1, 2)}
    assert not (out / "jliger").exists()
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.exhaustive
def test_a_diverging_run_ends_with_a_message_and_its_checkpoints(train_lm, options, tmp_path):
    arguments = [*options, "--out", str(tmp_path), "--head", "full", "--learning-rate", "1e38"]
    assert "lower learning rate" in refusal(train_lm, arguments)
    assert (tmp_path / "full" / "metrics.jsonl").exists()


def test_a_warmup_that_is_not_given_fits(train_lm):
    for steps, warmup in ((1, 0), (5, 0), (40, 4), (100, 10), (1000, 10)):
        assert train_lm.parse_args(["--steps", str(steps)]).warmup_steps == warmup
    assert train_lm.parse_args(["--steps", "5", "--warmup-steps", "4"]).warmup_steps == 4


def test_ctrl_c_waits_for_a_checkpoint(train_lm):
    done, before = [], signal.getsignal(signal.SIGINT)

    @sys.modules["checkpoints"].interrupted_afterwards()
    def save():
        signal.raise_signal(signal.SIGINT)
        done.append("written")

    with pytest.raises(KeyboardInterrupt):
        save()
    assert done == ["written"]
    assert signal.getsignal(signal.SIGINT) is before


def test_more_memory_is_not_called_saved(train_lm):
    saved = sys.modules["reporting"].saved
    assert [saved(15.34), saved(-15.34)] == ["15.3 % saved", "15.3 % more"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "'0' is not a whole number above 0"),
        (["--batch-size", "2.5"], "'2.5' is not a whole number above 0"),
        (["--learning-rate", "nan"], "'nan' is not a number above 0"),
        (["--seed", "-1"], "'-1' is not a whole number of 0 or more"),
        (["--head", "half"], "invalid choice"),
        (["--vocab-size", "100"], "needs 257 or more"),
        (["--heldout-fraction", "1"], "must be below 1"),
        (["--hidden-size", "10", "--heads", "4"], "must be an even multiple of --heads 4"),
        (["--steps", "5", "--warmup-steps", "5"], "must be below --steps 5"),
        (["--stop-at", "13"], "beyond --steps 12"),
        (["--resume", "--overwrite"], "not allowed with"),
    ],
)
def test_bad_arguments(train_lm, options, tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        train_lm.main([*options, "--out", str(out), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_corpus_that_cannot_be_used(train_lm, options, tmp_path):
    out = tmp_path / "run"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "blank.txt").write_text("\n \n")
    (empty / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (empty / "image.png").write_text("not text by its name")
    arguments = [*options, "--out", str(out), "--corpus"]
    assert "the corpus is empty" in refusal(train_lm, [*arguments, str(empty)])
    assert "does not exist" in refusal(train_lm, [*arguments, str(tmp_path / "absent")])
    (empty / "short.txt").write_text("x")
    assert "too short" in refusal(train_lm, [*arguments, str(empty)])
    (empty / "short.txt").write_text("three short lines\nand no more\nthan that\n")
    assert "fewer than one window" in refusal(train_lm, [*arguments, str(empty), "--heldout-fraction", "0.3"])
    assert not out.exists()


def test_the_corpus_is_split_by_file_and_cached(train_lm, corpus_folder, tmp_path):
    import corpus

    documents = corpus.read_documents([corpus_folder], 1_000_000)
    assert len(documents) == 24
    train, heldout = corpus.split_heldout(documents, 0.2)
    assert sorted(train + heldout) == sorted(documents)
    share = sum(map(len, heldout)) / sum(map(len, documents))
    assert 0.2 <= share < 0.3
    loads = {"vocab_size": 400, "max_bytes": 20_000, "heldout_fraction": 0.2, "cache_dir": tmp_path}
    first = corpus.load_corpus([corpus_folder], **loads)
    assert first.vocab_size == 400
    text = f"a document may spell {corpus.END_OF_TEXT} out: \N{SNOWMAN}"
    tokens = corpus.encode(first.tokenizer, [text])
    assert list(tokens).index(first.end_of_text) == len(tokens) - 1
    assert first.tokenizer.decode(tokens.tolist()) == text
    for damaged in ([], list(tmp_path.iterdir())):
        for path in damaged:
            path.write_bytes(b"damaged")
        again = corpus.load_corpus([corpus_folder], **loads)
        np.testing.assert_array_equal(again.train, first.train)
        np.testing.assert_array_equal(again.heldout, first.heldout)
        assert again.digest == first.digest


def test_batches_by_number(train_lm):
    import corpus

    tokens = np.arange(10 * 8 + 1, dtype=np.int32)
    batches = corpus.Batches(corpus.windows(tokens, 8), batch_size=4, seed=3)
    taken = [batches[step] for step in range(5)]
    # Two epochs of ten windows, each window once per epoch, in two orders.
    starts = np.concatenate([batch[:, 0] for batch in taken]) // 8
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(10))
    assert list(starts[:10]) != list(starts[10:])
    again = corpus.Batches(corpus.windows(tokens, 8), batch_size=4, seed=3)
    np.testing.assert_array_equal(again[3], taken[3])
    padded = corpus.heldout_batches(tokens[:20], batch_size=4, length=8, count=9)
    assert len(padded) == 1
    assert (padded[0][2:] == -1).all()
    assert (padded[0][:2] >= 0).all()
