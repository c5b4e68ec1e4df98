"""What a run leaves to be read: figures of each head, tables, a plot."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from runs import PLOT, SUMMARY, Events, Record, replaced, write_json

Column = Callable[[Record], str]
TITLES = {"full": "full logits", "jliger": "jliger"}
COLORS = {"full": "tab:orange", "jliger": "tab:blue"}
MIB, GIB = 2**20, 2**30
# What XLA needs for a step beside its arguments and results, and with them.
MEMORY = ("temporary", "total")
STARTED = time.perf_counter()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def number(path: str, form: str | None = None, unit: float = 1, suffix: str = "") -> Column:
    """A column with a figure in some unit, by default as is; slashes separate the names of nested records."""

    def cell(record: Record) -> str:
        value: Any = record
        for name in path.split("/"):
            value = None if value is None else value.get(name)
        if value is None:
            return "-"
        default = ".4g" if isinstance(value, float) else "," if isinstance(value, int) else ""
        return format(value / unit if unit != 1 else value, default if form is None else form) + suffix

    return cell


def table_of(records: Sequence[Record], columns: Mapping[str, Column]) -> str:
    """A line per record; a column has a name and makes a cell of a record."""
    return table([list(columns), *([cell(record) for cell in columns.values()] for record in records)])


def curve_table(
    runs: Mapping[str, Events],
    title: str = "Training loss",
    event: str = "train",
    figure: str = "loss",
    *,
    titles: Mapping[str, str] = TITLES,
    digits: int = 7,
    difference: str = "+.1e",
    lines: int = 10,
) -> str:
    """A figure of an event at some ten steps, a column per run, and with two runs their difference."""
    curves = [events.get(event, {}) for events in runs.values()]
    steps = sorted(set.intersection(*map(set, curves)))
    shown = sorted({steps[round(i * (len(steps) - 1) / (lines - 1))] for i in range(lines)}) if steps else []
    rows = [["step", *(titles[name] for name in runs), *(["difference"] if len(runs) == 2 else [])]]
    for step in shown:
        values = [curve[step][figure] for curve in curves]
        row = [str(step), *(f"{value:.{digits}f}" for value in values)]
        rows.append([*row, format(values[1] - values[0], difference)] if len(runs) == 2 else row)
    return f"{title}\n{table(rows)}"


def saved(percent: float) -> str:
    """A saving in words; one below 0 means that more was needed."""
    return f"{abs(percent):.1f} % {'saved' if percent >= 0 else 'more'}"


LAST_LOSS = {"training loss, last step": number("train_loss", ".6f")}
LOSSES = LAST_LOSS | {
    "held-out loss": number("heldout/loss", ".6f"),
    "held-out perplexity": number("heldout/perplexity", ".2f"),
    "held-out token accuracy": number("heldout/accuracy", ".4f"),
}


def summary_table(summary: Mapping[str, Any], figures: Mapping[str, Column] = LOSSES) -> str:
    """The last figures, a column per head, with the memory that jliger saves."""
    columns = {"steps": number("steps"), "loss rows computed by": number("rows_by"), **figures}
    columns["median step"] = number("step_seconds", ".1f", 1e-3, " ms")
    for kind in MEMORY:
        columns[f"XLA {kind} memory of the step"] = number(f"memory_bytes/{kind}", ".1f", MIB, " MiB")
    rows = [["", *(TITLES[head] for head in summary["heads"])]]
    rows += [[name, *map(cell, summary["heads"].values())] for name, cell in columns.items()]
    if "comparison" in summary:
        savings = [saved(summary["comparison"][f"{kind}_memory_saving_percent"]) for kind in MEMORY]
        last = [""] * (len(rows) - len(savings)) + savings
        rows = [[*row, cell] for row, cell in zip(rows, last, strict=True)]
    return table(rows)


def summary_parts(summary: Record, tolerance: float, figures: Mapping[str, Column] = LOSSES) -> list[str]:
    """The summary's table and, with both heads, a sentence that says whether the two curves are the same."""
    if "comparison" not in summary:
        return [summary_table(summary, figures)]
    comparison, dtype = summary["comparison"], summary["dtype"]
    relative = comparison["largest_relative_difference"]
    verdict = (
        f"Over {comparison['steps']} steps the training losses differ by at most "
        f"{comparison['largest_difference']:.1e} ({relative:.1e} of the loss): "
        f"{'the same curve' if relative <= tolerance else 'NOT the same curve'} to {dtype} rounding "
        f"(bound: {tolerance:.0e} of the loss)."
    )
    return [summary_table(summary, figures), verdict]


def figures_of(events: Events) -> Record:
    train, evaluation, compiled = events.get("train", {}), events.get("eval", {}), events["compiled"][0]
    last = max(train, default=0)
    return {
        "steps": last,
        "train_loss": train[last]["loss"] if train else None,
        "heldout": evaluation[max(evaluation)] if evaluation else None,
        # The median excludes the steps that the first calls or another process slowed down.
        "step_seconds": statistics.median(record["seconds"] for record in train.values()) if train else None,
        "rows_by": compiled["rows_by"],
        "compile_seconds": compiled["seconds"],
        "memory_bytes": compiled["memory"],
    }


def summarize(runs: Mapping[str, Events], settings: Record) -> Record:
    """The settings, the figures of each head's run and, with both heads, a comparison of them."""
    heads = {head: figures_of(events) for head, events in runs.items()}
    summary = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **settings, "heads": heads}
    if pairs := losses_of_both(runs):
        summary["comparison"] = {
            "steps": len(pairs),
            "largest_difference": max(abs(b - a) for a, b in pairs.values()),
            "largest_relative_difference": max(abs(b - a) / abs(a) for a, b in pairs.values() if a),
        }
        for kind in MEMORY:
            less = heads["jliger"]["memory_bytes"][kind] / heads["full"]["memory_bytes"][kind]
            summary["comparison"][f"{kind}_memory_saving_percent"] = 100 * (1 - less)
    return summary


def losses_of_both(runs: Mapping[str, Events]) -> dict[int, tuple[float, float]]:
    """Training losses with full logits and with jliger by step; nothing without both."""
    full, fused = (runs.get(head, {}).get("train", {}) for head in ("full", "jliger"))
    return {step: (full[step]["loss"], fused[step]["loss"]) for step in sorted(full.keys() & fused.keys())}


def report(out: Path, summary: Record, panels: Sequence[Callable[[Axes], None]], parts: Sequence[str]) -> None:
    """Writes the summary and the plot, and prints the parts of the report."""
    write_json(out / SUMMARY, summary)
    plot(panels, out / PLOT)
    seconds = time.perf_counter() - STARTED
    print("\n\n".join(["", *parts, f"{seconds:.0f} s in all; metrics, {SUMMARY} and {PLOT} are in {out}"]))


def plot(panels: Sequence[Callable[[Axes], None]], path: Path, width: float = 5, title: str | None = None) -> None:
    figure = Figure(figsize=(width * len(panels), 4.5), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
    if title is not None:
        figure.suptitle(title)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=120)


def curves_panel(
    runs: Mapping[str, Events], title: str, figure: str, events: Sequence[str] = ("train",), ylabel: str = ""
) -> Callable[[Axes], None]:
    """A figure against the step, a curve per head and event."""

    def draw(axes: Axes) -> None:
        for head, run in runs.items():
            for event in events:
                # The curves lie on each other: a wide line with a dashed one on it shows both.
                style = {"linewidth": 4, "alpha": 0.5} if head == "full" else {"linewidth": 1.5, "linestyle": "--"}
                if event == "eval" and len(events) > 1:
                    style = {"linestyle": "none", "marker": "o" if head == "full" else "x"}
                records = sorted(run.get(event, {}).items())
                label = TITLES[head] if len(events) == 1 else f"{TITLES[head]}: {event}"
                steps, values = [step for step, _ in records], [record[figure] for _, record in records]
                axes.plot(steps, values, color=COLORS[head], label=label, **style)
        axes.set(title=title, xlabel="step", ylabel=ylabel)
        axes.legend()

    return draw


def difference(runs: Mapping[str, Events], axes: Axes) -> None:
    """How far apart the training losses of the two heads are."""
    pairs = losses_of_both(runs)
    # Equal losses have no place on a logarithmic axis.
    apart = [abs(full - fused) / abs(full) or math.nan for full, fused in pairs.values()]
    axes.plot(list(pairs), apart, ".-", color="black", linewidth=0.8)
    axes.axhline(2.0**-23, color="gray", linestyle=":", label="float32 spacing, $2^{-23}$")
    axes.set(title="Difference of the training losses", xlabel="step", ylabel="relative to the loss", yscale="log")
    axes.legend()


def memory(summary: Mapping[str, Any], axes: Axes) -> None:
    for kind in MEMORY:
        for head, figures in summary["heads"].items():
            amount = figures["memory_bytes"][kind] / MIB
            axes.bar_label(axes.bar(f"{kind}\n{TITLES[head]}", amount, color=COLORS[head]), fmt="%.0f")
    axes.set(title="XLA memory of the training step", ylabel="MiB")


def comparison_panels(runs: Mapping[str, Events], summary: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    """The difference of the two heads' losses, if there are both, and the memory of their steps."""
    return [*([partial(difference, runs)] if len(runs) == 2 else []), partial(memory, summary)]
