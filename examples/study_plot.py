"""Plots of what study.py found: a file for each model beside the results, with a panel for each question."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import reporting
from matplotlib.axes import Axes
from reporting import COLORS, GIB
from runs import Record
from sweeps import memory_of

FIGURES: dict[str, Callable[[Record], float]] = {
    "tokens per second": lambda record: record["tokens_per_second"],
    "peak memory, GiB": lambda record: memory_of(record) / GIB,
}


def by_batch(records: Sequence[Record], name: str, axes: Axes) -> None:
    """A figure against the batch: a line with no operation of jliger and one with all, with and without remat."""
    for is_all, label, color in ((False, "plain XLA", COLORS["full"]), (True, "jliger", COLORS["jliger"])):
        for is_remat, style in ((False, "o-"), (True, "s--")):
            own = [r for r in records if bool(r["kernels"]) == is_all and r["is_remat"] == is_remat]
            points = sorted((r["batch"], FIGURES[name](r)) for r in own if len(r["kernels"]) != 1)
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=label + ", remat" * is_remat)
    axes.set(xlabel=f"sequences of {records[0]['length']:,} tokens", ylabel=name, ylim=(0, None))
    axes.legend()


def by_switch(records: Sequence[Record], name: str, axes: Axes) -> None:
    """A figure for each operation alone and for all, in per cent of plain XLA's, at the batch that has them."""
    batch = max((r["batch"] for r in records if len(r["kernels"]) == 1), default=None)
    at = {tuple(r["kernels"]): FIGURES[name](r) for r in records if r["batch"] == batch and not r["is_remat"]}
    if none := at.pop((), None):
        labels = [kernels[0] if len(kernels) == 1 else "all but tiled_mlp" for kernels in at]
        bars = axes.barh(labels, [100 * (value / none - 1) for value in at.values()], color=COLORS["jliger"])
        axes.bar_label(bars, fmt="{:+.1f}", padding=3)
        axes.margins(x=0.2)
    axes.set(title=f"{batch} sequences, one operation by jliger", xlabel=f"{name}: % more than plain XLA")


def plot(records: Sequence[Record], out: Path) -> None:
    """Draws the plot of each model that has been measured without offloading."""
    fitting = [record for record in records if not record["out_of_memory"] and not record["offload"]]
    for model in dict.fromkeys(record["model"] for record in fitting):
        own = [record for record in fitting if record["model"] == model]
        panels = [partial(draw, own, name) for draw in (by_batch, by_switch) for name in FIGURES]
        devices = dict.fromkeys(record["environment"]["device"] for record in own)
        reporting.plot(panels, out.with_name(f"{out.stem}_{model}.png"), title=f"{model} on {', '.join(devices)}")
