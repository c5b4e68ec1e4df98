"""Several processes that measure the same, one after the other: clocks and autotuned products differ between them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jliger.bench import report


def run(what: Sequence[str], out: Path, *, count: int, options: Sequence[str]) -> dict[str, Path]:
    """Runs `python -m jliger.bench` as `count` processes; writes one file a benchmark.

    The files are written after each process, from what all have found until then.

    Args:
      what: benchmarks.
      out: the folder of the result files; `parts/` in it has what each process found.
      count: how many processes.
      options: more arguments for each.

    Returns:
      The result file of each benchmark.
    """
    parts = [out / "parts" / f"{number}.json" for number in range(count)]
    for part in parts:
        part.unlink(missing_ok=True)
    written: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as cache:
        # Processes share what XLA compiled: the first one times first calls, and the others need not wait.
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
    """Merges those of `parts` that exist into one file a benchmark, named after it and the device."""
    finished = [json.loads(part.read_text(encoding="utf-8")) for part in parts if part.exists()]
    written: dict[str, Path] = {}
    for what, result in report.merged(finished).items():
        result["environment"]["command"] = report.command()
        path = out / f"{what}_{report.slug(result['environment'])}.json"
        report.write_json(path, result)
        written[what] = path
    return written
