"""examples/train_sharded.py on eight simulated devices, in processes of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest
from example_runs import losses

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parent.parent / "examples"
PROGRAM = EXAMPLES / "train_sharded.py"
STEPS = 8
MESHES = {"jliger": "data=2,fsdp=2,tensor=2", "full": "data=2,fsdp=2,tensor=2", "resumed": "fsdp=8"}
# Several runs in one process: JAX is imported, and its devices are made, once.
SEVERAL = """
import json, sys
import train_sharded
for arguments in json.loads(sys.argv[1]):
    try:
        train_sharded.main(arguments)
    except SystemExit as ended:
        print(f"ended: {ended.code}")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Without what this process has set for its own JAX; compiling is most of these tests' time, so it is kept."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # A pointer to jliger's partitioning rule, which is another in each program.
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1",
    }


def run_several(environment: dict[str, str], arguments: list[list[str]]) -> str:
    """Runs the program with each list of arguments in turn, in one process; returns what it printed."""
    command = [sys.executable, "-c", SEVERAL, json.dumps(arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """A tiny run of real text; options given after these count instead."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(os.__file__).parent.glob("[a-f]*.py"))[:24]:
        (folder / path.name).write_bytes(path.read_bytes()[:4000])
    text = f"--devices 8 --corpus {folder} --cache-dir {tmp_path_factory.mktemp('cache')} --heldout-fraction 0.2"
    text += " --vocab-size 512 --length 32 --batch 16 --chunk-size 32 --accumulate 2 --no-progress"
    text += f" --steps {STEPS} --warmup-steps 2 --learning-rate 0.01 --checkpoint-every 2 --keep-checkpoints 9"
    return text.split()


@pytest.fixture(scope="module")
def arguments_of(options, tmp_path_factory) -> Callable[..., list[str]]:
    """Arguments of a run in a folder of its own; `.folder` has all of them."""

    def arguments(name: str, mesh: str, *more: str) -> list[str]:
        return [*options, "--out", str(arguments.folder / name), "--mesh", mesh, *more]

    arguments.folder = tmp_path_factory.mktemp("runs")
    return arguments


@pytest.fixture(scope="module")
def runs(arguments_of, environment) -> Path:
    """Runs of both heads, a benchmark, and what is refused."""
    folder = arguments_of.folder
    printed = run_several(
        environment,
        [
            arguments_of("jliger", MESHES["jliger"]),
            arguments_of("full", MESHES["full"], "--head", "full", "--accumulate", "1"),
            arguments_of("", MESHES["jliger"], "--benchmark", str(folder / "record.json"), "--timed-steps", "2"),
            arguments_of("jliger", MESHES["jliger"]),
            arguments_of("jliger", MESHES["jliger"], "--resume", "--learning-rate", "0.02"),
        ],
    )
    (folder / "printed").write_text(printed)
    return folder


@pytest.fixture(scope="module")
def resumed(runs, arguments_of, environment) -> Path:
    """Beside the others: a run that was killed and resumed, and one that was resumed on another mesh."""
    folder = arguments_of.folder
    killed = arguments_of("killed", MESHES["jliger"])
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *killed], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    # In the middle of step 6 or a little later, and with no chance to tidy up.
    deadline = time.monotonic() + 240
    while 5 not in losses(folder / "killed") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    shutil.copytree(folder / "killed", folder / "resumed")
    shutil.copytree(folder / "killed", folder / "as killed")
    run_several(
        environment,
        [
            [*killed, "--resume"],
            arguments_of("resumed", MESHES["resumed"], "--resume", "--accumulate", "1"),
        ],
    )
    return folder


@pytest.mark.exhaustive
def test_a_killed_run_goes_on_as_if_nothing_had_happened(resumed):
    before = losses(resumed / "as killed")
    assert 5 <= max(before) < STEPS
    # To the bit: the same program on the same numbers.
    assert losses(resumed / "killed") == losses(resumed / "jliger")
    assert list(losses(resumed / "killed")) == list(range(1, STEPS + 1))
    lines = (resumed / "killed" / "metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if record["event"] == "train"]
    # It went on from a checkpoint, not from the beginning, and nothing was taken out of the file.
    assert steps[: max(before)] == list(range(1, max(before) + 1))
    assert steps[max(before)] >= 3


@pytest.mark.exhaustive
def test_a_run_goes_on_under_another_mesh(resumed):
    whole, gone_on = losses(resumed / "jliger"), losses(resumed / "resumed")
    # Sums over devices in another order: the losses, near 6, agree to a few units in the last place.
    np.testing.assert_allclose(list(gone_on.values()), list(whole.values()), rtol=1e-5)
    lines = (resumed / "resumed" / "metrics.jsonl").read_text().splitlines()
    meshes = [record["mesh"] for record in map(json.loads, lines) if record["event"] == "compiled"]
    assert meshes == [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8, "tensor": 1}]


@pytest.mark.exhaustive
def test_a_run_is_killed_on_four_devices_and_goes_on_with_two_and_with_four(
    options, environment, import_example, tmp_path, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    program, out = import_example("kill_and_resume"), tmp_path / "resume.json"
    at = options.index("--steps")
    own = [*options[2:at], *options[at + 2 :]]  # --devices and --steps are the program's own
    program.main(["--out", str(out), "--count", "4", "--simulate", "--steps", "10", "--", *own])
    result = json.loads(out.read_text())
    assert 5 <= result["killed_after"] < 9
    on_other_devices, on_the_same = result["apart"]
    assert 0 < on_other_devices < 1e-5
    assert on_the_same == 0
    assert [len(curve) for curve in result["losses"].values()] == [10, 10, 10]
    assert "Killed after step" in out.with_suffix(".txt").read_text()


def test_what_kill_and_resume_sets_is_refused_after_the_dashes(import_example, capsys):
    with pytest.raises(SystemExit):
        import_example("kill_and_resume").main(["--simulate", "--", "--steps=8"])
    assert "--steps after -- is set by this program: pass --steps before --" in capsys.readouterr().err


def test_both_heads_have_one_curve_and_it_falls(runs):
    fused, full = losses(runs / "jliger"), losses(runs / "full")
    np.testing.assert_allclose(list(fused.values()), list(full.values()), rtol=1e-5)
    assert full[STEPS] < full[1] - 0.2


def test_a_record_of_a_benchmark(runs):
    found = json.loads((runs / "record.json").read_text())
    assert found["environment"]["devices"] == 8
    (record,) = found["records"]
    assert record["batch"] == 16
    assert record["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert record["out_of_memory"] is False
    assert record["tokens_per_second"] == pytest.approx(16 * 32 / (record["milliseconds"] / 1e3))
    assert record["memory_bytes"]["temporary"] > 0
    # A CPU's peak rate is not known, and it keeps no account of its memory.
    assert record["model_flop_utilisation"] is record["peak_bytes"] is None


def test_runs_are_neither_overwritten_nor_mixed(runs):
    *_, unasked, other = [line for line in (runs / "printed").read_text().splitlines() if line.startswith("ended: ")]
    assert "--resume continues it, --overwrite removes it" in unasked
    assert "learning_rate was 0.01 and is 0.02" in other


@pytest.fixture(scope="module")
def train_sharded() -> ModuleType:
    """The example as a module; its helpers lie beside it."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_sharded
    finally:
        sys.path.remove(str(EXAMPLES))
    return train_sharded


def test_a_warmup_that_is_not_given_fits(train_sharded):
    for steps, warmup in ((1, 0), (5, 1), (30, 10), (100, 10)):
        assert train_sharded.parse_args(["--steps", str(steps)]).warmup_steps == warmup


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=2,model=2"], "has an axis 'model'; the axes are data, fsdp, tensor"),
        (["--mesh", "data=2,data=2"], "has the axis data twice"),
        (["--mesh", "fsdp"], "axis fsdp needs a whole number above 0"),
        (["--mesh", "fsdp=0"], "axis fsdp needs a whole number above 0"),
        (["--batch", "8", "16"], "several --batch sizes are for --benchmark"),
        (["--largest", "--batch", "8"], "two --batch sizes or more"),
        (["--config", "llama3-8b", "--vocab-size", "200000"], "llama3-8b has 128256"),
        (["--coordinator", "localhost:1"], "go together"),
        (["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"], "must be below"),
        (["--stop-at", "31"], "beyond --steps 30"),
        (["--resume", "--overwrite"], "not allowed with"),
    ],
)
def test_bad_arguments(train_sharded, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        train_sharded.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=2,fsdp=4", "--batch", "6"], "--batch 6 must be a multiple of 8"),
        (["--mesh", "data=2,fsdp=4", "--batch", "16", "--accumulate", "3"], "--batch 16 must be a multiple of 24"),
        (["--mesh", "tensor=8"], "8 devices can't share kv_heads 4 of tiny"),
        (["--mesh", "fsdp=96", "--batch", "96"], "can't share hidden_size 128 of tiny"),
    ],
)
def test_sizes_that_do_not_fit_the_mesh(train_sharded, arguments, message):
    args = train_sharded.parse_args(arguments)
    with pytest.raises(train_sharded.RunError, match=message):
        train_sharded.check_sizes(args, train_sharded.CONFIGS["tiny"], SimpleNamespace(shape=args.mesh))


def test_a_mesh_of_more_devices_than_there_are(train_sharded):
    with pytest.raises(train_sharded.RunError, match="has 1024 devices and JAX sees"):
        train_sharded.make_mesh({"data": 1, "fsdp": 1024, "tensor": 1})


def test_the_true_shape(train_sharded):
    config = train_sharded.CONFIGS["llama3-8b"]
    assert train_sharded.parameter_count(config) == 8_030_261_248
    # Six for each parameter but the embedding's and the norms', and the attention's products of 512 tokens.
    weights = 8_030_261_248 - 128256 * 4096 - (2 * 32 + 1) * 4096
    assert train_sharded.flops_per_token(config, 512) == 6 * weights + 6 * 32 * 4096 * 512


def test_the_largest_batch_is_on_the_line_through_two(train_sharded):
    assert train_sharded.largest_batch([(1, 9), (64, 20), (128, 30)], 100, 16) == 576
    assert train_sharded.largest_batch([(64, 20), (128, 30)], 30, 16) is None
    assert train_sharded.largest_batch([(64, 20), (128, 20)], 100, 16) is None
    assert train_sharded.largest_batch([(64, 20)], 100, 16) is None


def test_out_of_memory_is_a_record_and_a_code(train_sharded, options, tmp_path, monkeypatch, capsys):
    def refuse(program):
        raise train_sharded.DeviceMemoryError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(sys.modules["measuring"], "compile_step", refuse)
    monkeypatch.setattr(train_sharded, "find_devices", lambda args: None)
    file = tmp_path / "record.json"
    with pytest.raises(SystemExit) as ended:
        train_sharded.main([*options, "--benchmark", str(file), "--batch", "64", "128"])
    assert ended.value.code == train_sharded.runs.OUT_OF_MEMORY_EXIT
    assert "batch 64 does not fit" in capsys.readouterr().err
    (record,) = json.loads(file.read_text())["records"]
    assert record["out_of_memory"] is True
    assert "RESOURCE_EXHAUSTED" in record["reason"]


def test_a_largest_batch_that_does_not_fit_is_lowered(train_sharded, options, tmp_path, monkeypatch):
    limit = 1000

    def measure(args, config, mesh, corpus, batch_size):
        # On the line through the first two, 240 would reach 99 % of the limit; it takes more than that.
        peak = 30 + 4 * batch_size + (50 if batch_size > 128 else 0)
        if peak > limit:
            raise train_sharded.DeviceMemoryError("too much")
        figures = {"milliseconds": 1.0, "tokens_per_second": 1.0, "model_flop_utilisation": 0.5, "peak_bytes": peak}
        return {"memory_bytes": {"total": 1, "temporary": 1}, **figures}

    monkeypatch.setattr(train_sharded, "measure", measure)
    monkeypatch.setattr(train_sharded, "find_devices", lambda args: None)
    monkeypatch.setattr(train_sharded, "device_memory", lambda figure: limit)
    one_device = jax.make_mesh(
        (1, 1, 1), train_sharded.AXES, (jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    monkeypatch.setattr(train_sharded, "make_mesh", lambda sizes: one_device)
    file = tmp_path / "record.json"
    train_sharded.main([*options, "--benchmark", str(file), "--batch", "128", "64", "--largest"])
    records = json.loads(file.read_text())["records"]
    # A multiple of 8: four for each of the two parts that the options ask for.
    tried = [(record["batch"], record["out_of_memory"]) for record in records]
    assert tried == [(64, False), (128, False), (240, True), (232, True), (224, False)]
