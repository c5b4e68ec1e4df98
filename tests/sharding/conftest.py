"""Lets these tests import what they share, and holds float32 products to float32 on GPUs too."""

import sys
from pathlib import Path

import jax
import pytest

from jliger.testing.oracle import INTERPRETED

FOLDER = Path(__file__).parent

sys.path.insert(0, str(FOLDER))


@pytest.fixture(autouse=True)
def float32_products():
    """TF32 products would be off by 1e-3, in one order of summation or another."""
    with jax.default_matmul_precision("highest"):
        yield


# What the interpreter runs in every change's tests: a kernel doesn't know how many devices there are.
OFTEN_INTERPRETED = ("test_every_argument_sharded", "test_every_way_to_write_it", "test_equal_to_those_of_one_device")


@pytest.hookimpl(tryfirst=True)  # before marks deselect
def pytest_collection_modifyitems(items):
    # Pytest hands over all items, whichever folder they are of.
    of_this_folder = [item for item in items if item.path.is_relative_to(FOLDER)]
    for item in of_this_folder:
        if jax.device_count() not in (2, 4, 8):
            item.add_marker(pytest.mark.skip(reason=f"made for 2, 4 or 8 devices, not {jax.device_count()}"))
        if INTERPRETED and not item.name.startswith(OFTEN_INTERPRETED):
            item.add_marker(pytest.mark.exhaustive)
