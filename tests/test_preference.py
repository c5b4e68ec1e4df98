"""examples/preference.py end to end, at sizes where a run takes seconds."""

import json
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import content, records, refusal

import jliger

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 24
HEADS = ("full", "jliger")


@pytest.fixture(scope="module")
def preference(import_example) -> ModuleType:
    return import_example("preference")


@pytest.fixture(scope="module")
def options(corpus_folder, tmp_path_factory) -> list[str]:
    """A tiny run; options given after these count instead."""
    cache = tmp_path_factory.mktemp("cache")
    text = f"--corpus {corpus_folder} --cache-dir {cache} --vocab-size 512 --heldout-fraction 0.2 --chunk-size 64"
    text += " --hidden-size 32 --layers 1 --heads 2 --batch-size 16 --length 32 --prompt-length 8 --corruption 0.5"
    text += (
        f" --pretraining-steps 60 --steps {STEPS} --warmup-steps 2 --learning-rate 0.01 --eval-every 12 --no-progress"
    )
    return text.split()


@pytest.fixture(scope="module", params=[pytest.param(loss, marks=pytest.mark.exhaustive) for loss in ("orpo", "dpo")])
def finished(preference, options, tmp_path_factory, request) -> Path:
    """A run of both heads from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / request.param
    rate = {"orpo": "0.01", "dpo": "0.003"}[request.param]
    preference.main([*options, "--loss", request.param, "--learning-rate", rate, "--out", str(out)])
    return out


def test_margin_and_accuracy_rise_on_heldout_pairs(finished):
    for head in HEADS:
        evaluations = records(finished / head, "eval")
        assert list(evaluations) == [0, 12, 24]
        before, after = evaluations[0], evaluations[STEPS]
        assert before["pairs"] == after["pairs"] > 20
        assert after["margin"] > before["margin"] + 0.05
        assert after["accuracy"] > before["accuracy"] + 0.02
        # A coin would have 0.5.
        assert after["accuracy"] > 0.6
        # The model that training begins with is the reference of DPO: no reward is anything yet.
        if finished.name == "dpo":
            assert before["margin"] == before["accuracy"] == before["chosen_reward"] == 0


def test_both_heads_have_one_curve_and_jliger_less_memory(finished):
    full, fused = (records(finished / head, "train") for head in HEADS)
    assert list(full) == list(fused) == list(range(1, STEPS + 1))
    for figure in ("loss", "margin", "chosen_reward"):
        curves = [[record[figure] for record in curve.values()] for curve in (full, fused)]
        # Parameters' rounding differences grow over the steps; the figures themselves are of order 1.
        np.testing.assert_allclose(*curves, rtol=1e-5, atol=1e-5)
    summary = json.loads((finished / "summary.json").read_text())
    heads, comparison = summary["heads"], summary["comparison"]
    assert comparison["temporary_memory_saving_percent"] > 0
    assert heads["jliger"]["memory_bytes"]["temporary"] < heads["full"]["memory_bytes"]["temporary"]
    assert summary["heldout_before"]["full"] == records(finished / "full", "eval")[0]
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_a_folder_is_overwritten_only_if_asked_for(preference, options, tmp_path, capsys):
    few = ["--steps", "3", "--pretraining-steps", "3", "--head", "jliger", "--eval-batches", "1"]
    arguments = [*options, *few, "--out", str(tmp_path / "run")]
    preference.main(arguments)
    report = capsys.readouterr().out
    assert "Margin on held-out pairs" in report
    assert "XLA temporary memory of the step" in report
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = content(tmp_path / "run")
    message = refusal(preference, arguments)
    assert "--overwrite removes it" in message
    assert "--resume" not in message
    assert content(tmp_path / "run") == before
    preference.main([*arguments, "--overwrite", "--seed", "1"])
    assert content(tmp_path / "run")["notes.txt"] == b"mine"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1


@pytest.mark.exhaustive
def test_a_diverging_run_ends_with_a_message(preference, options, tmp_path):
    arguments = [*options, "--head", "jliger", "--out", str(tmp_path / "run")]
    assert "lower learning rate" in refusal(preference, [*arguments, "--pretraining-learning-rate", "1e38"])


def test_pairs_part_after_the_prompt(preference):
    windows = np.arange(200, dtype=np.int32).reshape(10, 20)
    windows[:, 15], windows[:, 19] = 0, -1
    pairs = preference.Pairs(prompt_length=5, corruption=0.5, end_of_text=0, pool=np.arange(1000, 1100, dtype=np.int32))
    chosen, rejected = np.split(pairs(windows, [0]), 2)
    np.testing.assert_array_equal(chosen, windows)
    changed = rejected != windows
    assert not changed[:, [0, 1, 2, 3, 4, 15, 19]].any()
    assert 0.3 < changed[:, 5:15].mean() < 0.7
    assert (rejected[changed] >= 1000).all()


@pytest.mark.parametrize("loss", [pytest.param("orpo", marks=pytest.mark.exhaustive), "dpo"])
def test_only_completions_count(preference, loss):
    from llama import LlamaConfig, full_logits, hidden_states, initial_parameters

    config = LlamaConfig(64, 16, 48, 1, 2, 2)
    params = initial_parameters(config, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(0), (6, 13), 1, 64)
    of_head = {
        head: preference.Preference(loss, preference.Head(head), config, 0.3, prompt_length=4, end_of_text=0)
        for head in HEADS
    }
    found = of_head["full"].logprobs(params, tokens)
    # Of 12 labels, the tokens from the second on, the first 3 are the prompt's.
    np.testing.assert_array_equal(found.counts, 9)

    @jax.jit
    def logprobs(params):
        log_p = jax.nn.log_softmax(full_logits(config, params, hidden_states(config, params, tokens[:, :-1])))
        return jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]

    wanted = logprobs(params)
    reduce = jnp.mean if loss == "orpo" else jnp.sum
    np.testing.assert_allclose(found.logprobs, reduce(wanted[:, 3:], axis=1), rtol=1e-5)

    batch = {"tokens": tokens}
    if loss == "dpo":
        reference = wanted[:, 3:].sum(axis=1)
        np.testing.assert_allclose(of_head["jliger"].batch(tokens, params)["reference"], reference, rtol=1e-5)
        batch["reference"] = reference + jnp.array([0.5, -1, 2, 0, 1, -0.5])
    (full, *_), (fused, *_) = (jax.jit(of_head[head])(params, batch) for head in HEADS)
    np.testing.assert_allclose(fused, full, rtol=1e-6)
    if loss == "dpo":
        # The policy is the reference but for what was added to it: chosen less rejected.
        margins = -0.3 * np.array([0.5 - 0, -1 - 1, 2 + 0.5])
        np.testing.assert_allclose(full, np.log1p(np.exp(-margins)).mean(), rtol=1e-4)


@pytest.mark.exhaustive
def test_a_gpu_gets_triton_by_itself(preference):
    pytest.importorskip("jax_triton")
    pytest.importorskip("jax_cuda13_plugin")
    from llama import LlamaConfig
    from training import TrainingConfig

    config, learning = LlamaConfig(512, 16, 48, 1, 2, 2), TrainingConfig(4, 4, 16, 1e-3, 1, 0.1, 0)
    with jliger.compute_capability(90):
        of_pairs = preference.Preference("orpo", preference.Head("jliger"), config, 1.0, 4, 0)
        program = of_pairs.training(Path("unused"), learning).program
        assert "triton_kernel_call" in program.step.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "kto"], "invalid choice"),
        (["--beta", "-1"], "'-1' is not a number above 0"),
        (["--corruption", "1.5"], "must be at most 1"),
        (["--batch-size", "7"], "must be even"),
        (["--prompt-length", "33"], "leaves nothing of --length 32"),
        (["--pretraining-steps", "2"], "must be below --pretraining-steps 2"),
        (["--steps", "2"], "must be below --steps 2"),
        (["--head", "half"], "invalid choice"),
        (["--resume"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(preference, options, tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        preference.main([*options, "--out", str(out), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
