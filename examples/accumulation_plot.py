"""Plots of what gradient_accumulation.py found: a panel for each section of a results file."""

import math
from functools import partial
from pathlib import Path

import reporting
from matplotlib.axes import Axes
from reporting import COLORS, GIB, TITLES
from runs import Record
from sweeps import memory_of

LABELS = {**TITLES, "means": "mean of means"}
ALL_COLORS = {**COLORS, "means": "tab:red"}


def plot(results: Record, path: Path) -> None:
    panels = [partial(draw, section=results[name]) for name, draw in PANELS.items() if name in results]
    reporting.plot(panels, path, width=5.2)


def exactness(axes: Axes, section: Record) -> None:
    markers = {"float64": "o", "float32": "s", "bfloat16": "^"}
    for way in ("full", "jliger", "means"):
        for dtype, marker in markers.items():
            records = [r for r in section["records"] if r["dtype"] == dtype and r["tokens"] == "unequal" and way in r]
            # Equal gradients have no place on a logarithmic axis.
            points = [(r["microbatches"], r[way]["gradient"] or math.nan) for r in records]
            if points:
                style = {"marker": marker, "color": ALL_COLORS[way]}
                # A wide line below the other head's, which lies on it.
                style |= {"markersize": 11, "fillstyle": "none", "linewidth": 4, "alpha": 0.6} if way == "full" else {}
                label = LABELS[way] if way == "means" else f"{LABELS[way]}, {dtype}"
                axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(title="Gradients, unequal tokens", xlabel="microbatches", ylabel="distance from the whole batch's")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 0.2))


def stability(axes: Axes, section: Record) -> None:
    for way, marker in (("full", "o"), ("jliger", "x"), ("means", "+")):
        points = [(r["seed"], r["loss_variance"]) for r in section["records"] if r["way"] == way]
        axes.plot(*zip(*points, strict=True), marker, color=ALL_COLORS[way], label=LABELS[way], markersize=9)
    axes.set(title="Variance of the loss over cycles", xlabel="seed", ylabel="variance", ylim=(0, None))
    axes.set_xticks(sorted({record["seed"] for record in section["records"]}))
    axes.legend()


def train(axes: Axes, section: Record) -> None:
    first = section["records"][0]["losses"]
    for record in section["records"][1:]:
        pairs = zip(record["losses"], first, strict=True)
        apart = [abs(one - other) / other or math.nan for one, other in pairs]
        axes.plot(range(1, len(first) + 1), apart, label=record["way"], linewidth=1)
    axes.set(
        title="Training: distance from full logits, whole batch", xlabel="update", ylabel="of the loss", yscale="log"
    )
    axes.legend(fontsize="x-small")


def kind_of(record: Record) -> str:
    """What a record of memory is of, apart from the head."""
    parts = [record["what"], record["dtype"]]
    parts += [f"chunks of {record['chunk_size']}"] if record.get("chunk_size") else []
    parts += [f"{record['microbatches']} microbatches"] if record.get("microbatches", 1) > 1 else []
    return ", ".join(parts)


def memory(axes: Axes, section: Record) -> None:
    names, amounts, colors = [], [], []
    for record in section["records"]:
        if record["out_of_memory"]:
            continue
        names.append(f"{kind_of(record)}, {TITLES[record['head']]}")
        amounts.append(record["memory_bytes"]["temporary"] / GIB)
        colors.append(COLORS[record["head"]])
    bars = axes.barh(names[::-1], amounts[::-1], color=colors[::-1])
    axes.bar_label(bars, fmt="%.2f", fontsize="x-small", padding=2)
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize="x-small")
    axes.set(title="Memory beside arguments and results", xlabel="GiB")


def long_context(axes: Axes, section: Record) -> None:
    for head in ("full", "jliger"):
        records = [r for r in section["records"] if r["head"] == head and not r["out_of_memory"]]
        points = sorted((r["length"], memory_of(r) / GIB) for r in records)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=COLORS[head], label=TITLES[head])
    refused = [
        (r["length"], r["bytes_limit"] / GIB) for r in section["records"] if r["out_of_memory"] and r["bytes_limit"]
    ]
    if refused:
        axes.plot(*zip(*refused, strict=True), "x", color="black", label="out of memory at this limit")
    limits = sorted({r["limit_gb"] for r in section["records"] if r["limit_gb"] is not None})
    for limit in limits:
        axes.axhline(limit * 1e9 / GIB, color="gray", linestyle=":")
        axes.annotate(
            f"{limit:g} GB", (0.01, limit * 1e9 / GIB), xycoords=("axes fraction", "data"), fontsize="x-small"
        )
    axes.set(title="Whole steps on one sequence", xlabel="tokens", ylabel="GiB", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend()


PANELS = {
    "exactness": exactness,
    "stability": stability,
    "train": train,
    "memory": memory,
    "long_context": long_context,
}
