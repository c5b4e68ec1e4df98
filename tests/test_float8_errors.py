"""The program that measures the errors of 8-bit products finds them larger than bfloat16's, and small."""

import pytest


@pytest.mark.exhaustive  # compilation takes 6 seconds
def test_errors_of_8_bits_are_small(import_example, monkeypatch):
    program = import_example("float8_errors")
    monkeypatch.setattr(program, "SETTINGS", program.SETTINGS[:1])
    plain, float8 = program.records(64, 32, 256)
    assert (plain["products"], float8["products"]) == ("bfloat16", "float8")
    for name in ("hidden", "kernel"):
        assert 2 * plain[f"{name}_error"] < float8[f"{name}_error"] < 0.04
        assert float8[f"{name}_cosine"] > 0.999
    assert abs(float8["bias_of_others"]) < 0.02
