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


def test_variants_share_all_but_the_loss_and_seeds_merge(compare_training, corpus_folder, tmp_path, capsys):
    out = tmp_path / "run"
    text = f"--corpus {corpus_folder} --cache-dir {tmp_path} --vocab-size 512 --heldout-fraction 0.2 --eval-batches 1"
    text += " --hidden-size 8 --layers 1 --heads 2 --batch-size 4 --length 32 --no-progress --dtype float32"
    text += " --steps 2 --warmup-steps 1 --learning-rate 0.03 --eval-every 1 --seeds 0 1 --variants plain"
    compare_training.main([*text.split(), 'smooth:{"label_smoothing": 0.5}', "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    runs = {(record["variant"], record["seed"]): record["heldout"] for record in results["records"]}
    for seed in (0, 1):
        plain, smooth = (runs[name, seed] for name in ("plain", "smooth"))
        assert list(plain) == ["0", "1", "2"]
        # The same parameters before the first step, and the same loss of them; then not.
        assert smooth["0"] == plain["0"]
        assert abs(smooth["2"] - plain["2"]) > 1e-4
    assert runs["plain", 0]["0"] != runs["plain", 1]["0"]
    table = (out / "table.txt").read_text()
    change = [100 * (runs["smooth", seed]["2"] / runs["plain", seed]["2"] - 1) for seed in (0, 1)]
    assert f"{sum(change) / 2:+.3f} %" in table
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")

    files = [tmp_path / f"{seed}.json" for seed in (0, 1)]
    for seed, file in enumerate(files):
        own = [record for record in results["records"] if record["seed"] == seed]
        file.write_text(json.dumps({**results, "records": own}))
    report = ["--report", *map(str, files), "--out"]
    compare_training.main([*report, str(tmp_path / "merged")])
    command = table.splitlines()[-1]
    assert (tmp_path / "merged" / "table.txt").read_text() == table + command + "\n"
    files[1].write_text(json.dumps({**results, "variants": {"plain": {}}}))
    assert "other settings" in refusal(compare_training, [*report, str(tmp_path / "other")])


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
