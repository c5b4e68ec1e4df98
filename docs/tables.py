"""Writes the tables of README.md and docs/*.md from the files in results/.

    python docs/tables.py            # fills in what stands between the markers
    python docs/tables.py --check    # changes nothing; exits 1 if a page is out of date

A table stands between `<!-- table: FILE KIND -->` and `<!-- end -->`; `KINDS` has the kinds. A page says in plain words
which file has not been measured yet.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accumulation_tables import ACCUMULATION_KINDS
from cells import NOTHING, markdown, mib, percent

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (\S+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MIB = 2**20

Record = dict[str, Any]


def aim(record: Record) -> tuple[str, str]:
    """The share that was aimed at, and whether it was reached, judged before rounding."""
    if record.get("least_beside") is not None:
        aimed, found = record["least_beside"], record["of_beside"]
        reached = "yes" if found >= aimed else "**no**"
        return f"{aimed} times {record.get('beside', 'loss and gradients')}", f"{reached}, {found:.2f}"
    if record.get("least") is None:
        return NOTHING, NOTHING
    missed = record["least"] - record["of_floor"]
    return percent(record["least"]), "yes" if missed <= 0 else f"**no**, {100 * missed:.2f} short"


def environment(found: Record) -> str:
    """What the figures were measured with, in one paragraph."""
    about, records = found["environment"], found["records"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    flags = f"`XLA_FLAGS={about['xla_flags']}`" if about.get("xla_flags") else "no XLA flags"
    driver = f", driver {about['driver']}" if about.get("driver") else ""
    rounds = sorted({record["rounds"] for record in records if "rounds" in record})
    calls = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return (
        f"Measured on {about['devices']} × {about['device']}{driver}, Python {about['python']}, {versions}, {flags}, "
        f"by `{about['command']}`. Times are medians of {calls} calls."
    )


# ---- kinds of tables: functions of a result file's path --------------------------------------------------------


def main_table(path: Path, page: Path) -> str:
    """Loss and gradients at every shape, for both dtypes of the kernel, beside plain JAX."""
    del page
    found = json.loads(path.read_text(encoding="utf-8"))
    at = {(record["shape"], record["name"]): record for record in found["records"]}
    rows = []
    for shape in dict.fromkeys(record["shape"] for record in found["records"]):
        plain = [at.get((shape, name), {}) for name in ("plain JAX, full logits", "jax.checkpoint over chunks")]
        for dtype in ("float32", "bfloat16"):
            if (own := at.get((shape, f"jliger, {dtype} kernel"))) is None:
                continue
            beside = [f"{percent(r.get('of_floor'))}, {mib(r.get('extra_mib'))}" if r else NOTHING for r in plain]
            time = f"{own['milliseconds']:.1f}"
            rows.append([shape, dtype, time, percent(own["of_floor"]), *aim(own), mib(own["extra_mib"]), *beside])
    headings = (
        "N, H, V",
        "kernel",
        "ms",
        "of the floor",
        "aim",
        "reached",
        "extra MiB",
        "plain JAX, full logits",
        "jax.checkpoint over chunks",
    )
    return markdown(headings, rows, left=2) + "\n\n" + environment(found)


def ways_table(path: Path, page: Path) -> str:
    """Every way that was measured at (8192, 4096, 128256), or at the first shape there is."""
    del page
    found = json.loads(path.read_text(encoding="utf-8"))
    shapes = list(dict.fromkeys(record["shape"] for record in found["records"]))
    return _ways_at("(8192, 4096, 128256)" if "(8192, 4096, 128256)" in shapes else shapes[0], found["records"])


def shapes_table(path: Path, page: Path) -> str:
    """Every way that was measured, at every shape."""
    del page
    found = json.loads(path.read_text(encoding="utf-8"))
    shapes = dict.fromkeys(record["shape"] for record in found["records"])
    return "\n\n".join([*(_ways_at(shape, found["records"]) for shape in shapes), environment(found)])


def _ways_at(shape: str, records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        if record["shape"] != shape:
            continue
        is_floor = record["name"].startswith("floor: ")
        spread = NOTHING if is_floor else f"{record['least_milliseconds']:.1f} to {record['most_milliseconds']:.1f}"
        time = f"{record['milliseconds']:.1f}"
        speed = [NOTHING] * 2 if is_floor else [percent(record["of_floor"]), record["floor"]]
        rows.append([record["name"], time, spread, *speed, *aim(record), mib(record.get("extra_mib"))])
    headings = ("what", "ms", "least to most", "of the floor", "floor", "aim", "reached", "extra MiB")
    return f"At N, H, V = {shape}:\n\n" + markdown(headings, rows)


def mesh_table(path: Path, page: Path) -> str:
    """Several devices, against one device's work and the collectives alone."""
    del page
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for record in found["records"]:
        over = record["over_sum"] - record["most_over_sum"]
        collectives = record["collective_milliseconds"]
        rows.append(
            [
                str(record["devices"]),
                record["name"],
                f"{record['milliseconds']:.1f}",
                f"{record['local_milliseconds']:.1f}",
                NOTHING if collectives is None else f"{collectives:.1f}",
                percent(record["over_sum"]),
                percent(record["most_over_sum"]),
                "yes" if over <= 0 else f"**no**, {100 * over:.2f} over",
                f"{record['tokens_per_second']:,.0f}",
                mib(record["extra_mib"]),
                f"{record['full_milliseconds']:.1f}, {mib(record['full_extra_mib'])}",
            ]
        )
    headings = (
        "devices",
        "arrangement",
        "ms",
        "local work, ms",
        "collectives, ms",
        "of their sum",
        "at most",
        "kept",
        "tokens/s",
        "extra MiB",
        "full logits: ms, extra MiB",
    )
    return markdown(headings, rows, left=2) + "\n\n" + environment(found)


def plot(path: Path, page: Path) -> str:
    """The plot beside a result file."""
    picture = path.with_suffix(".png")
    if not picture.exists():
        return not_measured(picture)
    return f"![speed and extra memory]({os.path.relpath(picture, page.parent)})"


def train_table(path: Path, page: Path) -> str:
    """What examples/train_lm.py found, from its summary."""
    del page
    found = json.loads(path.read_text(encoding="utf-8"))
    columns = [found["heads"][head] for head in ("full", "jliger")]
    comparison = found["comparison"]

    def row(name: str, cell: Callable[[Record], str]) -> list[str]:
        return [name, *map(cell, columns)]

    rows = [
        row("steps", lambda head: str(head["steps"])),
        row("training loss, last step", lambda head: f"{head['train_loss']:.6f}"),
        row("held-out loss", lambda head: f"{head['heldout']['loss']:.6f}"),
        row("held-out token accuracy", lambda head: f"{head['heldout']['accuracy']:.4f}"),
        row("median step, ms", lambda head: f"{1e3 * head['step_seconds']:.0f}"),
        row("temporary memory of the step, MiB", lambda head: f"{head['memory_bytes']['temporary'] / MIB:.1f}"),
        row("all memory of the step, MiB", lambda head: f"{head['memory_bytes']['total'] / MIB:.1f}"),
    ]
    return (
        markdown(("", "full logits", "jliger"), rows)
        + f"\n\nOn {found['device']}, jax {found['jax']}: vocabulary {found['vocab_size']}, hidden size "
        f"{found['hidden_size']}, {found['batch_size']} × {found['length']} tokens a step, {found['dtype']}. Over "
        f"{comparison['steps']} steps the training losses differ by at most "
        f"{comparison['largest_relative_difference']:.1e} of the loss. The step's temporary memory is "
        f"{comparison['temporary_memory_saving_percent']:.1f} % less, all its memory "
        f"{comparison['total_memory_saving_percent']:.1f} %."
    )


def distill_table(path: Path, page: Path) -> str:
    """What examples/distill.py found, from its summary."""
    del page
    found = json.loads(path.read_text(encoding="utf-8"))
    titles = {"teacher": "teacher", "alone": "student, labels alone", "distilled": "student, with teacher"}
    rows = [
        [
            title,
            *(f"{found['models'][name][key]:,}" for key in ("parameters", "steps", "tokens")),
            f"{found['models'][name]['heldout']['loss']:.4f}",
        ]
        for name, title in titles.items()
    ]
    settings, comparison = found["settings"], found["comparison"]
    full, fused = (found["heads"][head]["memory_bytes"]["temporary"] / MIB for head in ("full", "jliger"))
    return (
        markdown(("", "parameters", "steps", "tokens to learn from", "held-out loss"), rows)
        + f"\n\nOn {found['device']}, jax {found['jax']}: vocabulary {settings['vocab_size']}, "
        f"{settings['batch_size']} × {settings['length']} tokens a step, {settings['dtype']}. The step with the "
        f"teacher takes {full:.1f} MiB of temporary memory with full logits of both models and {fused:.1f} MiB with "
        f"jliger, {comparison['temporary_memory_saving_percent']:.1f} % less; over {comparison['steps']} steps the two "
        f"training losses differ by at most {comparison['largest_relative_difference']:.1e} of the loss."
    )


def post_training_table(path: Path, page: Path) -> str:
    """Steps of examples/sweep_post_training.py, each head beside the other."""
    del page
    found = json.loads(path.read_text(encoding="utf-8"))
    at = {(record["loss"], record["head"]): record for record in found["records"]}
    rows = []
    for loss in dict.fromkeys(record["loss"] for record in found["records"]):
        full, fused = at[loss, "full"], at[loss, "jliger"]
        peaks = [record["peak_bytes"] / 2**30 for record in (full, fused)]
        speeds = [f"{record['tokens_per_second']:,.0f}" for record in (full, fused)]
        saved = percent(1 - peaks[1] / peaks[0])
        rows.append([loss.upper(), str(fused["sequences"]), *(f"{peak:.1f}" for peak in peaks), saved, *speeds])
    headings = (
        "loss",
        "sequences",
        "full logits, peak GiB",
        "jliger, peak GiB",
        "saved",
        "full, tokens/s",
        "jliger, tokens/s",
    )
    about, first = found["environment"], found["records"][0]
    return (
        markdown(headings, rows)
        + f"\n\n{first['config']} ({about['parameters']:,} parameters in {first['parameters']}, arithmetic in "
        f"{first['dtype']}), {first['length']} tokens a sequence, AdamW, on one {about['device']}, jax "
        f"{about['versions']['jax']}, by `{about['command']}`."
    )


def text(path: Path, page: Path) -> str:
    """A program's output, as it is."""
    del page
    return f"```text\n{path.read_text(encoding='utf-8').rstrip()}\n```"


KINDS: dict[str, Callable[[Path, Path], str]] = {
    "main": main_table,
    "ways": ways_table,
    "shapes": shapes_table,
    "mesh": mesh_table,
    "plot": plot,
    "train": train_table,
    "distill": distill_table,
    "post_training": post_training_table,
    "text": text,
    **ACCUMULATION_KINDS,
}

# ---- pages -----------------------------------------------------------------------------------------------------


def not_measured(path: Path) -> str:
    return f"Not measured yet: there is no `{path.relative_to(ROOT)}`."


def filled(page: Path) -> str:
    """A page's text with its tables as the result files have them now."""

    def fill(match: re.Match[str]) -> str:
        before, name, kind, after = match.groups()
        if kind not in KINDS:
            raise SystemExit(f"{page}: no table is of kind {kind!r}; there are {', '.join(KINDS)}")
        path = ROOT / name
        content = KINDS[kind](path, page) if path.exists() else not_measured(path)
        return f"{before}\n{content}\n\n{after}"

    return MARKED.sub(fill, page.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if (content := filled(page)) != page.read_text(encoding="utf-8"):
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(content, encoding="utf-8")
    if stale:
        print("out of date:" if check else "written:", ", ".join(stale))
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
