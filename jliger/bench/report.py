"""Benchmark results: the environment of a process, merged records of several processes, and tables."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

Record = dict[str, Any]
COLUMNS = {
    "shape": "shape",
    "method": "name",
    "ms": "milliseconds",
    "of the floor": "of_floor",
    "of the bound": "of_bound",
    "of the baseline": "of_baseline",
    "TFLOP/s": "tflops",
    "extra memory, MiB": "extra_mib",
}
MESH_COLUMNS = {
    "devices": "devices",
    "arrangement": "name",
    "ms": "milliseconds",
    "local work, ms": "local_milliseconds",
    "collectives, ms": "collective_milliseconds",
    "their sum's share": "of_sum",
    "tokens/s": "tokens_per_second",
    "extra memory, MiB": "extra_mib",
    "plain JAX, ms": "full_milliseconds",
    "its memory, MiB": "full_extra_mib",
}


def environment() -> Record:
    """The software and hardware of the measurement."""

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
        "quack-kernels",
        "tokamax",
    )
    return {
        "command": command(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        "versions": {name: value for name in packages if (value := version(name))},
        "device": devices[0].device_kind,
        "devices": len(devices),
        "driver": _driver() if devices[0].platform == "gpu" else None,
    }


def command() -> str:
    """The command that started this process, as a user would type it."""
    return " ".join(["python", "-m", "jliger.bench", *map(_without_folder, sys.argv[1:])])


def slug(environment: Record) -> str:
    """The device's name in file names: h100 for an NVIDIA H100 80GB HBM3, and h100x2 for two."""
    words = environment["device"].lower().removeprefix("nvidia ").split()
    return words[0] + (f"x{environment['devices']}" if environment["devices"] > 1 else "")


def _without_folder(argument: str) -> str:
    """Removes the folder from an absolute path: it is specific to a machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def read_json(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, result: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# The fields that are medians over processes. Other fields come from the first process that has them.
MEASURED = (
    "milliseconds",
    "of_floor",
    "of_bound",
    "of_baseline",
    "floor_milliseconds",
    "bound_milliseconds",
    "tflops",
    "local_milliseconds",
    "collective_milliseconds",
    "of_sum",
    "tokens_per_second",
    "full_milliseconds",
)
SPREAD = ("milliseconds", "of_floor", "of_bound")


def merged(parts: Sequence[Record]) -> dict[str, Record]:
    """Merges the results of several processes into one result per benchmark: medians over processes, and their spread.

    Args:
      parts: `{"environment": ..., "records": [...]}` of each process.
    """
    by_key: dict[tuple[str, ...], list[Record]] = {}
    for part in parts:
        for record in part["records"]:
            key = tuple(str(record.get(field)) for field in ("what", "shape", "devices", "name"))
            by_key.setdefault(key, []).append(record)
    results: dict[str, Record] = {}
    for (what, *_), records in by_key.items():
        about = {**parts[0]["environment"]}
        if bandwidths := [part["copy_gb_per_second"] for part in parts if "copy_gb_per_second" in part]:
            about["copy_gb_per_second"] = bandwidths
        result = results.setdefault(what, {"environment": about, "records": []})
        result["records"].append(_merged_record(records))
    return results


def _merged_record(records: Sequence[Record]) -> Record:
    result: Record = {}
    for record in records:
        result = record | result  # the first record that has a field gives it
    result.pop("what")
    bursts = [burst for record in records for burst in record.get("bursts", ())]
    result.pop("bursts", None)
    for name in MEASURED:
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            result[name] = statistics.median(values)
            if name in SPREAD and len(values) > 1:
                result[f"{name}_spread"] = [min(values), max(values)]
    if bursts:
        result |= {"processes": sum("bursts" in record for record in records), "bursts": len(bursts)}
        result |= {"fastest_milliseconds": min(bursts), "slowest_milliseconds": max(bursts)}
    return result


def table(records: Sequence[Record], columns: dict[str, str]) -> str:
    """A Markdown table of records; `columns` maps headings to the records' keys."""
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
