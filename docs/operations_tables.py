"""The tables of docs/other_kernels.md: norms, rotary embeddings and gated products, XLA beside Triton."""

import json
import statistics
from pathlib import Path
from typing import Any

from cells import NOTHING, markdown, mib, percent

Record = dict[str, Any]


def operations_table(path: Path, page: Path) -> str:
    """The time of each backend, beside that of a copy of the bytes that the operation must move."""
    del page
    result = json.loads(path.read_text(encoding="utf-8"))
    at = {(r["shape"], r["direction"], r["backend"]): r for r in result["records"] if "of_bound" in r}
    rows = []
    for shape, direction in dict.fromkeys(key[:2] for key in at):
        plain, xla, triton = (at.get((shape, direction, name)) for name in ("plain JAX", "xla", "triton"))
        speedup = NOTHING if xla is None or triton is None else f"{xla['milliseconds'] / triton['milliseconds']:.2f}"
        saved = mib(xla.get("saved_mib")) if xla else NOTHING
        rows.append([shape, direction, *_cells(plain), *_cells(xla), *_cells(triton), speedup, saved])
    headings = ["operation", "pass"]
    headings += [f"{name}, {what}" for name in ("plain JAX", "XLA", "Triton") for what in ("µs", "of a copy")]
    about = result["environment"]
    copies = statistics.median(about["copy_gb_per_second"]) / 1e3
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return markdown((*headings, "Triton, times as fast as XLA", "saved, MiB"), rows, left=2) + (
        f"\n\nMeasured on {about['device']}, {versions}, by `{about['command']}`. A large copy moved {copies:.2f} TB/s."
    )


def blocks_table(path: Path, page: Path) -> str:
    """The gated feed-forward block in chunks, beside all tokens at once."""
    del page
    records = [r for r in json.loads(path.read_text(encoding="utf-8"))["records"] if r.get("operation") == "gated_mlp"]
    rows = [
        [r["shape"].removeprefix("gated_mlp "), r["name"], f"{r['milliseconds']:.1f}", mib(r["extra_mib"])]
        for r in records
        if "milliseconds" in r
    ]
    return markdown(("tokens, H, F", "", "forward and backward, ms", "extra MiB"), rows, left=2)


def _cells(record: Record | None) -> list[str]:
    if record is None:
        return [NOTHING, NOTHING]
    return [f"{1e3 * record['milliseconds']:.1f}", percent(record["of_bound"])]


OPERATIONS_KINDS = {"operations": operations_table, "blocks": blocks_table}
