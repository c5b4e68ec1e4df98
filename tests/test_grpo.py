"""examples/grpo.py end to end, at sizes where a run takes seconds."""

import json
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import content, records

import jliger

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 30
HEADS = ("full", "jliger")


@pytest.fixture(scope="module")
def grpo(import_example) -> ModuleType:
    return import_example("grpo")


@pytest.fixture(scope="module")
def options() -> list[str]:
    """A tiny run; options given after these count instead."""
    text = "--depth 2 --kinds 2 --vocab-size 512 --hidden-size 32 --layers 1 --heads 2 --prompts 8 --group 16"
    text += f" --chunk-size 64 --steps {STEPS} --learning-rate 0.006 --eval-every 10 --eval-prompts 16 --no-progress"
    return text.split()


@pytest.fixture(scope="module")
def finished(grpo, options, tmp_path_factory) -> Path:
    """A run of both heads from beginning to end, with a reference."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    grpo.main([*options, "--beta", "0.001", "--out", str(out)])
    return out


@pytest.mark.exhaustive
def test_the_reward_rises_from_nothing(finished):
    for head in HEADS:
        rewards = [record["reward"] for record in records(finished / head, "train").values()]
        assert rewards[0] < 0.1
        assert np.mean(rewards[-5:]) > 0.45
        evaluations = records(finished / head, "eval")
        assert list(evaluations) == [0, 10, 20, 30]
        assert evaluations[STEPS]["reward"] > 0.45
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_both_heads_have_one_curve_and_jliger_less_memory(finished):
    full, fused = (records(finished / head, "train") for head in HEADS)
    assert list(full) == list(fused) == list(range(1, STEPS + 1))
    for figure in ("loss", "entropy", "kl", "reward"):
        curves = [[record[figure] for record in curve.values()] for curve in (full, fused)]
        # What both learn from is the same; parameters' rounding differences grow over the steps.
        np.testing.assert_allclose(*curves, rtol=1e-3, atol=2e-4)
    summary = json.loads((finished / "summary.json").read_text())
    heads, comparison = summary["heads"], summary["comparison"]
    assert comparison["largest_difference"] < 2e-4
    assert comparison["agreeing_steps"] == STEPS
    assert set(heads) == set(HEADS)
    if jax.default_backend() == "cpu":
        # 512 columns are few: where chunks are padded for the device there is nothing to save.
        assert comparison["temporary_memory_saving_percent"] > 0
        assert heads["jliger"]["memory_bytes"]["temporary"] < heads["full"]["memory_bytes"]["temporary"]


def test_how_long_two_runs_are_one(grpo):
    figures = {"entropy": 1.0, "reward": 0.5}
    full, fused = (
        {
            "train": {step + 1: {"loss": loss, **figures} for step, loss in enumerate(curve)},
            "eval": {4: {"reward": reward}},
        }
        for curve, reward in (([1.0, 2.0, 3.0, 4.0], 0.25), ([1.01, 1.99, 3.5, 4.0], 0.5))
    )
    found = grpo.compare(full, fused, tolerance=0.1)
    assert found["agreeing_steps"] == 2
    assert found["largest_difference_of_evaluations"] == 0.25


@pytest.mark.exhaustive
def test_a_head_alone_samples_for_itself(grpo, options, finished, tmp_path, capsys):
    few = ["--beta", "0.001", "--head", "jliger", "--steps", "3"]
    arguments = [*options, *few, "--out", str(tmp_path / "run")]
    grpo.main(arguments)
    report = capsys.readouterr().out
    assert "Mean reward of sampled answers" in report
    assert "XLA temporary memory of the step" in report
    # From the same seed as the other run's full logits, before rounding could turn a token.
    alone, other = (records(run, "train") for run in (tmp_path / "run" / "jliger", finished / "full"))
    assert alone[1]["reward"] == other[1]["reward"]
    before = content(tmp_path / "run")
    with pytest.raises(SystemExit, match="--overwrite removes it"):
        grpo.main(arguments)
    assert content(tmp_path / "run") == before
    grpo.main([*arguments, "--overwrite", "--seed", "1"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1


@pytest.mark.exhaustive
def test_a_diverging_run_ends_with_a_message(grpo, options, tmp_path):
    with pytest.raises(SystemExit, match="lower learning rate"):
        grpo.main([*options, "--head", "jliger", "--learning-rate", "1e38", "--out", str(tmp_path / "run")])


def test_completions_are_the_models_own(grpo):
    """A token at a time with unfinished sequences, or all at once: the same choices."""
    config = grpo.LlamaConfig(64, 16, 48, 2, 2, 2)
    params = grpo.initial_parameters(config, jax.random.key(1))
    prompts = jax.random.randint(jax.random.key(0), (5, 3), 0, 64)
    policy = grpo.Policy(grpo.Head("full"), config, grpo.GrpoConfig(), prompt_length=3)
    tokens = grpo.sample(policy, params, prompts, 4)
    assert tokens.shape == (5, 7)
    np.testing.assert_array_equal(tokens[:, :3], prompts)
    logits = jax.jit(lambda tokens: grpo.full_logits(config, params, grpo.hidden_states(config, params, tokens)))(
        tokens[:, :-1]
    )
    np.testing.assert_array_equal(tokens[:, 3:], logits[:, 2:].argmax(axis=-1))


def test_advantages_compare_answers_of_one_prompt(grpo):
    advantages = grpo.group_advantages(np.array([1, 0, 0.5, 0.5, 3, 3, 3, 3], np.float32), 4)
    np.testing.assert_allclose(advantages, [2**0.5, -(2**0.5), 0, 0, 0, 0, 0, 0], atol=1e-3)


@pytest.mark.parametrize("entropy_coef", [pytest.param(0.0, marks=pytest.mark.exhaustive), 0.1])
def test_losses_and_gradients_of_both_heads(grpo, entropy_coef):
    model = grpo.LlamaConfig(64, 16, 48, 1, 2, 2)
    params = grpo.initial_parameters(model, jax.random.key(1))
    keys = jax.random.split(jax.random.key(0), 4)
    old = -4 + 0.3 * jax.random.normal(keys[1], (6, 12))
    batch = {
        "tokens": jax.random.randint(keys[0], (6, 13), 0, 64),
        "advantages": jax.random.normal(keys[2], (6,)),
        "old": old,
        "reference": old + 0.2 * jax.random.normal(keys[3], (6, 12)),
    }
    config = grpo.GrpoConfig(temperature=0.7, beta=0.1, entropy_coef=entropy_coef)
    results = {}
    for head in HEADS:
        policy = grpo.Policy(grpo.Head(head), model, config, prompt_length=5)
        step = jax.jit(jliger.accumulate_gradients(policy, 1))
        results[head] = step(params, batch)
    ((full, _, full_metrics), full_grads), ((fused, _, fused_metrics), fused_grads) = (results[head] for head in HEADS)
    np.testing.assert_allclose(fused, full, rtol=1e-5)
    np.testing.assert_allclose(fused_metrics.entropy, full_metrics.entropy, rtol=1e-5)
    assert full_metrics.count == 6 * 8
    for one, other in zip(jax.tree.leaves(fused_grads), jax.tree.leaves(full_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())

    # Over full logits, written out: the temperature divides them, and prompts don't count.
    @jax.jit
    def written_out(params):
        hidden = grpo.hidden_states(model, params, batch["tokens"][:, :-1])
        log_p = jax.nn.log_softmax(grpo.full_logits(model, params, hidden) / 0.7)
        logprobs = jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        ratios, distance = jnp.exp(logprobs - old), batch["reference"] - logprobs
        advantages = batch["advantages"][:, None]
        losses = -jnp.minimum(ratios * advantages, jnp.clip(ratios, 0.8, 1.2) * advantages)
        losses += 0.1 * (jnp.exp(distance) - distance - 1) + entropy_coef * jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return losses[:, 4:].mean()

    np.testing.assert_allclose(full, written_out(params), rtol=1e-5)


def test_brackets_are_closed_from_the_last_one(grpo):
    task = grpo.Brackets(depth=3, kinds=4)
    assert task.tokens == 9
    prompts = task.prompts(50, np.random.default_rng(0))
    assert prompts.shape == (50, 4)
    assert set(prompts[:, :3].ravel()) == {0, 1, 2, 3}
    assert (prompts[:, 3] == 8).all()
    answers = np.array([[0, 1, 3, 8, 7, 5, 4], [0, 1, 3, 8, 4, 5, 7], [0, 0, 0, 8, 4, 4, 9]])
    assert [task.text(tokens) for tokens in answers] == ["([<=>])", "([<=)]>", "(((=))·"]
    np.testing.assert_allclose(task.rewards(answers), [1, 1 / 3, 2 / 3], rtol=1e-6)


@pytest.mark.exhaustive
def test_a_gpu_gets_triton_by_itself(grpo):
    pytest.importorskip("jax_triton")
    pytest.importorskip("jax_cuda13_plugin")
    model, config = grpo.LlamaConfig(512, 16, 48, 1, 2, 2), grpo.GrpoConfig(beta=0.1, entropy_coef=0.1, prompts=2)
    policy = grpo.Policy(grpo.Head("jliger"), model, config, 4)
    with jliger.compute_capability(90):
        program = policy.program(4)
        assert "triton_kernel_call" in program.step.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "1"], "of 2 or more"),
        (["--kinds", "5"], "there are 4"),
        (["--vocab-size", "4"], "the task needs 5"),
        (["--hidden-size", "10", "--heads", "4"], "must be an even multiple of --heads 4"),
        (["--temperature", "0"], "'0' is not a number above 0"),
        (["--beta", "nan"], "'nan' is not a number of 0 or more"),
        (["--seed", str(2**31)], "must be below 2**31"),
        (["--head", "half"], "invalid choice"),
        (["--resume"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(grpo, options, tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        grpo.main([*options, "--out", str(out), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
