"""Breaks the library in one place at a time, and asks the fast tests to notice.

    python tests/break_things.py [--only WORDS]

Every break is a replacement in a copy of the repository. A break whose pattern is no longer in the source ends the
script: move the pattern to where the source says it now. Tests that fail without a break end it too.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ONE_DEVICE = {"JAX_PLATFORMS": "cpu"}
EIGHT_DEVICES = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
}
INTERPRETER = {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}
HEAD = "jliger/ops/linear_head"


@dataclasses.dataclass(frozen=True)
class Break:
    """One thing to break.

    Attributes:
      name: what is wrong afterwards.
      file: where, from the root of the repository.
      pattern: a regular expression; every match is replaced, and there has to be one.
      replacement: what stands there instead.
      tests: arguments of pytest: the tests that have to fail.
      environment: what they run with.
    """

    name: str
    file: str
    pattern: str
    replacement: str
    tests: tuple[str, ...]
    environment: dict[str, str] = dataclasses.field(default_factory=lambda: ONE_DEVICE)


BREAKS = [
    Break(
        "a wrong coefficient",
        "jliger/ops/logits/objectives.py",
        r"label=-cotangents\.label_logit",
        "label=-0.999 * cotangents.label_logit",
        (f"{HEAD}/cross_entropy_test.py::test_the_defaults",),
    ),
    Break(
        "a dropped sum over devices",
        f"{HEAD}/sharding/plan.py",
        r"jax\.lax\.psum\(grad, axes\) if axes else grad",
        "grad",
        ("tests/sharding/test_results.py::test_few_arguments",),
        EIGHT_DEVICES,
    ),
    Break(
        "a swapped layout",
        f"{HEAD}/chunks/matmuls.py",
        r"(left, right = .* if config\.kernel_layout) ==",
        r"\1 !=",
        (f"{HEAD}/cross_entropy_test.py::test_a_square_kernel",),
    ),
    Break(
        "a missing mask",
        f"{HEAD}/arguments.py",
        r"return counted if where is None else counted & where",
        "return counted",
        (f"{HEAD}/cross_entropy_test.py::test_what_does_not_count_does_not_matter",),
    ),
    Break(
        "an ignored ignore_index",
        f"{HEAD}/arguments.py",
        r"counted = labels != ignore_index if can_occur",
        "counted = jnp.full(labels.shape, True) if can_occur",
        (f"{HEAD}/cross_entropy_test.py::test_what_does_not_count_does_not_matter",),
    ),
    Break(
        "a device without columns that is given one",
        f"{HEAD}/sharding/shard.py",
        r"jnp\.clip\(vocab_size - start, 0, width\)",
        "jnp.clip(vocab_size - start, 1, width)",
        ("tests/sharding/test_vocab_size.py::test_a_padded_vocabulary",),
        EIGHT_DEVICES,
    ),
    Break(
        "padding whose gradient is not 0",
        "jliger/ops/logits/triton_tiles.py",
        r"zeros = tl\.zeros\(\[TILE\.lanes, TILE\.vector\], (.*)\)",
        r"zeros = tl.full([TILE.lanes, TILE.vector], 1, \1)",
        ("jliger/ops/logits/logits_test.py::test_more_padding_than_a_tile",),
        INTERPRETER,
    ),
    Break(
        "an unwanted gradient that is computed",
        "jliger/core/autodiff.py",
        r"primal is not None and primal\.perturbed",
        "primal is not None",
        (f"{HEAD}/gradients_test.py::test_nothing_is_computed_for_a_frozen_argument",),
    ),
    Break(
        "a 32-bit offset",
        "jliger/ops/logits/triton_kernels.py",
        r"tl\.program_id\(0\)\.to\(tl\.int64\)",
        "tl.program_id(0)",
        ("tests/test_compiled_kernels.py::test_every_branch_of_every_kernel[0]",),
    ),
    Break(
        "a wrong derivative of the softcap",
        "jliger/ops/logits/xla.py",
        r"dlogit_dproduct \* \(1 - tanh \* tanh\)",
        "dlogit_dproduct * (1 - tanh)",
        ("jliger/ops/logits/logits_test.py::test_softcaps_from_hard_to_none_at_all",),
    ),
    Break(
        "a mean over all tokens",
        "jliger/core/reduction.py",
        r"divisor\(counted\.sum\(\), normalizer\)",
        "divisor(counted.size, normalizer)",
        ("jliger/losses/losses_test.py::test_a_sequence_that_does_not_count_is_as_if_it_were_not_there",),
    ),
    Break(
        "a sum that is rounded after each chunk",
        f"{HEAD}/chunks/grad_accumulators.py",
        r"kernel=added\(grads\.kernel, part\)",
        "kernel=added(grads.kernel, part).astype(chunk.hidden.dtype).astype(sums)",
        (f"{HEAD}/cross_entropy_test.py::test_sums_over_chunks_are_float32",),
    ),
    Break(
        "a kernel that stores another label's logit",
        "jliger/ops/logits/triton_kernels.py",
        r"tl\.store\(stats\.label_logit \+ index, label_logit\)",
        "tl.store(stats.label_logit + index, label_logit + 1e-3)",
        ("jliger/ops/logits/logits_test.py::test_a_negative_scale",),
        INTERPRETER,
    ),
    Break(
        "the higher of the ids of equal logits",
        "jliger/ops/logits/top_k_triton_kernels.py",
        r"SELECT\.size - 1 - tl\.arange\(0, SELECT\.size\)",
        "tl.arange(0, SELECT.size)",
        ("jliger/ops/logits/top_k_test.py::test_largest_logits",),
        INTERPRETER,
    ),
    Break(
        "a remainder that pulls at nothing",
        "jliger/ops/logits/top_k_divergence.py",
        r"total \* share - rest",
        "total * share",
        (f"{HEAD}/top_k_kl_test.py::test_a_student_that_leaves_nothing_to_the_others",),
    ),
    Break(
        "a label that may be skipped",
        f"{HEAD}/chunks/skipping.py",
        r"    matters \|= jnp\.arange\(columns\).*\n",
        "",
        (f"{HEAD}/chunks/skipping_test.py::test_skips_the_segments_without_a_large_gradient",),
    ),
    Break(
        "skipped gradients that nothing replaces",
        f"{HEAD}/chunks/segments_kernels.py",
        r"sums \+= means\[:, None\] \* factors\[None, :\]",
        "sums += 0.0 * factors[None, :]",
        (f"{HEAD}/chunks/skipping_test.py::test_skips_the_segments_without_a_large_gradient",),
        INTERPRETER,
    ),
]


def copy_repository(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".*", "results", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)


def exit_status(folder: Path, tests: tuple[str, ...], environment: dict[str, str]) -> tuple[int, str]:
    """How pytest ends there, and what it printed."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def broken(source: str, one: Break) -> str:
    text, count = re.subn(one.pattern, one.replacement, source)
    if not count:
        sys.exit(f"{one.name}: {one.file} has nothing like {one.pattern!r} any more; say here what to break instead.")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="breaks whose name has these words")
    chosen = [one for one in BREAKS if parser.parse_args().only in one.name]
    if not chosen:
        sys.exit("no such break")
    for one in chosen:  # before anything takes time
        broken((ROOT / one.file).read_text(), one)
    missed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_repository(folder)
        for environment in (ONE_DEVICE, EIGHT_DEVICES, INTERPRETER):
            tests = dict.fromkeys(test for one in chosen if one.environment is environment for test in one.tests)
            if tests and (ended := exit_status(folder, (*tests,), environment))[0]:
                sys.exit(f"{' '.join(tests)} ended with {ended[0]} though nothing is broken:\n{ended[1]}")
        for one in chosen:
            file, start = folder / one.file, time.monotonic()
            source = file.read_text()
            file.write_text(broken(source, one))
            status, output = exit_status(folder, one.tests, one.environment)
            file.write_text(source)
            # 1: a test failed. Anything else is a mistake of this script.
            if status not in (0, 1):
                sys.exit(f"{one.name}: pytest ended with {status}:\n{output}")
            print(f"{'caught' if status else 'MISSED'} in {time.monotonic() - start:.0f} s: {one.name}", flush=True)
            missed += [] if status else [one.name]
    if missed:
        sys.exit(f"not noticed: {', '.join(missed)}")
    print(f"all {len(chosen)} noticed")


if __name__ == "__main__":
    main()
