"""examples/gradient_accumulation.py at sizes where each study takes seconds."""

import contextlib
import io
import json
from types import ModuleType

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = "--vocab-size 512 --rows 8 --length 16 --no-progress"
COMMANDS = {
    "exactness": f"exactness {SMALL} --dtypes float64 --microbatches 4",
    "stability": f"stability {SMALL} --seeds 2 --cycles 3 --microbatches 4",
    "train": f"train {SMALL} --microbatches 4 --steps 10 --corpus {{corpus}} --cache-dir {{folder}}",
    "memory": "memory --tokens 512 --vocab 2048 --chunk-sizes 128 --length 64 --microbatches 1 4 --rows 4",
    "long_context": "long-context --runs jliger:64 full:64 --timed-steps 1",
}


@pytest.fixture(scope="module")
def program(import_example) -> ModuleType:
    return import_example("gradient_accumulation")


def run_commands(program, folder, corpus_folder, sections):
    """The results file after the commands of these sections, and what was printed."""
    out = folder / "results.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for section in sections:
            command = COMMANDS[section].format(corpus=corpus_folder, folder=folder)
            program.main([*command.split(), "--out", str(out)])
    if "train" in sections:
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(out.read_text()), printed.getvalue()


@pytest.fixture(scope="module")
def exactness(program, tmp_path_factory, corpus_folder):
    return run_commands(program, tmp_path_factory.mktemp("exactness"), corpus_folder, ["exactness"])


@pytest.fixture(scope="module")
def found(program, tmp_path_factory, corpus_folder):
    with pytest.MonkeyPatch.context() as patch:
        # For the processes of measure.py.
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.setenv("JAX_PLATFORMS", "cpu")
        return run_commands(program, tmp_path_factory.mktemp("accumulation"), corpus_folder, COMMANDS)


def records(found, section):
    return found[0][section]["records"]


def check_sections(found, sections):
    assert list(found[0]) == list(sections)
    for name, section in found[0].items():
        assert section["environment"]["command"].startswith(
            f"python examples/gradient_accumulation.py {name.replace('_', '-')} "
        )
        assert section["environment"]["versions"]["jax"]
    assert found[1].count("written: ") == len(sections)


@pytest.mark.exhaustive
def test_each_section_says_how_it_was_found(found):
    check_sections(found, COMMANDS)


def test_float64_is_exact_and_the_mean_of_means_is_not(exactness):
    check_sections(exactness, ["exactness"])
    for record in records(exactness, "exactness"):
        for way in ("full", "jliger"):
            assert record[way]["loss"] < 1e-14
            assert record[way]["gradient"] < 1e-14
        assert (record["means"]["gradient"] > 0.01) == (record["tokens"] == "unequal")
    assert len(records(exactness, "exactness")) == 2


@pytest.mark.exhaustive
def test_both_heads_vary_alike_and_repeat_to_the_bit(found):
    by_way = {(record["seed"], record["way"]): record for record in records(found, "stability")}
    assert len(by_way) == 6
    for seed in range(2):
        full, fused, means = (by_way[seed, way] for way in ("full", "jliger", "means"))
        for name in ("loss_mean", "loss_variance", "gradient_variance"):
            assert fused[name] == pytest.approx(full[name], rel=1e-4)
        assert fused["repeat_difference"] == full["repeat_difference"] == 0
        assert fused["largest_gradient_difference"] < 1e-5
        assert means["largest_gradient_difference"] > 0.01


@pytest.mark.exhaustive
def test_five_trainings_are_one_and_the_sixth_is_not(found):
    first, *others = records(found, "train")
    assert first["losses"][-1] < first["losses"][0] - 0.2
    assert first["tokens_per_row"]["least"] < first["tokens_per_row"]["most"]
    *same, means = others
    for record in same:
        assert record["losses"] == pytest.approx(first["losses"], rel=1e-5), record["way"]
        assert record["heldout_loss"] == pytest.approx(first["heldout_loss"], rel=1e-5), record["way"]
    assert len(same) == 4
    assert means["losses"] != pytest.approx(first["losses"], rel=1e-4)


@pytest.mark.exhaustive
def test_memory_of_the_loss_and_of_steps(found):
    found_records = records(found, "memory")
    temporary = {
        (r["what"], r["dtype"], r["head"], r.get("chunk_size"), r.get("microbatches")): r["memory_bytes"]["temporary"]
        for r in found_records
    }
    assert len(temporary) == len(found_records) == 2 + 4 + 2 * 2
    assert temporary["loss", "float32", "jliger", 128, None] < temporary["loss", "float32", "full", None, None] / 2
    for head in ("full", "jliger"):
        assert temporary["step", "float32", head, None, 4] < temporary["step", "float32", head, None, 1]
    # A CPU keeps no account of its memory.
    assert all(record["peak_bytes"] is None for record in found_records)


@pytest.mark.exhaustive
def test_long_sequences(found):
    found_records = records(found, "long_context")
    assert [(record["head"], record["length"]) for record in found_records] == [("jliger", 64), ("full", 64)]
    for record in found_records:
        assert record["tokens_per_second"] == pytest.approx(1e3 * record["length"] / record["milliseconds"])
        assert record["losses"][-1] < record["losses"][0]
    # The same model on the same text.
    assert found_records[0]["losses"] == pytest.approx(found_records[1]["losses"], rel=1e-5)


# ---- without running anything ----------------------------------------------------------------------------------


def test_runs_are_parsed(program):
    assert program.parse_run("jliger@24:16384,65536") == ("jliger", 24.0, [16384, 65536])
    assert program.parse_run("full:128") == ("full", None, [128])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("long-context --runs full", "write HEAD:LENGTHS or HEAD@GB:LENGTHS"),
        ("long-context --runs half:12", "write HEAD:LENGTHS or HEAD@GB:LENGTHS"),
        ("long-context --runs full:0", "write HEAD:LENGTHS or HEAD@GB:LENGTHS"),
        ("train --rows 16 --microbatches 5", "--microbatches 5 doesn't divide --rows 16"),
        ("exactness --rows 16 --microbatches 1 3", "--microbatches 3 doesn't divide --rows 16"),
        ("stability --cycles 1", "--cycles 1: a variance needs 2 or more"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments(program, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        program.main(arguments.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_limit_is_a_fraction_of_the_gpus_memory(program, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(program, "gpu_mebibytes", lambda: 100_000.0)
    assert program.variables_for(None) == {}
    fraction = float(program.variables_for(24.0)["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    assert fraction * 100_000 * 2**20 == pytest.approx(24e9, rel=1e-4)
    monkeypatch.setattr(program, "gpu_mebibytes", lambda: None)
    with pytest.raises(SystemExit, match="a memory limit is for GPUs"):
        program.variables_for(24.0)


def test_out_of_memory_is_a_record(import_example, tmp_path, monkeypatch):
    measuring = import_example("measure")

    def refuse(*_):
        raise measuring.DeviceMemoryError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(measuring, "measured", refuse)
    out = tmp_path / "records.json"
    options = ["--head", "jliger", "--what", "loss", "--tokens", "8", "--vocab", "64", "--chunk-sizes", "4"]
    with pytest.raises(SystemExit) as ended:
        measuring.main([*options, "--out", str(out)])
    assert ended.value.code == 3
    (record,) = json.loads(out.read_text())["records"]
    assert record["out_of_memory"] is True
    assert "RESOURCE_EXHAUSTED" in record["reason"]


def test_a_limit_that_is_not_kept_is_refused(import_example, tmp_path, monkeypatch):
    measuring = import_example("measure")
    monkeypatch.setattr(measuring, "device_memory", lambda figure: 30 * 10**9)
    with pytest.raises(SystemExit, match="--limit 24 GB, and JAX may use 30000000000 bytes"):
        measuring.main(["--head", "full", "--limit", "24", "--out", str(tmp_path / "records.json")])


def test_a_program_that_needs_more_than_there_is_does_not_run(import_example, monkeypatch):
    measuring = import_example("measure")
    monkeypatch.setattr(import_example("measuring"), "device_memory", lambda figure: 1)
    args = measuring.parse_args(["--head", "full", "--what", "loss", "--tokens", "8", "--vocab", "64", "--out", "x"])
    (_, measure), _ = measuring.tasks_of(args, "loss")
    with pytest.raises(measuring.DeviceMemoryError, match=r"needs \d+ bytes of 1"):
        measure()
