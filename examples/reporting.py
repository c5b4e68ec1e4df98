"""What a run leaves to be read: a metrics file, side-by-side tables, a plot."""

import json
import math
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matplotlib.figure import Figure

Record = dict[str, Any]
Events = dict[str, dict[int, Record]]
TITLES = {"full": "full logits", "jliger": "jliger"}
COLORS = {"full": "tab:orange", "jliger": "tab:blue"}
MIB = 1024 * 1024


class MetricsFile:
    """JSON lines, one record each, written through at once: a killed run loses no record.

    The file is only ever appended to. A resumed run writes the steps after its checkpoint a second time; a
    reader takes a step's last record.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A line that a kill cut off stays as it is; what follows starts a line of its own.
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, event: str, step: int, **values: Any) -> None:
        """Appends a record and hands it to the operating system."""
        self._file.write(json.dumps({"event": event, "step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> Events:
    """Records by event and step; a step's last record counts, a line that a kill cut off doesn't."""
    events: Events = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                events.setdefault(record["event"], {})[record["step"]] = record
            except (ValueError, KeyError, TypeError):
                continue
    return events


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes beside the file's place and moves it there, so that no reader meets half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def memory_of(statistics_of_step: Any) -> dict[str, int]:
    """XLA's own account of a compiled step, in bytes.

    `temporary` is what the step needs beside its arguments and results; `total` counts an argument whose
    memory a result takes over (the donated training state) once.
    """
    memory = {
        "temporary": statistics_of_step.temp_size_in_bytes,
        "arguments": statistics_of_step.argument_size_in_bytes,
        "outputs": statistics_of_step.output_size_in_bytes,
        "aliased": statistics_of_step.alias_size_in_bytes,
    }
    return memory | {"total": memory["temporary"] + memory["arguments"] + memory["outputs"] - memory["aliased"]}


def summarize(runs: Mapping[str, Events]) -> dict[str, Any]:
    """The figures of each head's run and, with both heads, how they compare."""
    summary: dict[str, Any] = {"heads": {}}
    for head, events in runs.items():
        train = events.get("train", {})
        evaluation = events.get("eval", {})
        last = max(train, default=0)
        summary["heads"][head] = {
            "steps": last,
            "train_loss": train[last]["loss"] if train else None,
            "heldout": evaluation[max(evaluation)] if evaluation else None,
            # The median leaves out the steps that the first calls or another process slowed down.
            "step_seconds": statistics.median(record["seconds"] for record in train.values()) if train else None,
            "tokens_per_step": train[last]["tokens"] if train else None,
            "rows_by": events["compiled"][0]["rows_by"],
            "compile_seconds": events["compiled"][0]["seconds"],
            "memory_bytes": events["compiled"][0]["memory"],
        }
    if len(runs) == 2:
        full, fused = (runs[head]["train"] for head in ("full", "jliger"))
        common = sorted(full.keys() & fused.keys())
        differences = {step: abs(full[step]["loss"] - fused[step]["loss"]) for step in common}
        memory = [summary["heads"][head]["memory_bytes"] for head in ("full", "jliger")]
        summary["comparison"] = {
            "steps": len(common),
            "largest_difference": max(differences.values(), default=0.0),
            "largest_relative_difference": max((differences[s] / abs(full[s]["loss"]) for s in common), default=0.0),
            "temporary_memory_saving_percent": 100 * (1 - memory[1]["temporary"] / memory[0]["temporary"]),
            "total_memory_saving_percent": 100 * (1 - memory[1]["total"] / memory[0]["total"]),
        }
    return summary


def table(rows: list[list[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def curve_table(runs: Mapping[str, Events], lines: int = 10) -> str:
    """Training loss at some ten steps, one column per head, and with both heads their difference."""
    heads = list(runs)
    curves = [runs[head].get("train", {}) for head in heads]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    shown = sorted({common[round(i * (len(common) - 1) / max(1, lines - 1))] for i in range(lines)}) if common else []
    rows = [["step", *(TITLES[head] for head in heads), *(["difference"] if len(heads) == 2 else [])]]
    for step in shown:
        losses = [curve[step]["loss"] for curve in curves]
        row = [str(step), *(f"{loss:.7f}" for loss in losses)]
        rows.append([*row, f"{losses[1] - losses[0]:+.1e}"] if len(heads) == 2 else row)
    return "Training loss\n" + table(rows)


def summary_table(summary: Mapping[str, Any]) -> str:
    """The last figures, one column per head, with the memory saving in percent."""
    heads = summary["heads"]
    comparison = summary.get("comparison")
    columns = list(heads.values())

    def row(name: str, cells: list[str], last: str = "") -> list[str]:
        return [name, *cells, last] if comparison else [name, *cells]

    def heldout(key: str, form: str) -> list[str]:
        return [form.format(column["heldout"][key]) if column["heldout"] else "-" for column in columns]

    def memory(key: str) -> list[str]:
        return [f"{column['memory_bytes'][key] / MIB:.1f} MiB" for column in columns]

    def saving(kind: str) -> str:
        return f"{comparison[f'{kind}_memory_saving_percent']:.1f} % saved" if comparison else ""

    rows = [
        row("", [TITLES[head] for head in heads]),
        row("steps", [str(column["steps"]) for column in columns]),
        row("loss rows computed by", [column["rows_by"] for column in columns]),
        row("training loss, last step", [f"{c['train_loss']:.6f}" if c["steps"] else "-" for c in columns]),
        row("held-out loss", heldout("loss", "{:.6f}")),
        row("held-out perplexity", heldout("perplexity", "{:.2f}")),
        row("held-out token accuracy", heldout("accuracy", "{:.4f}")),
        row("median step", [f"{c['step_seconds'] * 1e3:.1f} ms" if c["steps"] else "-" for c in columns]),
        row("XLA temporary memory of the step", memory("temporary"), saving("temporary")),
        row("XLA total memory of the step", memory("total"), saving("total")),
    ]
    return table(rows)


def verdict(comparison: Mapping[str, Any], dtype: str, tolerance: float) -> str:
    """One sentence on whether the two curves are one."""
    relative = comparison["largest_relative_difference"]
    within = "the same curve" if relative <= tolerance else "NOT the same curve"
    return (
        f"Over {comparison['steps']} steps the training losses differ by at most "
        f"{comparison['largest_difference']:.1e} ({relative:.1e} of the loss): {within} to {dtype} rounding "
        f"(bound: {tolerance:.0e} of the loss)."
    )


def plot(runs: Mapping[str, Events], summary: Mapping[str, Any], path: Path) -> None:
    """Writes loss curves over one another, their difference, and the memory of the step."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    curves, difference, memory = figure.subplots(1, 3)
    for head, events in runs.items():
        # The curves lie on one another: a wide line below and a dashed one on it show both.
        style = {"linewidth": 4, "alpha": 0.5} if head == "full" else {"linewidth": 1.5, "linestyle": "--"}
        train = sorted(events.get("train", {}).items())
        curves.plot(
            [step for step, _ in train],
            [record["loss"] for _, record in train],
            color=COLORS[head],
            label=f"{TITLES[head]}: training",
            **style,
        )
        evaluation = sorted(events.get("eval", {}).items())
        curves.plot(
            [step for step, _ in evaluation],
            [record["loss"] for _, record in evaluation],
            color=COLORS[head],
            linestyle="none",
            marker="o" if head == "full" else "x",
            markersize=9 if head == "full" else 6,
            label=f"{TITLES[head]}: held out",
        )
    curves.set(title="Loss", xlabel="step", ylabel="cross entropy (nats per token)")
    curves.legend()
    if len(runs) == 2:
        full, fused = (runs[head].get("train", {}) for head in ("full", "jliger"))
        common = sorted(full.keys() & fused.keys())
        relative = [abs(full[step]["loss"] - fused[step]["loss"]) / abs(full[step]["loss"]) for step in common]
        # Equal losses have no place on a logarithmic axis: they are left out.
        difference.plot(common, [value or math.nan for value in relative], ".-", color="black", linewidth=0.8)
        difference.axhline(2.0**-23, color="gray", linestyle=":", label="float32 spacing, $2^{-23}$")
        difference.set_yscale("log")
        difference.legend()
    else:
        difference.text(0.5, 0.5, "needs both heads", ha="center", va="center", transform=difference.transAxes)
    difference.set(title="Difference of the training losses", xlabel="step", ylabel="relative to the loss")
    for kind in ("temporary", "total"):
        for head, figures in summary["heads"].items():
            amount = figures["memory_bytes"][kind] / MIB
            bar = memory.bar(f"{kind}\n{TITLES[head]}", amount, color=COLORS[head])
            memory.bar_label(bar, fmt="%.0f")
    memory.set(title="XLA memory of the training step", ylabel="MiB")
    # Beside its place first: a kill while drawing leaves the earlier plot whole.
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(beside, dpi=120)
    beside.replace(path)
