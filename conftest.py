"""What every process does that runs tests: it saves time, and makes room for compiled programs."""

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jliger.testing.interpreter import find_builtins_once
from jliger.testing.oracle import INTERPRETED

# Tracing makes many objects that live on; to look through them again and again is 5 % of the tests' time.
gc.set_threshold(50_000, 50, 100)

if INTERPRETED:
    find_builtins_once()

# Linux lets a process have 65530 memory maps by default, and each compiled program takes several: without this, all
# tests in one process end with a crash in LLVM.
MAPS, MOST_MAPS = Path("/proc/self/maps"), 40_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
