"""What a run leaves to be read: a metrics file, side-by-side tables, a plot."""

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]
Events = dict[str, dict[int, Record]]
# A line of a table: its name, and a head's cell from that head's summary.
Row = tuple[str, Callable[[Record], str]]
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


def figures_of(events: Events) -> dict[str, Any]:
    """What one run came to."""
    train = events.get("train", {})
    evaluation = events.get("eval", {})
    last = max(train, default=0)
    return {
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


def summarize(runs: Mapping[str, Events]) -> dict[str, Any]:
    """The figures of each head's run and, with both heads, how they compare."""
    summary: dict[str, Any] = {"heads": {head: figures_of(events) for head, events in runs.items()}}
    if len(runs) == 2:
        full, fused = (runs[head].get("train", {}) for head in ("full", "jliger"))
        common = sorted(full.keys() & fused.keys())
        differences = {step: abs(full[step]["loss"] - fused[step]["loss"]) for step in common}
        memory = [summary["heads"][head]["memory_bytes"] for head in ("full", "jliger")]
        summary["comparison"] = {
            "steps": len(common),
            "largest_difference": max(differences.values(), default=0.0),
            "largest_relative_difference": max(
                (differences[s] / abs(full[s]["loss"]) for s in common if full[s]["loss"]), default=0.0
            ),
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


def curve_table(
    runs: Mapping[str, Events],
    title: str = "Training loss",
    event: str = "train",
    figure: str = "loss",
    *,
    digits: int = 7,
    lines: int = 10,
) -> str:
    """A figure of an event at some ten steps, one column per head, and with both heads their difference."""
    heads = list(runs)
    curves = [runs[head].get(event, {}) for head in heads]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    shown = sorted({common[round(i * (len(common) - 1) / max(1, lines - 1))] for i in range(lines)}) if common else []
    rows = [["step", *(TITLES[head] for head in heads), *(["difference"] if len(heads) == 2 else [])]]
    for step in shown:
        values = [curve[step][figure] for curve in curves]
        row = [str(step), *(f"{value:.{digits}f}" for value in values)]
        rows.append([*row, f"{values[1] - values[0]:+.1e}"] if len(heads) == 2 else row)
    return f"{title}\n{table(rows)}"


def heldout_row(name: str, figure: str, form: str) -> Row:
    """A figure of the last evaluation."""
    return name, lambda head: form.format(head["heldout"][figure]) if head["heldout"] else "-"


LAST_LOSS: Row = ("training loss, last step", lambda head: f"{head['train_loss']:.6f}" if head["steps"] else "-")
LOSSES = (
    LAST_LOSS,
    heldout_row("held-out loss", "loss", "{:.6f}"),
    heldout_row("held-out perplexity", "perplexity", "{:.2f}"),
    heldout_row("held-out token accuracy", "accuracy", "{:.4f}"),
)


def saved(percent: float) -> str:
    """A saving in words: one below 0 is more that was needed."""
    return f"{abs(percent):.1f} % {'saved' if percent >= 0 else 'more'}"


def summary_table(summary: Mapping[str, Any], figures: Sequence[Row] = LOSSES) -> str:
    """The last figures, one column per head, with the memory saving in percent."""
    heads = summary["heads"]
    comparison = summary.get("comparison")

    def row(name: str, cell: Callable[[Record], str], last: str = "") -> list[str]:
        return [name, *map(cell, heads.values()), *([last] if comparison else [])]

    def memory_row(kind: str) -> list[str]:
        saving = saved(comparison[f"{kind}_memory_saving_percent"]) if comparison else ""
        return row(f"XLA {kind} memory of the step", lambda head: f"{head['memory_bytes'][kind] / MIB:.1f} MiB", saving)

    rows = [
        ["", *(TITLES[head] for head in heads), *([""] if comparison else [])],
        row("steps", lambda head: str(head["steps"])),
        row("loss rows computed by", lambda head: head["rows_by"]),
        *(row(*figure) for figure in figures),
        row("median step", lambda head: f"{head['step_seconds'] * 1e3:.1f} ms" if head["steps"] else "-"),
        memory_row("temporary"),
        memory_row("total"),
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
    draw_curves(curves, runs, "train", "loss", "{}: training")
    for head, events in runs.items():
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
    draw_difference(difference, runs)
    draw_memory(memory, summary)
    save_figure(figure, path)


def draw_curves(axes: Axes, runs: Mapping[str, Events], event: str, figure: str, label: str = "{}") -> None:
    """A figure of an event against the step, a curve a head."""
    for head, events in runs.items():
        # The curves lie on one another: a wide line below and a dashed one on it show both.
        style = {"linewidth": 4, "alpha": 0.5} if head == "full" else {"linewidth": 1.5, "linestyle": "--"}
        records = sorted(events.get(event, {}).items())
        axes.plot(
            [step for step, _ in records],
            [record[figure] for _, record in records],
            color=COLORS[head],
            label=label.format(TITLES[head]),
            **style,
        )


def draw_difference(axes: Axes, runs: Mapping[str, Events]) -> None:
    """How far apart the training losses of the two heads are."""
    if len(runs) == 2:
        full, fused = (runs[head].get("train", {}) for head in ("full", "jliger"))
        common = sorted(full.keys() & fused.keys())
        relative = [abs(full[step]["loss"] - fused[step]["loss"]) / abs(full[step]["loss"]) for step in common]
        # Equal losses have no place on a logarithmic axis: they are left out.
        axes.plot(common, [value or math.nan for value in relative], ".-", color="black", linewidth=0.8)
        axes.axhline(2.0**-23, color="gray", linestyle=":", label="float32 spacing, $2^{-23}$")
        axes.set_yscale("log")
        axes.legend()
    else:
        axes.text(0.5, 0.5, "needs both heads", ha="center", va="center", transform=axes.transAxes)
    axes.set(title="Difference of the training losses", xlabel="step", ylabel="relative to the loss")


def draw_memory(axes: Axes, summary: Mapping[str, Any]) -> None:
    """XLA's account of each head's step."""
    for kind in ("temporary", "total"):
        for head, figures in summary["heads"].items():
            amount = figures["memory_bytes"][kind] / MIB
            bar = axes.bar(f"{kind}\n{TITLES[head]}", amount, color=COLORS[head])
            axes.bar_label(bar, fmt="%.0f")
    axes.set(title="XLA memory of the training step", ylabel="MiB")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes beside the file's place first: a kill while drawing leaves an earlier plot whole."""
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(beside, dpi=120)
    beside.replace(path)
