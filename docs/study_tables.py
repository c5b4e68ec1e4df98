"""The tables of docs/study.md: whole training steps by examples/study.py, each operation by jliger or by plain XLA."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accumulation_tables import memory_of
from cells import NOTHING, markdown, percent

Record = dict[str, Any]
GIB = 2**30
SWITCHES = {
    "rope": "rotary embeddings",
    "swiglu": "SwiGLU",
    "rms_norm": "RMS norms",
    "flce": "fused linear cross entropy",
    "tiled_mlp": "MLP in chunks",
}
MODELS = {"0.6b": "Qwen3-0.6B", "1b": "Llama 3.2 1B", "8b": "Llama 3 8B"}


def kind(
    table: Callable[[list[Record]], str], shown: Callable[[Record], bool] = lambda record: True
) -> Callable[[Path, Path], str]:
    """A kind of table: of those records of a results file that are `shown`, with what they were measured with."""

    def with_environment(path: Path, page: Path) -> str:
        del page
        records = [record for record in _read(path)["records"] if shown(record)]
        return f"{table(records)}\n\n{measured_with(records)}"

    return with_environment


def measured_with(records: list[Record]) -> str:
    """The devices, drivers and versions of records."""
    each = []
    for about in (record["environment"] for record in records):
        names = ("jax", "jaxlib", "jax-triton", "triton")
        versions = ", ".join(f"{name} {about['versions'][name]}" for name in names)
        each.append(f"{about['device']}, driver {about['driver']}, {versions}")
    return f"Measured on {'; and on '.join(dict.fromkeys(each))}."


def is_of_switches(record: Record) -> bool:
    return not record["is_remat"] and not record["offload"]


def commands(path: Path, page: Path) -> str:
    """The commands of a results file, and of which of its rows they are."""
    del page
    counts = Counter(record["environment"]["command"] for record in _read(path)["records"])
    return "\n".join(f"- {count} rows: `{command}`" for command, count in counts.items())


def _read(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(record: Record) -> str:
    """The operations that jliger computes."""
    kernels = record["kernels"]
    return "all but the MLP in chunks" if len(kernels) > 1 else SWITCHES[kernels[0]] if kernels else "none"


def order(record: Record) -> int:
    """None first, then each alone, then all."""
    kernels = record["kernels"]
    return 99 if len(kernels) > 1 else 1 + list(SWITCHES).index(kernels[0]) if kernels else 0


def speed(record: Record) -> str:
    return NOTHING if record["out_of_memory"] else f"{record['tokens_per_second']:,.0f}"


def peak(record: Record) -> str:
    return "does not fit" if record["out_of_memory"] else f"{memory_of(record) / GIB:.1f}"


def compared(record: Record, other: Record | None) -> list[str]:
    """How many times as fast as another, and how much less memory."""
    if other is None or record is other or record["out_of_memory"] or other["out_of_memory"]:
        return [NOTHING] * 2
    faster = record["tokens_per_second"] / other["tokens_per_second"]
    return [f"{faster:.3f}", percent(1 - memory_of(record) / memory_of(other))]


def switches(records: list[Record]) -> str:
    """Each operation alone, and all, beside none."""
    rows = []
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in records if len(r["kernels"]) == 1):
        own = sorted((r for r in records if (r["model"], r["batch"]) == (model, batch)), key=order)
        for record in own:
            about = [MODELS[model], str(batch), name_of(record), f"{record['milliseconds']:.1f}"]
            rows.append([*about, speed(record), peak(record), *compared(record, own[0])])
    headings = ("model", "sequences", "by jliger", "ms a step", "tokens/s", "peak GiB", "times as fast", "memory saved")
    return markdown(headings, rows, left=3)


def batches(records: list[Record]) -> str:
    """None and all by batch, with and without remat."""
    at: dict[tuple[Any, ...], dict[bool, Record]] = {}
    for record in records:
        sides = at.setdefault((record["model"], record["is_remat"], record["batch"]), {})
        sides[bool(record["kernels"])] = record
    rows = []
    for (model, is_remat, batch), sides in sorted(at.items()):
        cells = []
        for is_all in (False, True):
            cells += [speed(sides[is_all]), peak(sides[is_all])] if is_all in sides else [NOTHING] * 2
        more = compared(sides[True], sides.get(False)) if True in sides else [NOTHING] * 2
        rows.append([MODELS[model], "yes" if is_remat else "no", str(batch), *cells, *more])
    headings = ("model", "remat", "sequences", "plain XLA, tokens/s", "peak GiB", "jliger, tokens/s", "peak GiB")
    return markdown((*headings, "times as fast", "memory saved"), rows, left=3)


def times(records: list[Record]) -> str:
    """The time of a step's kernels by kind."""
    traced = sorted(records, key=order)
    kinds = sorted({name for record in traced for name in record["milliseconds_by_kind"]})
    rows = [[name_of(r), *(f"{r['milliseconds_by_kind'].get(name, 0):.1f}" for name in kinds)] for r in traced]
    return markdown(("by jliger", *(f"{name}, ms" for name in kinds)), rows)


def losses(records: list[Record]) -> str:
    """How far the first losses are from plain XLA's, where each operation was measured alone."""
    rows = []
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in records if len(r["kernels"]) == 1):
        none, *others = sorted((r for r in records if (r["model"], r["batch"]) == (model, batch)), key=order)
        for record in others:
            pairs = zip(record["losses"], none["losses"], strict=True)
            apart = [f"{abs(loss - expected) / expected:.1e}" for loss, expected in pairs]
            rows.append([MODELS[model], name_of(record), *apart[:3]])
    return markdown(("model", "by jliger", "first loss", "after one step", "after two"), rows, left=2)


def offloads(records: list[Record]) -> str:
    """What lies in host memory, and what it costs."""
    rows = [
        [MODELS[r["model"]], r["parameters"], str(r["batch"]), name_of(r), ", ".join(r["offload"]), *figures(r)]
        for r in sorted(records, key=lambda r: (r["model"], len(r["offload"]), order(r)))
    ]
    about = ("model", "parameters", "sequences", "by jliger", "in host memory")
    return markdown((*about, "ms a step", "tokens/s", "peak GiB", "host GiB", "losses"), rows, left=5)


def figures(record: Record) -> list[str]:
    if record["out_of_memory"]:
        return [NOTHING, NOTHING, peak(record), NOTHING, NOTHING]
    losses = " ".join(f"{loss:.3g}" for loss in record["losses"])
    return [f"{record['milliseconds']:,.0f}", speed(record), peak(record), f"{record['host_bytes'] / GIB:.1f}", losses]


def host(path: Path, page: Path) -> str:
    """Copies between host and device, and AdamW's arithmetic on either."""
    del page
    result = _read(path)
    rows = []
    for record in result["records"]:
        milliseconds, is_copy = record["milliseconds"], not record["what"].startswith("AdamW")
        speed = f"{record['bytes'] / milliseconds / 1e6:.1f}" if is_copy else NOTHING
        rows.append([record["what"], f"{record['bytes'] / GIB:.2f}", f"{milliseconds:,.2f}", speed])
    table = markdown(("copies, and updates", "GiB copied, or of moments", "ms", "GB/s"), rows)
    return f"{table}\n\n{measured_with([result])}"


KERNELS = {
    "rms_norm (16384, 1024)": "RMS norm",
    "rms_norm with residual (16384, 1024)": "RMS norm, with residual",
    "swiglu (8192, 14336)": "SwiGLU",
}


def kernels(path: Path, page: Path) -> str:
    """How close each operation comes to a copy of the bytes that it must move."""
    del page
    at = {
        (r["shape"], r["backend"]): r
        for r in json.loads(path.read_text(encoding="utf-8"))["records"]
        if r["direction"] == "forward and backward" and "of_bound" in r
    }
    rows = []
    for shape, name in KERNELS.items():
        plain, own = at[shape, "plain JAX"], at.get((shape, "triton")) or at[shape, "xla"]
        saved = [f"{record['saved_mib']:,.0f}" for record in (plain, at[shape, "xla"])]
        rows.append([name, shape[shape.index("(") :], percent(plain["of_bound"]), percent(own["of_bound"]), *saved])
    headings = ("operation", "shape", "plain JAX, of a copy", "jliger", "plain JAX saves, MiB", "jliger")
    return markdown(headings, rows, left=2)


def heads(path: Path, page: Path) -> str:
    """How close the fused linear cross entropy comes to its three products, and to its bound."""
    del page
    rows = [
        [r["shape"], f"{r['milliseconds']:.1f}", percent(r["of_floor"]), percent(r["of_bound"])]
        for r in json.loads(path.read_text(encoding="utf-8"))["records"]
        if r["name"] == "jliger, float32 kernel"
    ]
    return markdown(("tokens, H, V", "ms", "of its three products", "of its bound"), rows)


def plot(name: str) -> Callable[[Path, Path], str]:
    """The plot of a model beside a results file."""

    def picture(path: Path, page: Path) -> str:
        file = path.with_name(f"{path.stem}_{name}.png")
        return f"![speed and memory of {MODELS[name]}]({os.path.relpath(file, page.parent)})"

    return picture


STUDY_KINDS: dict[str, Callable[[Path, Path], str]] = {
    "study_switches": kind(switches, is_of_switches),
    "study_batches": kind(batches, lambda record: len(record["kernels"]) != 1 and not record["offload"]),
    "study_times": kind(times, lambda record: "milliseconds_by_kind" in record),
    "study_losses": kind(losses, is_of_switches),
    "study_offloads": kind(offloads, lambda record: bool(record["offload"])),
    "study_commands": commands,
    "study_host": host,
    "study_kernels": kernels,
    "study_heads": heads,
    "study_06b": plot("0.6b"),
    "study_1b": plot("1b"),
}
