"""examples/compare_training.py: variants of the loss share everything else, and results of several seeds merge."""

import json
from types import ModuleType

import pytest
from example_runs import refusal

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def compare_training(import_example) -> ModuleType:
    return import_example("compare_training")


@pytest.mark.parametrize("seeds", [[0], pytest.param([0, 1], marks=pytest.mark.exhaustive)], ids=str)
def test_variants_share_all_but_the_loss_and_seeds_merge(seeds, compare_training, corpus_folder, tmp_path):
    out = tmp_path / "run"
    text = f"--corpus {corpus_folder} --cache-dir {tmp_path} --vocab-size 512 --heldout-fraction 0.2 --eval-batches 1"
    text += " --hidden-size 8 --layers 1 --heads 2 --batch-size 4 --length 32 --no-progress --dtype float32"
    text += f" --steps 2 --warmup-steps 1 --learning-rate 0.03 --eval-every 1 --seeds {' '.join(map(str, seeds))}"
    compare_training.main([*text.split(), "--variants", "plain", 'smooth:{"label_smoothing": 0.5}', "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    runs = {(record["variant"], record["seed"]): record["heldout"] for record in results["records"]}
    for seed in seeds:
        plain, smooth = (runs[name, seed] for name in ("plain", "smooth"))
        assert list(plain) == ["0", "1", "2"]
        # The same parameters before the first step, and the same loss of them; then not.
        assert smooth["0"] == plain["0"]
        assert abs(smooth["2"] - plain["2"]) > 1e-4
    assert len({runs["plain", seed]["0"] for seed in seeds}) == len(seeds)
    table = (out / "table.txt").read_text()
    change = [100 * (runs["smooth", seed]["2"] / runs["plain", seed]["2"] - 1) for seed in seeds]
    assert f"{sum(change) / len(change):+.3f} %" in table
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")

    # Another process, with other seeds, whose second variant is 10 % better.
    other = [{**record, "seed": 7 + record["seed"]} for record in results["records"]]
    for record in other:
        plain = runs["plain", record["seed"] - 7]
        record["heldout"] = plain if record["variant"] == "plain" else {step: 0.9 * plain[step] for step in plain}
    file = tmp_path / "other.json"
    file.write_text(json.dumps({**results, "records": other}))
    report = ["--report", str(out / "results.json"), str(file), "--out"]
    compare_training.main([*report, str(tmp_path / "merged")])
    merged = (tmp_path / "merged" / "table.txt").read_text()
    assert f"{(sum(change) / len(change) - 10) / 2:+.3f} %" in merged
    assert merged.endswith(2 * (table.splitlines()[-1] + "\n"))
    file.write_text(json.dumps({**results, "variants": {"plain": {}}}))
    assert "other settings" in refusal(compare_training, [*report, str(tmp_path / "third")])


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["plain:{"], "is not NAME:JSON"),
        (['rounded:{"logit_dtype": "bfloat16"}'], "no option logit_dtype"),
        (["list:[]"], "must be an object"),
        (['masked:{"where": null}'], "no option where"),
        (['counted:{"return_metrics": true}'], "no option return_metrics"),
        (["plain", "plain"], "a name occurs twice"),
    ],
)
def test_variants_that_are_none(compare_training, capsys, variants, message):
    with pytest.raises(SystemExit):
        compare_training.parse_args(["--variants", *variants])
    assert message in capsys.readouterr().err
