"""Starts several processes with the same measurements: clocks and autotuning results differ between processes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jliger.bench import report


def run(what: Sequence[str], out: Path, *, count: int, options: Sequence[str]) -> dict[str, Path]:
    """Runs `python -m jliger.bench` in `count` processes, one after the other; writes one file per benchmark.

    The files are rewritten after each process, with the results so far.

    Args:
      what: the names of benchmarks.
      out: the folder of the result files; its folder `parts/` has the results of each process.
      count: the number of processes.
      options: more arguments of each process.

    Returns:
      The result file of each benchmark.
    """
    parts = [out / "parts" / f"{number}.json" for number in range(count)]
    for part in parts:
        part.unlink(missing_ok=True)
    written: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as cache:
        # Processes share a compilation cache: the first process times first calls, and the others do not recompile.
        shared = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for part in parts:
            command = [sys.executable, "-m", "jliger.bench", *what, "--part", str(part), *options]
            command += ["--first-calls"] if part == parts[0] else []
            subprocess.run(command, env={**os.environ, **shared}, check=True)
            written = write(out, parts)
    return written


def write(out: Path, parts: Sequence[Path]) -> dict[str, Path]:
    """Merges the existing `parts` into one file per benchmark, named after the benchmark and the device."""
    finished = [json.loads(part.read_text(encoding="utf-8")) for part in parts if part.exists()]
    written: dict[str, Path] = {}
    for what, result in report.merged(finished).items():
        result["environment"]["command"] = report.command()
        path = out / f"{what}_{report.slug(result['environment'])}.json"
        report.write_json(path, result)
        written[what] = path
    return written
