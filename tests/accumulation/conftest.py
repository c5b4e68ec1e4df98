"""Leaves these tests to a process that has eight devices, and lets them read collectives."""

import os
import sys
from pathlib import Path

import jax
import pytest

# tests/test_accumulation.py starts such a process; on a machine with eight GPUs set the variable by hand.
collect_ignore_glob = [] if os.environ.get("JLIGER_ACCUMULATION_TESTS") == "1" else ["*"]

sys.path.insert(0, str(Path(__file__).parent.parent / "sharding"))


@pytest.fixture(autouse=True)
def float32_products():
    """TF32 products would be off by 1e-3, in one order of summation or another."""
    with jax.default_matmul_precision("highest"):
        yield
