"""examples/measure_skipping.py: its tables can be written where Triton is not installed, as on a CPU."""

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def test_tables_name_the_packages_that_are_installed(import_example):
    tables = import_example("measure_skipping").tables_of(
        {
            "environment": {"device": "cpu", "versions": {"jax": "0.12"}, "command": "python measure_skipping.py"},
            "layer": {"tokens": 4, "hidden_size": 2, "vocab_size": 8},
            "records": [],
        }
    )
    assert tables.splitlines()[-2] == "cpu, jax 0.12"
