"""Plots of benchmark results, from their JSON files."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from jliger.bench import report
from jliger.bench.report import Record


def draw(what: str, path: Path) -> list[Path]:
    """Draws the plots of a result file into its folder; returns their paths."""
    if what == "mesh":
        return [mesh_plot(path)]
    if what == "operations":
        return [operations_plot(path)]
    trade = [trade_plot(path)] if what in ("chunk_sizes", "logprobs") else []
    return [speed_plot(path), *trade, *(memory_plot(path) if what == "head" else [])]


def speed_plot(path: Path) -> Path:
    """Draws the speed of each method relative to the floor, into the folder of `path`.

    Each shape with several methods has a panel; shapes with one method share the last panel. Only methods with the most
    frequent floor are drawn.
    """
    result = report.read_json(path)
    compared = [record for record in result["records"] if "of_floor" in record]
    floor = statistics.mode(record["floor"] for record in compared)
    at: dict[str, list[Record]] = {}
    for record in compared:
        if record["floor"] == floor:
            at.setdefault(record["shape"], []).append(record)
    panels = {
        f"N, H, V = {shape}": [(r["name"], r) for r in own] for shape, own in at.items() if len(own) > 1 or len(at) == 1
    }
    if singles := [(f"{r['name']}, {shape}", r) for shape, own in at.items() if len(own) == 1 < len(at) for r in own]:
        panels["Other N, H, V"] = singles
    heights = [len(bars) + 2 for bars in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 0.24 * sum(heights) + 0.8),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        shares = [100 * record["of_floor"] for _, record in bars]
        drawn = axis.barh([name for name, _ in bars], shares, color=[_color(record) for _, record in bars])
        axis.bar_label(drawn, fmt="%.0f", padding=2, fontsize=7)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.tick_params(labelsize=7)
        axis.axvline(100, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=8, loc="left")
    # 8-bit products are faster than the floor's.
    fastest = max(100 * record["of_floor"] for bars in panels.values() for _, record in bars)
    axes[-1, 0].set_xlim(0, max(110, 1.05 * fastest))
    axes[-1, 0].set_xlabel(f"speed, % of the {floor} alone", fontsize=8)
    figure.suptitle(_where(result), fontsize=9)
    return _saved(figure, path.with_suffix(".png"))


def operations_plot(path: Path) -> Path:
    """Draws the time of each operation, as a share of that of a copy of the same bytes, into the folder of `path`."""
    result = report.read_json(path)
    records = [record for record in result["records"] if record.get("direction", "").startswith("forward")]
    records = [record for record in records if "of_bound" in record and record["backend"] != "copy"]
    rows = list(dict.fromkeys((record["shape"], record["direction"]) for record in records))
    backends = list(dict.fromkeys(record["backend"] for record in records))
    figure, axis = plt.subplots(figsize=(9, 0.3 * len(rows) + 1.2), layout="constrained")
    for offset, backend in enumerate(backends):
        at = {(r["shape"], r["direction"]): 100 * r["of_bound"] for r in records if r["backend"] == backend}
        places = [index + 0.8 * (offset + 0.5) / len(backends) - 0.4 for index, row in enumerate(rows) if row in at]
        axis.barh(places, [at[row] for row in rows if row in at], height=0.8 / len(backends), label=backend)
    axis.set_yticks(range(len(rows)), [f"{shape}, {direction}" for shape, direction in rows], fontsize=7)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlabel("speed, % of a copy of the same bytes", fontsize=8)
    axis.legend(fontsize=7)
    figure.suptitle(_where(result), fontsize=9)
    return _saved(figure, path.with_suffix(".png"))


def memory_plot(path: Path) -> list[Path]:
    """Draws extra memory against tokens for jliger and plain JAX, if the H and V that have several N were measured."""
    result = report.read_json(path)
    lines = {"jliger": ("jliger, float32 kernel",), "all logits (plain JAX)": ("plain JAX", ", bfloat16 logits")}
    at: dict[str, list[tuple[int, float]]] = {}
    for label, ends in lines.items():
        for record in result["records"]:
            tokens, hidden, vocab = (int(number) for number in record["shape"].strip("()").split(", "))
            if (
                record["name"].startswith(ends[0])
                and record["name"].endswith(ends[-1])
                and (hidden, vocab) == (4096, 128256)
                and record.get("extra_mib")
            ):
                at.setdefault(label, []).append((tokens, record["extra_mib"] / 1024))
    if not at:
        return []
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (label, points), offset in zip(at.items(), (-12, 6), strict=False):
        points = sorted(points)
        axis.plot([x for x, _ in points], [y for _, y in points], "o-", label=label)
        for x, y in points:
            axis.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=(0, offset), ha="center", fontsize=8)
    axis.set_xticks(sorted({x for points in at.values() for x, _ in points}))
    axis.margins(y=0.12)
    axis.set_xlabel("tokens")
    axis.set_ylabel("extra memory, GiB")
    axis.legend(fontsize=8)
    axis.set_title("Loss and gradients at H = 4096, V = 128256", fontsize=9)
    return [_saved(figure, path.with_name(path.stem + "_memory.png"))]


def trade_plot(path: Path) -> Path:
    """Draws speed against extra memory: a line for methods that differ in one setting, and a point for each other one.

    Only methods with the most frequent floor are drawn, and only at shapes that have a line.
    """
    result = report.read_json(path)
    compared = [record for record in result["records"] if "of_floor" in record and record.get("extra_mib")]
    floor = statistics.mode(record["floor"] for record in compared)
    compared = [r for r in compared if r["floor"] == floor and floor not in r["name"]]
    shapes = list(dict.fromkeys(record["shape"] for record in compared if "line" in record))
    figure, axes = plt.subplots(len(shapes), 1, figsize=(10, 4 * len(shapes)), layout="constrained", squeeze=False)
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        own = [record for record in compared if record["shape"] == shape]
        for line in dict.fromkeys(record["line"] for record in own if "line" in record):
            points = [(r["extra_mib"], 100 * r["of_floor"], r["setting"]) for r in own if r.get("line") == line]
            axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=line)
            for x, y, setting in points:
                text = setting.rpartition("=")[2]
                axis.annotate(text, (x, y), textcoords="offset points", xytext=(4, -8), fontsize=6)
        others = [record for record in own if "line" not in record]
        for number, record in enumerate(others):
            style = {"marker": "xsv^*"[number % 5], "color": plt.get_cmap("tab20")(number), "linestyle": "none"}
            axis.plot(record["extra_mib"], 100 * record["of_floor"], label=record["name"], **style)
        axis.set_xscale("log")
        axis.set_title(f"N, H, V = {shape}", fontsize=8, loc="left")
        axis.set_ylabel(f"speed, % of the {floor} alone", fontsize=8)
        axis.tick_params(which="both", labelsize=7)
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1, 0].set_xlabel("extra memory, MiB", fontsize=8)
    figure.suptitle(_where(result), fontsize=9)
    return _saved(figure, path.with_name(path.stem + "_trade.png"))


def mesh_plot(path: Path) -> Path:
    """Draws tokens per second and memory per device against the number of devices, into the folder of `path`."""
    result = report.read_json(path)
    records = result["records"]
    names = [n for n in dict.fromkeys(r["name"] for r in records) if n != "one device"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    counts = sorted({r["devices"] for r in records})
    one = next(r for r in records if r["devices"] == 1)
    axes[0].plot(counts, [one["tokens_per_second"] * n for n in counts], color="black", linewidth=0.8, label="linear")
    for name in names:
        chosen = [one, *(r for r in records if r["name"] == name)]
        at = [r["devices"] for r in chosen]
        (line,) = axes[0].plot(at, [r["tokens_per_second"] for r in chosen], "o-", label=f"jliger, {name}")
        plain = [r["tokens_per_second"] * r["milliseconds"] / r["full_milliseconds"] for r in chosen]
        axes[0].plot(at, plain, "x:", color=line.get_color(), label=f"plain JAX, {name}")
        axes[1].plot(at, [r["extra_mib"] for r in chosen], "o-", color=line.get_color())
        axes[1].plot(at, [r["full_extra_mib"] for r in chosen], "x:", color=line.get_color())
    axes[0].set_ylabel("tokens/s, loss and gradients of the head")
    axes[1].set_ylabel("extra memory per device, MiB")
    axes[1].set_yscale("log")
    for ax in axes:
        ax.set_xlabel("devices")
        ax.set_xticks(counts)
    axes[0].legend(fontsize=7)
    figure.suptitle(_where(result))
    return _saved(figure, path.with_suffix(".png"))


def _color(record: Record) -> str:
    ours = record["name"].startswith(("jliger", "forward", "logits kept", "with the", "an adapter", "reverse", "JSD"))
    return "tab:blue" if ours and "plain JAX" not in record["name"] else "tab:gray"


def _where(result: Record) -> str:
    environment = result["environment"]
    return f"{environment['device']}, jax {environment['versions']['jax']}"


def _saved(figure: "plt.Figure", target: Path) -> Path:
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
