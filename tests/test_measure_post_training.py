"""examples/measure.py with losses after pretraining, and the sweep over it, with a tiny model."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import jax
import pytest

import jliger

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = ["--config", "tiny", "--sequences", "8", "--length", "32", "--dtype", "float32", "--chunk-size", "64"]
FIGURES = {"milliseconds": 1.0, "tokens_per_second": 100.0, "model_flop_utilisation": 0.5}


@pytest.fixture(scope="module")
def measure(import_example) -> ModuleType:
    return import_example("measure")


@pytest.fixture(scope="module")
def sweep(import_example) -> ModuleType:
    return import_example("sweep_post_training")


def measured(measure, folder, loss, head):
    """The file that a measurement of one head leaves."""
    file = folder / f"{head}.json"
    # GPUs round float32 operands of products otherwise.
    with jax.default_matmul_precision("highest"):
        measure.main([*SMALL, "--what", loss, "--head", head, "--prompt-length", "8", "--out", str(file)])
    return json.loads(file.read_text())


def test_a_step_is_a_record(measure, tmp_path, capsys):
    found = measured(measure, tmp_path, "dpo", "jliger")
    assert "dpo, jliger: " in capsys.readouterr().out
    (record,) = found["records"]
    # One step to warm up and two that are timed, each of which changes the parameters.
    assert len(set(record["losses"])) == 3
    assert record["tokens_per_second"] == pytest.approx(8 * 32 / (record["milliseconds"] / 1e3))
    assert record["out_of_memory"] is False
    if jax.default_backend() == "cpu":
        # It keeps no account of its memory, and its peak rate is not known.
        assert record["peak_bytes"] is record["model_flop_utilisation"] is None
    assert found["environment"]["parameters"] > 1e6


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", ["dpo", "grpo"])
def test_both_heads_take_the_same_steps(measure, tmp_path, loss):
    full, fused = (measured(measure, tmp_path, loss, head)["records"][0] for head in ("full", "jliger"))
    assert fused["losses"] == pytest.approx(full["losses"], rel=1e-5)
    assert fused["memory_bytes"]["temporary"] < full["memory_bytes"]["temporary"]


@pytest.mark.exhaustive
def test_a_gpu_gets_triton_by_itself(measure):
    pytest.importorskip("jax_triton")
    pytest.importorskip("jax_cuda13_plugin")
    args = measure.parse_args([*SMALL, "--what", "grpo", "--head", "jliger", "--out", "record.json"])
    config = replace(measure.CONFIGS["tiny"], dtype="bfloat16")
    with jliger.compute_capability(90):
        program, _ = measure.program_of(args, config, "grpo", 32, 1)
        assert "triton_kernel_call" in program.step.lower(lowering_platforms=("cuda",)).as_text()


def test_out_of_memory_is_a_record_and_a_code(measure, tmp_path, monkeypatch):
    import runs

    def refuse(*_):
        raise measure.DeviceMemoryError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(sys.modules["measuring"], "compile_step", refuse)
    file = tmp_path / "record.json"
    with pytest.raises(SystemExit) as ended:
        measure.main([*SMALL, "--what", "orpo", "--head", "full", "--out", str(file)])
    assert ended.value.code == runs.OUT_OF_MEMORY_EXIT
    (record,) = json.loads(file.read_text())["records"]
    assert record["out_of_memory"] is True
    assert "RESOURCE_EXHAUSTED" in record["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "orpo", "--sequences", "3"], "must be even for orpo"),
        (["--what", "grpo", "--prompt-length", "33"], "leaves nothing of --length 32"),
        (["--what", "kto"], "invalid choice"),
        (["--what", "grpo", "--config", "llama9"], "invalid choice"),
    ],
)
def test_bad_arguments(measure, tmp_path, capsys, arguments, message):
    file = tmp_path / "record.json"
    with pytest.raises(SystemExit) as ended:
        measure.main([*SMALL, "--head", "full", "--out", str(file), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.exhaustive
def test_a_sweep_of_processes_that_wait_for_one_another(measure, sweep, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    file = tmp_path / "sweep.json"
    arguments = ["--out", str(file), "--losses", "orpo", "--no-progress"]
    sweep.main([*arguments, "--", *SMALL])
    found = json.loads(file.read_text())
    assert [(record["loss"], record["head"]) for record in found["records"]] == [("orpo", "jliger"), ("orpo", "full")]
    assert found["environment"]["command"].startswith("python examples/sweep_post_training.py --out")
    text = file.with_suffix(".txt").read_text()
    # The head's own line, with the share that it saves.
    assert text.splitlines()[1].endswith("%")
    assert "full logits" in text.splitlines()[2]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="--overwrite replaces it"):
        sweep.main(arguments)
    file.with_suffix(".txt").unlink()
    sweep.main([*arguments, "--plot-only"])
    assert file.with_suffix(".txt").read_text() == text


def test_a_sweep_finds_the_largest_size_that_full_logits_fit(sweep, tmp_path, monkeypatch):
    tried = []

    def run_child(name, program, arguments, timeout):
        value = {name: arguments[place + 1] for place, name in enumerate(arguments[:-1])}  # the last of its name counts
        tried.append((name, value["--rows"]))
        fits = value["--head"] == "jliger" or value["--rows"] <= 20
        record = {"loss": value["--what"], "head": value["--head"], "sequences": value["--rows"]}
        record |= {"config": "tiny", "parameters": "float32", "dtype": "bfloat16", "length": 8, "prompt_length": 0}
        record |= {**FIGURES, "out_of_memory": not fits, "peak_bytes": 1}
        environment = {"bytes_limit": None, "versions": {}, "parameters": 1, "device": "x", "devices": 1}
        return {"environment": {**environment, "python": "", "xla_flags": ""}, "records": [record]}

    monkeypatch.setattr(sweep, "run_child", run_child)
    out = tmp_path / "sweep.json"
    sweep.main(["--out", str(out), "--losses", "dpo", "--largest", "16", "28", "20", "--no-progress"])
    assert tried == [("dpo, full", 28), ("dpo, full", 20), ("dpo, jliger", 20)]
    records = json.loads(out.read_text())["records"]
    assert [(record["head"], record["sequences"]) for record in records] == [("jliger", 20), ("full", 20)]


@pytest.mark.exhaustive
def test_a_sweep_whose_processes_fail(sweep, tmp_path, capfd):
    with pytest.raises(SystemExit, match="nothing was measured"):
        sweep.main(["--out", str(tmp_path / "none.json"), "--losses", "orpo", "--heads", "full", "--", "--no-such"])
    assert "the process of orpo, full ended with code 2" in capfd.readouterr().err


def test_the_saving_is_of_the_peak_with_full_logits(sweep):
    import sweeps

    records = [
        {"loss": "orpo", "head": "jliger", "peak_bytes": 30 * sweeps.GIB},
        {"loss": "orpo", "head": "full", "peak_bytes": 60 * sweeps.GIB},
        {"loss": "grpo", "head": "jliger", "peak_bytes": None},
        {"loss": "grpo", "head": "full", "out_of_memory": True},
    ]
    memory = {"temporary": sweeps.GIB, "total": 2 * sweeps.GIB}
    records = [{"out_of_memory": False, "memory_bytes": memory, **FIGURES, **record} for record in records]
    saved = [sweeps.saving(records, "loss", record) for record in records]
    assert saved == ["50.0%", "-", "-", "-"]
    assert sweeps.memory_of(records[2]) == 2 * sweeps.GIB


def test_files_of_the_same_conditions_can_be_merged(sweep, tmp_path):
    environment = {"bytes_limit": None, "versions": {}, "parameters": 1, "device": "x", "devices": 4, "xla_flags": ""}
    environment |= {"python": "", "command": "python a"}
    record = {"config": "tiny", "parameters": "float32", "dtype": "bfloat16", "length": 8, "prompt_length": 0}
    record |= {**FIGURES, "out_of_memory": False, "peak_bytes": None, "memory_bytes": {"temporary": 1, "total": 2}}

    def file(name, loss, length=8, **about):
        path = tmp_path / f"{name}.json"
        records = [{**record, "loss": loss, "head": head, "length": length} for head in ("jliger", "full")]
        path.write_text(json.dumps({"environment": {**environment, **about}, "records": records}))
        return str(path)

    first, second = file("first", "orpo"), file("second", "grpo", command="python b")
    out = tmp_path / "merged.json"
    sweep.main(["--out", str(out), "--merge", first, second])
    results = json.loads(out.read_text())
    assert [record["loss"] for record in results["records"]] == ["orpo", "orpo", "grpo", "grpo"]
    assert results["environment"] == {**environment, "command": "python a; python b"}
    assert out.with_suffix(".txt").read_text().endswith("\npython a\npython b\n")
    others = [(file("third", "dpo", xla_flags="-"), "xla_flags differ"), (first, "both have jliger")]
    others += [(file("fourth", "dpo", length=9), "length differ"), (str(tmp_path / "no.json"), "there is no results")]
    for other, message in others:
        with pytest.raises(SystemExit, match=message):
            sweep.main(["--out", str(tmp_path / "none.json"), "--merge", first, other])
    assert not (tmp_path / "none.json").exists()
