"""The program that measures the errors of 8-bit products finds them larger than bfloat16's, and small."""

import json

import pytest


def check(plain, float8, forward, most):
    assert [each["products"] for each in (plain, float8, forward)] == ["bfloat16", "float8", "float8_forward"]
    for name in ("hidden", "kernel"):
        assert plain[f"{name}_error"] < forward[f"{name}_error"] < float8[f"{name}_error"] < most
        assert float8[f"{name}_cosine"] > 1 - most**2
    assert 2 * plain["logprob_error"] < forward["logprob_error"] == float8["logprob_error"] < 0.1
    assert abs(float8["bias_of_others"]) < 0.02


@pytest.mark.exhaustive  # compilation takes 6 seconds
def test_errors_of_8_bits_are_small(import_example, monkeypatch):
    program = import_example("float8_errors")
    monkeypatch.setattr(program, "SETTINGS", program.SETTINGS[:1])
    check(*program.random_records(64, 32, 256), 0.04)


@pytest.mark.exhaustive
def test_errors_of_a_trained_layer(import_example, tmp_path):
    program, out = import_example("float8_errors"), tmp_path / "errors.json"
    options = "--steps 20 --hidden-size 32 --vocab-size 512 --layers 1 --heads 2 --batch-size 4 --length 64"
    text = f"--max-bytes 300000 --cache-dir {tmp_path / 'cache'} --out {out}"
    program.main([*options.split(), *text.split()])
    results = json.loads(out.read_text())
    assert results["sizes"] == [256, 32, 512]
    assert 0 < results["records"][0]["deviation"] < 4
    check(*results["records"], 0.06)
