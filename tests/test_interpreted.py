"""The Triton kernels, run by Triton's interpreter in numpy, through the tests that the XLA backend passes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jliger

pytest.importorskip("triton")

PACKAGE = Path(jliger.__file__).parent

# Those that differ by what a kernel does, and not by what JAX does around it.
TESTS = [
    "ops/logits",
    "ops/linear_head/cross_entropy_test.py::test_every_pair_of_options",
    "ops/linear_head/cross_entropy_test.py::test_a_label_out_of_range_poisons_its_token",
    "ops/linear_head/cross_entropy_test.py::test_a_label_out_of_range_poisons_a_reduced_loss",
    "core/vmap_test.py::test_gradient_of_a_batch",
    "ops/linear_head/distillation_test.py::test_every_pair_of_options",
    "ops/linear_head/distillation_test.py::test_nothing_counts_and_the_divergence_would_be_infinite",
    "ops/linear_head/distillation_test.py::test_a_label_out_of_range_poisons_a_hard_part",
]


def test_the_kernels_in_the_interpreter():
    # Triton asks for the variable when it is imported, so it takes a process of its own. Where values are computed for
    # all lanes and chosen from after, numpy warns of those that are not chosen.
    command = [sys.executable, "-m", "pytest", *[str(PACKAGE / test) for test in TESTS]]
    done = subprocess.run(
        [*command, "-k", "triton", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 80
