"""examples/vlm_sft.py, at sizes where a run takes seconds, and whole."""

import json
from functools import partial
from types import ModuleType

import jax
import numpy as np
import pytest
from example_runs import losses, records

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY_RUN = "--hidden-size 32 --layers 1 --heads 2 --vocab-size 64 --batch-size 4 --eval-words 5 --no-progress"
TINY = TINY_RUN.split()


@pytest.fixture(scope="module")
def vlm_sft(import_example) -> ModuleType:
    return import_example("vlm_sft")


@pytest.fixture(scope="module")
def reader(vlm_sft):
    args = vlm_sft.parse_args([*TINY, "--head", "jliger"])
    return vlm_sft.Reader(vlm_sft.model_of(args), vlm_sft.VisionConfig(), vlm_sft.Head("jliger"))


def test_two_steps(vlm_sft, corpus_folder, tmp_path, monkeypatch):
    # A second layer of the images' encoder would be a loop to compile.
    monkeypatch.setattr(vlm_sft, "VisionConfig", partial(vlm_sft.VisionConfig, layers=1))
    out = tmp_path / "run"
    vlm_sft.main([*TINY, "--head", "jliger", "--corpus", str(corpus_folder), "--steps", "2", "--out", str(out)])
    assert list(losses(out / "jliger")) == [1, 2]
    assert list(records(out / "jliger", "eval")) == [0, 2]
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_two_steps_of_both_heads(vlm_sft, corpus_folder, tmp_path, capsys):
    out = tmp_path / "run"
    vlm_sft.main([*TINY, "--corpus", str(corpus_folder), "--steps", "2", "--out", str(out)])
    full, fused = (losses(out / head) for head in ("full", "jliger"))
    assert list(full) == [1, 2]
    np.testing.assert_allclose(list(fused.values()), list(full.values()), rtol=1e-5)
    assert "for the first 2 of 2 steps" in capsys.readouterr().out


def test_only_answers_count(vlm_sft, reader):
    tokens = np.asarray([reader.tokens_of("bad"), reader.tokens_of("words")])
    labels, images = np.asarray(jax.jit(reader.labels)(tokens)), reader.vision.tokens
    assert (labels[:, :images] == -100).all()
    end = vlm_sft.END
    assert labels[0, images:].tolist() == [1, 0, 3, end] + [-100] * (reader.length - images - 4)
    assert [vlm_sft.text_of(row[row >= 0]) for row in labels] == ["bad", "words"]


def test_an_image_has_rows_and_columns_and_a_text_has_one_place(reader):
    columns, rows, time = np.asarray(reader.positions(1))[:, 0]
    grid = reader.vision.grid
    assert (rows[: reader.vision.tokens] * grid[1] + columns[: reader.vision.tokens]).tolist() == list(range(12))
    assert not time[: reader.vision.tokens].any()
    text = np.stack([columns, rows, time])[:, reader.vision.tokens :]
    assert (text == max(grid) + np.arange(text.shape[1])).all()


@pytest.mark.exhaustive
def test_an_answer_depends_on_its_image_and_not_on_what_is_behind(vlm_sft, reader):
    params = reader.initial_parameters(0)
    batch = reader.batch(["words", "read"], np.random.default_rng(0))
    image = vlm_sft.vision.encode(reader.vision, params["vision"], batch["pixels"])
    hidden = reader.hidden_states(params["decoder"], image, batch["tokens"])
    swapped = reader.hidden_states(params["decoder"], image[::-1], batch["tokens"])
    assert not np.allclose(hidden[:, reader.vision.tokens :], swapped[:, reader.vision.tokens :], atol=1e-3)
    cut = batch["tokens"].copy()
    cut[:, reader.vision.tokens + 2 :] = vlm_sft.END
    same = reader.hidden_states(params["decoder"], image, cut)[:, : reader.vision.tokens + 2]
    np.testing.assert_allclose(same, hidden[:, : reader.vision.tokens + 2], atol=1e-6)


@pytest.mark.exhaustive
def test_words_that_were_never_seen_are_read(vlm_sft, tmp_path):
    """The example as it is, with one head: under three minutes on an idle machine with two cores."""
    jax.config.update("jax_disable_most_optimizations", False)
    vlm_sft.main(["--head", "jliger", "--no-progress", "--out", str(tmp_path / "run")])
    heldout = json.loads((tmp_path / "run" / "summary.json").read_text())["heads"]["jliger"]["heldout"]
    assert heldout["exact_match"] > 0.5
    assert heldout["exact_match_of_other_images"] < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "28"], "the task needs 29"),
        (["--hidden-size", "10", "--heads", "4"], "must be an even multiple of --heads 4"),
    ],
)
def test_bad_arguments(vlm_sft, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        vlm_sft.main([*TINY, "--out", str(tmp_path / "run"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
