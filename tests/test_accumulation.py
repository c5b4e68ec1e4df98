"""Accumulation on eight CPU devices, which takes a process of its own, started with them.

The cases are in tests/accumulation. On a machine with 8 GPUs they run on those:
`JLIGER_ACCUMULATION_TESTS=1 python -m pytest tests/accumulation`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "accumulation"


def test_cases():
    # What LLVM optimizes is most of compiling, and nothing that is looked at here.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON_INTERPRET"))
    }
    options = ("-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-n", "2")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(FOLDER)],
        env={**inherited, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JLIGER_ACCUMULATION_TESTS": "1"},
        cwd=FOLDER.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode or " passed" not in done.stdout:
        pytest.fail(f"exit status {done.returncode}:\n{done.stdout}", pytrace=False)
