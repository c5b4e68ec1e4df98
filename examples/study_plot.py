"""Plots of what study.py found: a file for each model beside the results, with a panel for each question."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import reporting
from matplotlib.axes import Axes
from reporting import COLORS, GIB
from runs import Record
from sweeps import memory_of

Figure = Callable[[Record], float]


def fitting(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if not record["out_of_memory"]]


def speed(record: Record) -> float:
    return record["tokens_per_second"]


def gibibytes(record: Record) -> float:
    return memory_of(record) / GIB


def sides(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records with no operation of jliger, and with all but the tiled MLP."""
    return {
        "plain XLA": [record for record in records if not record["kernels"]],
        "jliger": [record for record in records if len(record["kernels"]) == 4],
    }


def by_batch(records: Sequence[Record], figure: Figure, ylabel: str, axes: Axes) -> None:
    """A figure against the batch, a line for each side, with and without remat."""
    for (name, own), color in zip(sides(records).items(), (COLORS["full"], COLORS["jliger"]), strict=True):
        for is_remat, style in ((False, "o-"), (True, "s--")):
            chosen = [r for r in own if r["is_remat"] == is_remat and not r["offload"]]
            points = sorted((r["batch"], figure(r)) for r in fitting(chosen))
            if points:
                label = f"{name}, remat" if is_remat else name
                axes.plot(*zip(*points, strict=True), style, color=color, label=label, fillstyle="none")
    axes.set(xlabel=f"sequences of {records[0]['length']:,} tokens", ylabel=ylabel, ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")


def by_switch(records: Sequence[Record], figure: Figure, title: str, axes: Axes) -> None:
    """A figure of each operation alone, in per cent of the same with none, at the batch where most were measured."""
    records = [r for r in fitting(records) if not r["is_remat"] and not r["offload"]]
    batches = [record["batch"] for record in records if len(record["kernels"]) == 1]
    if not batches:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    at = {tuple(r["kernels"]): figure(r) for r in records if r["batch"] == max(batches, key=batches.count)}
    none = at.pop((), None)
    names = {kernels: kernels[0] if len(kernels) == 1 else "all" for kernels in at}
    bars = axes.barh([names[each] for each in at], [100 * (value / none - 1) for value in at.values()])
    axes.bar_label(bars, fmt="{:+.1f} %", padding=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.25)
    axes.set(title=title, xlabel="per cent more than plain XLA")


def plot(results: Record, out: Path) -> None:
    """Draws the plot of each model that has been measured without offloading."""
    for model in dict.fromkeys(r["model"] for r in results["records"] if not r["offload"]):
        records = [record for record in results["records"] if record["model"] == model]
        panels = [
            partial(by_batch, records, speed, "tokens per second"),
            partial(by_batch, records, gibibytes, "peak memory, GiB"),
            partial(by_switch, records, speed, "Speed, one operation by jliger"),
            partial(by_switch, records, gibibytes, "Memory, one operation by jliger"),
        ]
        title = f"{model} on {results['environment']['device']}"
        reporting.plot(panels, out.with_name(f"{out.stem}_{model}.png"), width=4.6, title=title)
