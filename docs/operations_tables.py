"""The tables of docs/other_kernels.md: norms, rotary embeddings, gated products and losses, XLA beside Triton."""

import json
import statistics
from pathlib import Path
from typing import Any

from cells import NOTHING, markdown, mib, percent

Record = dict[str, Any]
BACKENDS = {"plain JAX": "plain JAX", "xla": "XLA", "triton": "Triton"}


def operations_table(path: Path, page: Path) -> str:
    """The time of each backend, beside that of a copy of the bytes that the operation must move."""
    del page
    result = json.loads(path.read_text(encoding="utf-8"))
    at = {(r["shape"], r["direction"], r["backend"]): r for r in result["records"] if r.get("backend") in BACKENDS}
    rows = []
    for shape, direction in dict.fromkeys(key[:2] for key in at if key[1].startswith("forward")):
        found = {name: at.get((shape, direction, name), {}) for name in BACKENDS}
        if "of_bound" not in found["xla"]:
            continue
        in_xla = min(r["milliseconds"] for r in (found["plain JAX"], found["xla"]) if "milliseconds" in r)
        times = f"{in_xla / found['triton']['milliseconds']:.2f}" if found["triton"] else NOTHING
        saved = "/".join(_whole(found[name].get("saved_mib")) for name in ("plain JAX", "xla"))
        saved = NOTHING if direction == "forward" or saved == f"{NOTHING}/{NOTHING}" else saved
        rows.append([shape, direction, *(cell for name in BACKENDS for cell in _cells(found[name])), times, saved])
    headings = ["operation and shape", "pass", *(f"{name}, {what}" for name in BACKENDS.values() for what in UNITS)]
    about = result["environment"]
    copies = statistics.median(about["copy_gb_per_second"]) / 1e3
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("jax", "jaxlib", "jax-triton", "triton"))
    processes = max(record.get("processes", 1) for record in result["records"])
    return markdown(
        (*headings, "Triton, times as fast as XLA's best", "saved, MiB: plain JAX/jliger"), rows, left=2
    ) + (
        f"\n\nMeasured on {about['device']}, driver {about['driver']}, {versions}, by `{about['command']}`: medians of "
        f"{processes} process{'es' if processes > 1 else ''}, with five bursts in each. A large copy moved "
        f"{copies:.2f} TB/s."
    )


UNITS = ("µs", "of a copy")


def copies_table(path: Path, page: Path) -> str:
    """How fast a copy of each shape is, compared with a large one."""
    del page
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    rows: dict[str, list[str]] = {}
    for record in records:
        if record.get("backend") == "copy":
            size = record["shape"][record["shape"].index("(") :]
            rows.setdefault(size, [size, f"{1e3 * record['milliseconds']:.1f}", percent(record["of_bound"])])
    return markdown(("shape", "µs", "of a large copy"), rows.values())


def launches_table(path: Path, page: Path) -> str:
    """Launches of the norms' backward pass."""
    del page
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    rows = [
        [
            record["shape"].removeprefix("rms_norm "),
            *(str(record["launch"][name]) for name in ("warps", "programs", "stages")),
            *_cells(record),
        ]
        for record in records
        if record.get("direction") == "tuning backward"
    ]
    return markdown(("shape", "warps", "programs", "stages", *UNITS), rows)


def blocks_table(path: Path, page: Path) -> str:
    """The gated feed-forward block in chunks, beside all tokens at once."""
    del page
    records = [r for r in json.loads(path.read_text(encoding="utf-8"))["records"] if r.get("operation") == "gated_mlp"]
    names = {
        "in chunks": "in chunks (4096 tokens, the default here)",
        "in chunks of 16384": "in chunks of 16384 tokens",
    }
    rows = [
        [
            r["shape"].removeprefix("gated_mlp "),
            names.get(r["name"], r["name"]),
            f"{r['milliseconds']:.1f}",
            mib(r["extra_mib"]),
        ]
        for r in records
    ]
    return markdown(("tokens, H, F", "", "forward and backward, ms", "extra MiB"), rows, left=2)


def _cells(record: Record) -> list[str]:
    if "milliseconds" not in record:
        return [NOTHING, NOTHING]
    return [f"{1e3 * record['milliseconds']:.1f}", percent(record["of_bound"])]


def _whole(amount: float | None) -> str:
    return NOTHING if amount is None else f"{amount:,.0f}"


OPERATIONS_KINDS = {
    "operations": operations_table,
    "copies": copies_table,
    "launches": launches_table,
    "blocks": blocks_table,
}
