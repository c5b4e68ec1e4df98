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
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accumulation_tables import ACCUMULATION_KINDS
from cells import NOTHING, markdown, mib, percent
from claims_tables import CLAIMS_KINDS
from facts import OWN, at_shape, facts, fastest_liger, plain_jax
from operations_tables import OPERATIONS_KINDS
from study_tables import STUDY_KINDS
from trade_tables import TRADE_KINDS

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (\S+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MIB = 2**20

Record = dict[str, Any]


def environment(result: Record, records: Sequence[Record]) -> str:
    """What the figures of `records` were measured with, in one paragraph."""
    about = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    flags = f"`XLA_FLAGS={about['xla_flags']}`" if about.get("xla_flags") else "XLA's default flags"
    driver = f", driver {about['driver']}" if about.get("driver") else ""
    counts = sorted({record["processes"] for record in records if "processes" in record})
    processes = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    source = "One process" if counts == [1] else f"Medians of {processes} processes"
    copies = about.get("copy_gb_per_second")
    copy = f" A large copy moved {statistics.median(copies) / 1e3:.2f} TB/s." if copies else ""
    return (
        f"Measured on {about['devices']} × {about['device']}{driver}, Python {about['python']}, {versions}, {flags}, "
        f"by `{about['command']}`. {source}, with five bursts of calls in each.{copy}"
    )


# ---- kinds of tables: functions of a result file's path --------------------------------------------------------

COMPILED = 0.5  # seconds; a first call of less compiled nothing: another method had compiled its kernels
SUMMARY_SHAPES = (
    "(8192, 4096, 128256)",
    "(32768, 4096, 128256)",
    "(16384, 2304, 256000)",
    "(8192, 2048, 131072)",
    "(8192, 1024, 50304)",
)


def summary_table(path: Path, page: Path) -> str:
    """Loss and gradients at five shapes, beside plain JAX and PyTorch Liger at its best chunk budget."""
    del page
    result = _read(path)
    rows: list[list[str]] = []
    shown: list[Record] = []
    for shape in SUMMARY_SHAPES:
        at = at_shape(result, shape)
        if (own := at.get(OWN)) is None:
            continue
        plain, liger = plain_jax(at), fastest_liger(at)
        speeds = [percent(own["of_floor"]), percent(own.get("of_bound"))]
        shown += [own, *([plain] if plain else []), *([liger] if liger else [])]
        rows.append([shape, _ms(own), *speeds, mib(own["extra_mib"]), *_both(plain), *_both(liger)])
    headings = ("N, H, V", "ms", "of the floor", "of the bound", "extra MiB", "plain JAX, ms", "its MiB")
    return markdown((*headings, "PyTorch Liger at its best, ms", "its MiB"), rows) + "\n\n" + environment(result, shown)


def shapes_table(path: Path, page: Path) -> str:
    """Every method that was measured, at every shape."""
    del page
    result = _read(path)
    shapes = dict.fromkeys(record["shape"] for record in result["records"])
    return "\n\n".join(
        [*(_methods_at(shape, result["records"]) for shape in shapes), environment(result, result["records"])]
    )


def _methods_at(shape: str, records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        if record["shape"] != shape:
            continue
        spread = NOTHING
        if "fastest_milliseconds" in record:
            spread = f"{record['fastest_milliseconds']:.1f} to {record['slowest_milliseconds']:.1f}"
        first = record.get("first_call", {}).get("all")
        baseline = f"{record['of_baseline']:.2f}" if "of_baseline" in record else NOTHING
        rows.append(
            [
                f"floor: {record['name']}" if record.get("is_floor") else record["name"],
                _ms(record),
                spread,
                _of_floor(record),
                percent(record.get("of_bound")),
                baseline,
                mib(record.get("extra_mib")),
                NOTHING if first is None or first < COMPILED else f"{first:.1f}",
                f"{record['processes']} × {record['bursts'] // record['processes']}" if "bursts" in record else NOTHING,
            ]
        )
    headings = ("method", "ms", "all bursts", "of the floor", "of the bound", "times baseline", "extra MiB")
    return f"At N, H, V = {shape}:\n\n" + markdown((*headings, "first call, s", "n"), rows)


def first_calls_table(path: Path, page: Path) -> str:
    """The stages of first calls, where they were timed one by one."""
    del page
    stages = ("trace", "lower", "compile", "autotune")
    records = [record for record in _read(path)["records"] if "trace" in record.get("first_call", {})]
    rows = [
        [r["name"], *(f"{r['first_call'][stage]:.1f}" for stage in stages), f"{r['first_call']['all']:.1f}"]
        for r in records
    ]
    return markdown(("method", *stages, "all, s"), rows)


def flags_table(path: Path, page: Path) -> str:
    """Loss and gradients under XLA's default flags, and under one that may help."""
    del page
    records = _read(path)["records"]
    at = {(record["shape"], record["name"]): record for record in records}
    rows = []
    for record in records:
        if "of_baseline" not in record or not record.get("flags"):
            continue
        default = at[record["shape"], record["baseline"]]
        flag = f"`{record['flags'].replace(',', ', ')}`"
        rows.append([record["shape"], flag, _ms(default), _ms(record), f"{record['of_baseline']:.3f}"])
    return markdown(("N, H, V", "flag", "default flags, ms", "with the flag, ms", "times as fast"), rows, left=2)


def mesh_table(path: Path, page: Path) -> str:
    """Several devices, beside one device's work, the collectives alone, and XLA's partitioning of full logits."""
    del page
    records = _read(path)["records"]
    rows = [
        [
            f"{r['devices']}",
            r["name"],
            _ms(r),
            *(
                f"{r[name]:.1f}" if r.get(name) is not None else NOTHING
                for name in ("local_milliseconds", "collective_milliseconds")
            ),
            percent(r["of_sum"]),
            f"{r['tokens_per_second'] / 1e3:.0f}",
            mib(r["extra_mib"]),
            f"{r['full_milliseconds']:.1f}",
            mib(r["full_extra_mib"]),
        ]
        for r in records
    ]
    headings = ("devices", "arrangement", "ms", "one device's work, ms", "collectives, ms", "their sum, of the time")
    more = ("thousand tokens/s", "extra MiB a device", "plain JAX, ms", "its MiB")
    return markdown((*headings, *more), rows, left=2) + "\n\n" + environment(_read(path), records)


def _read(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))


def _ms(record: Record) -> str:
    if "milliseconds" not in record:
        return NOTHING
    return f"{record['milliseconds']:.{1 if record['milliseconds'] >= 10 else 2}f}"


def _of_floor(record: Record) -> str:
    """A share, with the floor's name where it is not that of loss and gradients."""
    share = percent(record.get("of_floor"))
    return f"{share} of {record['floor']}" if record.get("floor") in ("one product", "two products") else share


def _both(record: Record) -> list[str]:
    return [_ms(record), mib(record.get("extra_mib"))]


def plot(path: Path, page: Path) -> str:
    """The plot beside a result file."""
    return _picture(path.with_suffix(".png"), page, "speed and extra memory")


def memory_plot(path: Path, page: Path) -> str:
    """The plot of memory beside a result file."""
    return _picture(path.with_name(f"{path.stem}_memory.png"), page, "extra memory against tokens")


def operations_plot(path: Path, page: Path) -> str:
    """The plot of operations beside a result file."""
    return _picture(path.with_suffix(".png"), page, "speed of each operation, compared with a copy")


def _picture(picture: Path, page: Path, title: str) -> str:
    if not picture.exists():
        return not_measured(picture)
    return f"![{title}]({os.path.relpath(picture, page.parent)})"


def train_table(path: Path, page: Path) -> str:
    """What examples/train_lm.py found, from its summary."""
    del page
    result = json.loads(path.read_text(encoding="utf-8"))
    columns = [result["heads"][head] for head in ("full", "jliger")]
    comparison = result["comparison"]

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
        + f"\n\nOn {result['device']}, jax {result['jax']}: vocabulary {result['vocab_size']}, hidden size "
        f"{result['hidden_size']}, {result['batch_size']} × {result['length']} tokens a step, {result['dtype']}. Over "
        f"{comparison['steps']} steps the training losses differ by at most "
        f"{comparison['largest_relative_difference']:.1e} of the loss. The step's temporary memory is "
        f"{comparison['temporary_memory_saving_percent']:.1f} % less, all its memory "
        f"{comparison['total_memory_saving_percent']:.1f} %."
    )


def post_training_table(path: Path, page: Path) -> str:
    """Steps of examples/sweep_post_training.py, each head beside the other."""
    del page
    result = json.loads(path.read_text(encoding="utf-8"))
    at = {(record["loss"], record["head"]): record for record in result["records"]}
    rows = []
    for loss in dict.fromkeys(record["loss"] for record in result["records"]):
        full, fused = at[loss, "full"], at[loss, "jliger"]
        both = (full, fused)
        peaks = ["does not fit" if r["out_of_memory"] else f"{r['peak_bytes'] / 2**30:.1f}" for r in both]
        speeds = [NOTHING if r["out_of_memory"] else f"{r['tokens_per_second']:,.0f}" for r in both]
        saved = NOTHING if full["out_of_memory"] else percent(1 - fused["peak_bytes"] / full["peak_bytes"])
        rows.append([loss.upper(), str(fused["sequences"]), *peaks, saved, *speeds])
    headings = (
        "loss",
        "sequences",
        "full logits, peak GiB",
        "jliger, peak GiB",
        "saved",
        "full, tokens/s",
        "jliger, tokens/s",
    )
    about, first = result["environment"], result["records"][0]
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
    "facts": facts,
    "summary": summary_table,
    "shapes": shapes_table,
    "first_calls": first_calls_table,
    "flags": flags_table,
    "mesh": mesh_table,
    "plot": plot,
    "memory_plot": memory_plot,
    "train": train_table,
    "post_training": post_training_table,
    "text": text,
    **ACCUMULATION_KINDS,
    **OPERATIONS_KINDS,
    **TRADE_KINDS,
    **STUDY_KINDS,
    **CLAIMS_KINDS,
    "operations_plot": operations_plot,
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
