"""Lets these tests import what they share, and holds float32 products to float32 on GPUs too."""

import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parent

sys.path.insert(0, str(FOLDER))


@pytest.fixture(autouse=True)
def float32_products():
    """TF32 products would be off by 1e-3, in one order of summation or another."""
    with jax.default_matmul_precision("highest"):
        yield


def pytest_collection_modifyitems(items):
    if jax.device_count() not in (2, 4, 8):
        reason = f"made for 2, 4 or 8 devices, not {jax.device_count()}"
        # Pytest hands over all items, whichever folder they are of.
        for item in items:
            if item.path.is_relative_to(FOLDER):
                item.add_marker(pytest.mark.skip(reason=reason))
