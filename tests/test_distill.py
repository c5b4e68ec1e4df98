"""examples/distill.py end to end, at sizes where a run takes seconds."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import content, interruption, losses

import jliger

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 16


@pytest.fixture(scope="module")
def distill(import_example) -> ModuleType:
    return import_example("distill")


@pytest.fixture(scope="module")
def options(corpus_folder, tmp_path_factory) -> list[str]:
    """A tiny run; options given after these count instead."""
    cache = tmp_path_factory.mktemp("cache")
    text = f"--corpus {corpus_folder} --cache-dir {cache} --vocab-size 512 --heldout-fraction 0.2 --student-tokens 2500"
    text += " --hidden-size 16 --layers 1 --heads 2 --batch-size 8 --length 64 --chunk-size 64 --no-progress"
    text += f" --steps {STEPS} --warmup-steps 2 --learning-rate 0.03 --checkpoint-every 8 --eval-every 8"
    text += " --teacher-hidden-size 32 --teacher-layers 1 --teacher-heads 2 --teacher-steps 60"
    text += " --teacher-learning-rate 0.01 --eval-batches 2"
    return text.split()


@pytest.fixture(scope="module")
def finished(distill, options, tmp_path_factory) -> Path:
    """A run with both heads from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    distill.main([*options, "--out", str(out), "--teacher-top-k", "32", "--top-k-dir", str(out.parent / "top k")])
    return out


@pytest.mark.exhaustive
def test_the_teacher_helps_and_jliger_takes_less_memory(finished):
    summary = json.loads((finished / "summary.json").read_text())
    models = summary["models"]
    teacher, alone, distilled = (models[name]["heldout"]["loss"] for name in ("teacher", "alone", "distilled"))
    # By a multiple of what the two heads' rounding comes to.
    assert teacher < distilled < alone - 0.02
    assert models["teacher"]["parameters"] > models["alone"]["parameters"] == models["distilled"]["parameters"]
    full, fused = losses(finished / "distilled" / "full"), losses(finished / "distilled" / "jliger")
    assert list(full) == list(fused) == list(losses(finished / "alone")) == list(range(1, STEPS + 1))
    # A loss near 4 has a spacing of 5e-7; the parameters' rounding differences grow over the steps by then.
    np.testing.assert_allclose(list(fused.values()), list(full.values()), rtol=1e-5)
    heads = summary["heads"]
    assert heads["jliger"]["memory_bytes"]["temporary"] < heads["full"]["memory_bytes"]["temporary"]
    assert heads["jliger"]["heldout"]["loss"] == pytest.approx(heads["full"]["heldout"]["loss"], rel=1e-5)
    assert summary["comparison"]["total_memory_saving_percent"] > 0
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_a_few_log_probabilities_do_for_a_teacher(finished):
    summary = json.loads((finished / "summary.json").read_text())
    alone, distilled, top_k = (summary["models"][name] for name in ("alone", "distilled", "top_k"))
    # 32 of 512 columns: not the same loss, but closer to the whole teacher's student than to the one without.
    change = top_k["heldout"]["loss"] - distilled["heldout"]["loss"]
    assert abs(change) < (alone["heldout"]["loss"] - distilled["heldout"]["loss"]) / 2
    # There is no teacher in the step.
    assert top_k["memory_bytes"]["arguments"] < distilled["memory_bytes"]["arguments"]
    ids, logprobs = (np.load(finished.parent / "top k" / f"{name}.npy") for name in ("ids", "logprobs"))
    counted = (ids >= 0).all(axis=-1)
    assert ids.shape == (39, 64, 32)
    assert 0.9 < counted.mean() <= 1
    assert (np.diff(logprobs, axis=-1) <= 0).all()
    assert (np.exp(logprobs[counted]).sum(axis=-1) < 1).all()
    assert not logprobs[~counted].any()
    assert summary["top_k"]["bytes"] == ids.nbytes + logprobs.nbytes


def test_other_log_probabilities_than_the_runs_are_refused(distill, tmp_path):
    from runs import RunError

    header, rows = {"model": "small", "tokenizer": "one", "k": 2, "temperature": 1.0}, np.zeros((3, 5), np.int32)
    found = jliger.LinearTopK(np.ones((2, 4, 2), np.int32), np.zeros((2, 4, 2), np.float32), np.zeros((2, 4)))
    files = distill.teacher_top_k
    assert files.read(tmp_path, header) is None
    files.write(tmp_path, header, rows, lambda tokens: found, batch_size=2, quiet=True)
    stored, arrays = files.read(tmp_path, header)
    assert stored["seconds"] > 0
    assert arrays["ids"].shape == (3, 4, 2)
    with pytest.raises(
        RunError, match=r"model was small and is large, temperature was 1\.0 and is 2\.0\. Name another"
    ):
        files.read(tmp_path, header | {"model": "large", "temperature": 2.0})
    (tmp_path / "ids.npy").write_bytes(b"damaged")
    with pytest.raises(RunError, match="cannot be read"):
        files.read(tmp_path, header)


@pytest.mark.exhaustive
def test_resuming_a_finished_run_shows_its_report_again(distill, options, finished, capsys):
    before = content(finished / "distilled")
    distill.main([*options, "--out", str(finished), "--resume", "--teacher-top-k", "32"])
    report = capsys.readouterr().out
    assert "With the teacher the student's held-out loss is lower" in report
    assert "% saved" in report
    assert "the same curve to float32 rounding" in report
    assert "The 32 largest log-probabilities of each token are 0.6 MB on disk" in report
    assert content(finished / "distilled") == before


@pytest.mark.parametrize(
    ("config", "tie_embeddings"),
    [
        pytest.param(("forward", 0.5, 1.0, 0.5), False, marks=pytest.mark.exhaustive),
        (("reverse", 0.5, 2.0, 0.25), True),
        pytest.param(("jsd", 0.3, 1.5, 0.0), False, marks=pytest.mark.exhaustive),
    ],
)
def test_both_losses_are_one(distill, config, tie_embeddings):
    from llama import initial_parameters

    configs = [distill.LlamaConfig(96, size, 8, 1, 2, 2, tie_embeddings) for size in (16, 24)]
    student, teacher = (initial_parameters(each, jax.random.key(seed)) for seed, each in enumerate(configs))
    # Larger, so that the two are far apart.
    teacher = jax.tree.map(lambda leaf: 4 * leaf, teacher)
    tokens = np.random.default_rng(0).integers(1, 96, (3, 21))
    # Ends of text, and what has no token.
    tokens[1, 5], tokens[2, 9:] = 0, -1
    heads = (distill.Head("full"), distill.Head("jliger", chunk_size=8))
    of_heads = [distill.Distillation(head, *configs, distill.DistillationConfig(*config), 0) for head in heads]
    with jax.default_matmul_precision("highest"):
        ((full, count), full_grads), ((fused, _), fused_grads) = (
            jax.jit(jax.value_and_grad(loss, has_aux=True))(student, jnp.asarray(tokens), teacher) for loss in of_heads
        )
    # Neither the label after an end of text counts, nor one that is no token.
    assert count == 20 + 19 + 8
    np.testing.assert_allclose(fused, full, rtol=2e-6)
    for one, other in zip(jax.tree.leaves(fused_grads), jax.tree.leaves(full_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.exhaustive
def test_a_gpu_gets_triton_by_itself(distill, options):
    pytest.importorskip("jax_triton")
    pytest.importorskip("jax_cuda13_plugin")
    with jliger.compute_capability(90):
        args = distill.parse_args([*options, "--head", "jliger"])
        _, students = distill.build_trainings(args, distill.options.corpus_of(args))
        step = students["distilled/jliger"].program.step
        assert "triton_kernel_call" in step.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.exhaustive
def test_another_run_in_its_place_takes_the_teacher_from_the_cache(distill, options, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "notes.txt").write_text("mine")
    arguments = [*options, "--out", str(out), "--overwrite", "--head", "jliger", "--divergence", "jsd"]
    distill.main([*arguments, "--temperature", "2", "--hard-weight", "0"])
    assert "teacher: from " in capsys.readouterr().out
    assert losses(out / "alone") == losses(finished / "alone")
    assert losses(out / "distilled" / "jliger") != losses(finished / "distilled" / "jliger")
    assert not (out / "distilled" / "full").exists()
    assert (out / "notes.txt").read_text() == "mine"
    summary, before = (json.loads((run / "summary.json").read_text()) for run in (out, finished))
    assert summary["models"]["teacher"] == before["models"]["teacher"]
    assert list(summary["heads"]) == ["jliger"]


@pytest.mark.exhaustive
def test_a_teacher_that_cannot_be_read_is_trained_anew(distill, options, finished, tmp_path, capsys):
    cache = Path(options[options.index("--cache-dir") + 1])
    copied = shutil.copytree(cache, tmp_path / "cache")
    (teacher,) = copied.glob("teacher-*")
    for path in [path for path in teacher.rglob("*") if path.is_file()]:
        path.write_bytes(b"\x00damaged")
    out = tmp_path / "run"
    distill.main([*options, "--out", str(out), "--cache-dir", str(copied), "--head", "jliger"])
    assert "teacher: from " not in capsys.readouterr().out
    assert losses(teacher) == losses(next(cache.glob("teacher-*")))
    assert losses(out / "distilled" / "jliger") == losses(finished / "distilled" / "jliger")
    assert [path.name for path in copied.glob("*teacher-*")] == [teacher.name]


@pytest.mark.exhaustive
def test_resuming_a_killed_run_gives_the_uninterrupted_curves(
    distill, options, finished, tmp_path, monkeypatch, capsys
):
    import training

    out = tmp_path / "run"
    write = training.write_metrics

    def kill(folder, event, step, **values):
        if event == "train" and step == 11 and (out / "distilled").exists():
            raise KeyboardInterrupt
        write(folder, event, step, **values)

    arguments = [*options, "--out", str(out), "--head", "jliger"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_metrics", kill)
        assert "--resume" in interruption(distill, arguments, capsys)
    assert list(losses(out / "distilled" / "jliger")) == list(range(1, 11))
    distill.main([*arguments, "--resume"])
    for folder in ("alone", "distilled/jliger"):
        # To the bit: the same program on the same numbers.
        assert losses(out / folder) == losses(finished / folder)


@pytest.mark.exhaustive
def test_a_run_is_not_overwritten_unasked(distill, options, finished, tmp_path):
    before = content(finished)
    arguments = [*options, "--out", str(finished)]
    with pytest.raises(SystemExit, match=r"--resume.*--overwrite"):
        distill.main(arguments)
    with pytest.raises(SystemExit, match=r"teacher_steps was 60 and is 70, temperature was 1\.0 and is 2\.0"):
        distill.main([*arguments, "--resume", "--temperature", "2", "--teacher-steps", "70"])
    assert content(finished) == before
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(SystemExit, match="no run"):
        distill.main([*options, "--out", str(tmp_path), "--overwrite"])
    assert content(tmp_path) == {"thesis.txt": b"the only copy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "'0' is not a number above 0"),
        (["--hard-weight", "1.5"], "must be at most 1"),
        (["--hard-weight", "-1"], "'-1' is not a number of 0 or more"),
        (["--beta", "1"], "must be below 1"),
        (["--teacher-top-k", "257"], "must be at most 256"),
        (["--teacher-top-k", "8", "--divergence", "jsd"], "with --divergence forward"),
        (["--divergence", "sideways"], "invalid choice"),
        (["--head", "half"], "invalid choice"),
        (["--teacher-hidden-size", "10", "--teacher-heads", "4"], "must be an even multiple of --teacher-heads 4"),
        (["--teacher-steps", "2"], "--warmup-steps 2 must be below --teacher-steps 2"),
        (["--student-tokens", "0"], "'0' is not a whole number above 0"),
        (["--resume", "--overwrite"], "not allowed with"),
    ],
)
def test_bad_arguments(distill, options, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        distill.main([*options, "--out", str(tmp_path / "run"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_too_few_tokens_for_a_student(distill, options, tmp_path):
    with pytest.raises(SystemExit, match="fewer than one window"):
        distill.main([*options, "--out", str(tmp_path / "run"), "--student-tokens", "64"])
    assert not (tmp_path / "run").exists()
