"""examples/study.py with a tiny model: every switch, offloading, and what a run writes."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from example_runs import interruption, refusal

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = {"model": "tiny", "batch": 2, "length": 16, "dtype": "float32", "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def study(import_example) -> ModuleType:
    return import_example("study")


def losses(study, **options):
    """The losses of three steps."""
    setup = study.Setup(**{**SMALL, **options})
    step, tokens, found = study.step_of(setup), setup.tokens(), []
    with jax.default_matmul_precision("highest"):
        compiled, state = step.traced.lower().compile(), step.begin()
        for _ in range(3):
            state, loss = step.step(compiled, state, tokens)
            found.append(float(loss))
    return found, state


@pytest.mark.exhaustive
def test_switches_remat_and_offloading_change_no_loss(study):
    plain, _ = losses(study)
    # A wrong gradient would show in the next loss.
    offloaded, state = losses(study, kernels=study.ALL, is_remat=True, offload=study.OFFLOADS)
    assert plain[0] - plain[-1] > 0.1
    assert offloaded == pytest.approx(plain, rel=2e-6)
    kinds = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)]
    assert kinds == ["pinned_host"] * len(kinds)


def test_an_mlp_in_chunks_computes_the_same(study, import_example):
    mlp = import_example("study_model").mlp
    shapes = {"x": (2, 16, 64), "gate": (64, 192), "up": (64, 192), "down": (192, 64)}
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape, np.float32) / 8 for name, shape in shapes.items()}
    x = weights.pop("x")
    with jax.default_matmul_precision("highest"):
        plain, tiled = (mlp(study.Setup(**SMALL, kernels=names), x, weights) for names in ((), ("tiled_mlp",)))
    np.testing.assert_allclose(tiled, plain, rtol=1e-5, atol=1e-6)


def test_out_of_memory_is_recorded_and_the_next_is_tried(study, tmp_path, monkeypatch):
    memory = {(): None, ("rope",): 30, ("flce",): 10, ("rms_norm",): 20}
    attempts = []

    class Step:
        beside = 0

        def __init__(self, setup):
            self.traced = setup

        def begin(self):
            return jax.numpy.zeros(3)

        def step(self, compiled, state, tokens):
            return compiled(state)

    def compile_step(setup):
        attempts.append(setup.kernels)
        if memory[setup.kernels] is None:
            raise study.DeviceMemoryError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

        def run(state):
            if setup.kernels == ("rms_norm",):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return state + 1, state.sum()

        amounts = {"total": memory[setup.kernels], "temporary": 1}
        return training.Compiled(run, 0.1, amounts, "xla")

    training = sys.modules["training"]
    monkeypatch.setattr(study, "step_of", Step)
    monkeypatch.setattr(study, "compile_step", compile_step)
    # The last one is larger than one that does not fit, and is not tried.
    setups = [asdict(study.Setup(**SMALL, kernels=kernels)) for kernels in memory]
    setups.append(asdict(study.Setup(**{**SMALL, "batch": 3})))
    file = tmp_path / "records.json"
    arguments = ["--steps", "2", "--no-progress", "--setups", json.dumps(setups)]
    study.main([*arguments, "--records", str(file)])
    records = json.loads(file.read_text())["records"]
    # By memory; what could not be compiled comes last, after one more attempt.
    order = [("flce",), ("rms_norm",), ("rope",), ()]
    assert [(tuple(r["kernels"]), r["out_of_memory"]) for r in records] == [
        *zip(order, (False, True, False, True), strict=True)
    ]
    assert records[0]["losses"] == [0, 3, 6]
    assert all("RESOURCE_EXHAUSTED" in record["reason"] for record in records if record["out_of_memory"])
    assert sorted(attempts) == sorted([*memory, ()])


def test_what_has_been_measured_is_not_measured_again(study, tmp_path, monkeypatch):
    asked = []

    def child(name, program, arguments, timeout, variables):
        setups = json.loads(arguments[arguments.index("--setups") + 1])
        asked.append([(setup["batch"], tuple(setup["kernels"])) for setup in setups])
        memory = {"temporary": 2**20, "total": 2**21}
        figures = {"milliseconds": 1.0, "tokens_per_second": 32e3, "memory_bytes": memory, "peak_bytes": None}
        records = [{**setup, **figures, "out_of_memory": False, "host_bytes": 0} for setup in setups]
        return {"environment": {"bytes_limit": None, "device": "cpu"}, "records": records}

    monkeypatch.setattr(study, "run_child", child)
    out = tmp_path / "study.json"
    study.main(["--compare", "--batch", "1", "--out", str(out)])
    assert (tmp_path / "study_tiny.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(study.study_plot, "plot", lambda records, out: None)
    study.main(["--compare", "--batch", "2", "1", "--each", "1", "--out", str(out)])
    offloads = ["--offload", "params", "--offload", "optimizer", "params"]
    study.main(["--flce", "--batch", "1", *offloads, "--out", str(out)])
    study.main(["--batch", "1", "--again", "--out", str(out)])
    singles = [(1, (name,)) for name in study.KERNELS]
    assert asked == [
        [(1, ()), (1, study.ALL)],
        [(2, ()), (2, study.ALL), *singles],
        [(1, ("flce",))] * 2,
        [(1, ())],
    ]
    found = json.loads(out.read_text())["records"]
    assert len(found) == 2 + 2 + 5 + 2
    assert [record["offload"] for record in found[-2:]] == [["params"], ["params", "optimizer"]]
    # Each record has the command that measured it last.
    again = [record["kernels"] for record in found if "--again" in record["environment"]["command"]]
    assert again == [[]]


def test_what_had_been_measured_before_ctrl_c_is_kept(study, tmp_path, monkeypatch, capsys):
    sweeps = sys.modules["sweeps"]

    def interrupted(command, **options):
        setups = json.loads(command[command.index("--setups") + 1])
        records = [{**setup, "out_of_memory": False} for setup in setups[:1]]
        sweeps.write_json(Path(command[-1]), {"environment": {}, "records": records})
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps.subprocess, "run", interrupted)
    out = tmp_path / "study.json"
    assert "what had been measured is kept" in interruption(study, ["--batch", "1", "2", "--out", str(out)], capsys)
    assert [record["batch"] for record in json.loads(out.read_text())["records"]] == [1]


def test_a_file_of_another_program_is_refused_and_kept(study, tmp_path):
    out = tmp_path / "study.json"
    for text, message in ('{"rec', "no results file"), ('{"records": [{"shape": 1}]}', "it lacks batch"):
        out.write_text(text)
        assert message in refusal(study, ["--out", str(out)])
        assert out.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tiled-mlp --all", "--tiled-mlp replaces --swiglu"),
        ("--offload activations", "needs --remat"),
    ],
)
def test_bad_arguments(study, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        study.main(arguments.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
