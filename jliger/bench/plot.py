"""Plots of benchmark results, from the JSON files that the benchmarks wrote."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def head_plot(path: Path, floor: str = "three products") -> Path:
    """Speed and extra memory of each way that is held against `floor`, a group a shape; written beside `path`."""
    found = json.loads(path.read_text())
    records = [r for r in found["records"] if not r["name"].startswith("floor") and r["floor"] == floor]
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    common = [n for n in dict.fromkeys(r["name"] for r in records) if _is_shown(n)]
    figure, axes = plt.subplots(2, 1, figsize=(11, 7.5), sharex=True, layout="constrained")
    width = 0.85 / max(1, len(common))
    for place, name in enumerate(common):
        here = {r["shape"]: r for r in records if r["name"] == name}
        at = [i + (place - (len(common) - 1) / 2) * width for i, shape in enumerate(shapes) if shape in here]
        chosen = [here[shape] for shape in shapes if shape in here]
        axes[0].bar(at, [100 * r["of_floor"] for r in chosen], width, label=name)
        axes[1].bar(at, [max(1.0, r["extra_mib"]) for r in chosen], width)
    axes[0].axhline(100, color="black", linewidth=0.8)
    axes[0].set_ylabel("speed, % of the products alone")
    axes[1].set_ylabel("extra memory, MiB")
    axes[1].set_yscale("log")
    axes[1].set_xticks(range(len(shapes)), shapes, rotation=20, ha="right")
    axes[1].set_xlabel("tokens, hidden size, vocabulary")
    environment = found["environment"]
    figure.suptitle(f"Loss and gradients on {environment['device']}, jax {environment['versions']['jax']}")
    axes[0].legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def _is_shown(name: str) -> bool:
    """The ways that are measured at every shape, and other libraries'."""
    return not name.startswith("jliger, ") or name.removeprefix("jliger, ").split(" ")[0] in ("float32", "bfloat16")


def mesh_plot(path: Path) -> Path:
    """Tokens a second and memory per device against the number of devices; written beside `path`."""
    found = json.loads(path.read_text())
    records = found["records"]
    names = [n for n in dict.fromkeys(r["name"] for r in records) if n != "one device"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    counts = sorted({r["devices"] for r in records})
    one = next(r for r in records if r["devices"] == 1)
    axes[0].plot(counts, [one["tokens_per_second"] * n for n in counts], color="black", linewidth=0.8, label="linear")
    for name in names:
        chosen = [one, *(r for r in records if r["name"] == name)]
        at = [r["devices"] for r in chosen]
        (line,) = axes[0].plot(at, [r["tokens_per_second"] for r in chosen], "o-", label=f"jliger, {name}")
        shape_of = [r["tokens_per_second"] * r["milliseconds"] / r["full_milliseconds"] for r in chosen]
        axes[0].plot(at, shape_of, "x:", color=line.get_color(), label=f"full logits, {name}")
        axes[1].plot(at, [r["extra_mib"] for r in chosen], "o-", color=line.get_color())
        axes[1].plot(at, [r["full_extra_mib"] for r in chosen], "x:", color=line.get_color())
    axes[0].set_ylabel("tokens/s, loss and gradients of the head")
    axes[1].set_ylabel("extra memory per device, MiB")
    axes[1].set_yscale("log")
    for ax in axes:
        ax.set_xlabel("devices")
        ax.set_xticks(counts)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{found['environment']['device']}, jax {found['environment']['versions']['jax']}")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target
