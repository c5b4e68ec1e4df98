"""A benchmark's results: a table to read, JSON to keep, a plot to look at."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jliger.bench.timing import Sample

Record = dict[str, Any]


def extra_memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a program needs beside its arguments and results, as XLA reports them."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def speed(
    sample: Sample, *, floor: str, floor_seconds: float, flops: float, least: float | None, extra: int | None
) -> Record:
    """What was measured of one way, beside the products alone.

    Args:
      sample: its times.
      floor: which products it is compared with, in words.
      floor_seconds: their time.
      flops: what these products compute.
      least: the share of their speed that it is meant to reach, or None.
      extra: bytes of memory, or None.
    """
    return {
        "milliseconds": sample.median * 1e3,
        "least_milliseconds": sample.least * 1e3,
        "most_milliseconds": sample.most * 1e3,
        "rounds": sample.rounds,
        "of_floor": floor_seconds / sample.median,
        "floor": floor,
        "floor_milliseconds": floor_seconds * 1e3,
        "least": least,
        "tflops": flops / sample.median / 1e12,
        "extra_mib": None if extra is None else extra / 2**20,
    }


def floor(shape: object, name: str, seconds: float, flops: float) -> Record:
    """Products alone, as a way of their own."""
    return {
        "shape": str(shape),
        "name": f"floor: {name}",
        "milliseconds": seconds * 1e3,
        "of_floor": 1.0,
        "floor": name,
        "tflops": flops / seconds / 1e12,
    }


def environment() -> Record:
    """What the figures were measured with."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    devices = jax.devices()
    packages = (
        "jliger",
        "jax",
        "jaxlib",
        "jax-triton",
        "triton",
        "torch",
        "liger-kernel",
        "cut-cross-entropy",
        "tokamax",
    )
    return {
        "command": " ".join(["python", "-m", "jliger.bench", *map(_without_folder, sys.argv[1:])]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := version(name))},
        "device": devices[0].device_kind,
        "devices": len(devices),
        "driver": _driver() if devices[0].platform == "gpu" else None,
    }


def _without_folder(argument: str) -> str:
    """Where on a machine a file was written says nothing about what was measured."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def write_json(path: Path, records: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "records": list(records)}, indent=1) + "\n")


def table(records: Sequence[Record], columns: dict[str, str]) -> str:
    """A Markdown table of the records' `columns`, which map headings to keys."""
    rows = [[_shown(record.get(key)) for key in columns.values()] for record in records]
    widths = [max(map(len, [heading, *[row[i] for row in rows]])) for i, heading in enumerate(columns)]
    lines = [list(columns), ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
