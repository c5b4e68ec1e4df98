"""Tables of what examples/gradient_accumulation.py found, beside what the study claimed that it repeats."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import NOTHING, markdown, percent

Record = dict[str, Any]
GB = 10**9
# What the study says, by the number of tokens in a sequence: how much less memory. The last two it only projected.
CLAIMED_SAVINGS = {16384: "57.7 %", 65536: "21 to 60 %, projected", 131072: "45 to 70 %, projected"}
CLAIMED_LOSS_MEMORY = "3.055 → 0.421, 86 %"
CLAIMED_VOCABULARY = 50_000
CLAIMED_FLOAT64 = 1e-8


def section_table(name: str, table: Callable[[Record], str]) -> Callable[[Path, Path], str]:
    """A kind of table: of one section of a results file, or a sentence where the file has none."""

    def kind(path: Path, page: Path) -> str:
        del page
        result = json.loads(path.read_text(encoding="utf-8"))
        if name not in result:
            return f"Not measured yet: `{path.name}` has no {name.replace('_', ' ')}."
        return f"{table(result[name])}\n\n{measured_on(result[name])}"

    return kind


def measured_on(section: Record) -> str:
    """What the figures were measured with."""
    about = section["environment"]
    names = ("jax", "jaxlib", "jax-triton", "triton")
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in names if name in about["versions"])
    flags = f", `XLA_FLAGS={about['xla_flags']}`" if about.get("xla_flags") else ""
    driver = f", driver {about['driver']}" if about.get("driver") else ""
    return (
        f"Measured on {about['device']}{driver}, Python {about['python']}, {versions}{flags}, by `{about['command']}`."
    )


def exactness(section: Record) -> str:
    """The largest difference over all numbers of microbatches, and the means' for each."""
    records = section["records"]
    rows = []
    for dtype, tokens in dict.fromkeys((record["dtype"], record["tokens"]) for record in records):
        own = [record for record in records if (record["dtype"], record["tokens"]) == (dtype, tokens)]
        worst = {
            way: {what: max(r[way][what] for r in own) for what in ("loss", "gradient")} for way in ("full", "jliger")
        }
        figures = [f"{worst[way][what]:.1e}" for way in worst for what in worst[way]]
        largest = max(worst["jliger"].values())
        claim = [NOTHING] * 2
        if dtype == "float64":
            claim = [f"below {CLAIMED_FLOAT64:.0e}", "yes" if largest < CLAIMED_FLOAT64 else "**no**"]
        rows.append([dtype, tokens, *figures, *claim])
    counts = ", ".join(str(count) for count in dict.fromkeys(record["microbatches"] for record in records))
    headings = ("dtype", "tokens", "full: loss", "gradient", "jliger: loss", "gradient", "claimed", "holds")
    first = f"The largest of {counts} microbatches, relative to full logits of the whole batch in the same dtype:"
    wrong = [r for r in records if "means" in r and r["tokens"] == "unequal" and r["microbatches"] > 1]
    second = "The mean of means, with unequal tokens:"
    means = markdown(
        ("microbatches", "loss", "gradient"),
        [[str(r["microbatches"]), percent(r["means"]["loss"]), percent(r["means"]["gradient"])] for r in wrong],
    )
    return f"{first}\n\n{markdown(headings, rows, left=2)}\n\n{second}\n\n{means}"


def stability(section: Record) -> str:
    """Each seed's variances, and how far the heads' are apart."""
    by_seed: dict[int, dict[str, Record]] = {}
    for record in section["records"]:
        by_seed.setdefault(record["seed"], {})[record["way"]] = record
    rows = []
    for seed, ways in by_seed.items():
        full, fused, means = (ways[way] for way in ("full", "jliger", "means"))
        row = [str(seed)]
        for name in ("loss_variance", "gradient_variance"):
            row += [f"{full[name]:.4g}", f"{abs(fused[name] / full[name] - 1):.1e}", f"{means[name]:.4g}"]
        rows.append([*row, f"{max(full['repeat_difference'], fused['repeat_difference']):.0e}"])
    headings = (
        "seed",
        "variance of the loss: full",
        "jliger apart by",
        "means",
        "of the gradient: full",
        "jliger apart by",
        "means",
        "a batch done twice",
    )
    settings = section["settings"]
    return (
        f"{settings['cycles']} batches for each of {settings['seeds']} models, each in {settings['microbatches']} "
        f"microbatches, with unequal tokens, in float32:\n\n{markdown(headings, rows)}"
    )


def training(section: Record) -> str:
    """Each way's last losses."""
    records, settings = section["records"], section["settings"]
    first = records[0]["losses"]
    rows = []
    for record in records:
        apart = max(abs(one - other) / other for one, other in zip(record["losses"], first, strict=True))
        figures = [f"{record['losses'][-1]:.6f}", f"{record['heldout_loss']:.6f}", f"{apart:.1e}"]
        rows.append([record["way"], *figures])
    tokens = records[0]["tokens_per_row"]
    headings = ("way", "last loss", "held-out loss", "largest distance from the first")
    return (
        f"{settings['steps']} updates of {settings['rows']} paragraphs each, with {tokens['least']} to "
        f"{tokens['most']} tokens that count, {tokens['mean']:.0f} in the mean:\n\n{markdown(headings, rows)}"
    )


def memory(section: Record) -> str:
    """XLA's temporary memory with full logits and with jliger."""
    rows = []
    result = {key_of(record): record for record in section["records"] if record["head"] == "full"}
    for record in section["records"]:
        if record["head"] != "jliger":
            continue
        full = result.get(key_of(record))
        what = [record["what"], record["dtype"]]
        what += [f"chunks of {record['chunk_size']}"] if record.get("chunk_size") else []
        what += [f"{record['microbatches']} microbatches"] if record.get("microbatches", 1) > 1 else []
        amounts = [None if r is None or r["out_of_memory"] else r["memory_bytes"]["temporary"] for r in (full, record)]
        saving = None if None in amounts else 1 - amounts[1] / amounts[0]
        is_claimed = record["what"] == "loss" and record["vocab_size"] == CLAIMED_VOCABULARY
        tokens = record["tokens"] if record["what"] == "loss" else record["rows"] * record["length"]
        cells = [gigabytes(amount) for amount in amounts]
        times = [NOTHING if r is None or r["out_of_memory"] else f"{r['milliseconds']:.1f}" for r in (full, record)]
        claim = CLAIMED_LOSS_MEMORY if is_claimed else NOTHING
        rows.append([", ".join(what), f"{tokens:,}", *cells, percent(saving), claim, *times])
    headings = (
        "what",
        "tokens",
        "full logits, GB",
        "jliger, GB",
        "less",
        "claimed, GB",
        "full logits, ms",
        "jliger, ms",
    )
    return markdown(headings, rows)


def key_of(record: Record) -> tuple[Any, ...]:
    """What two heads' records have in common."""
    return record["what"], record["dtype"], record.get("microbatches")


def context(section: Record) -> str:
    """Whole steps on one sequence, by its length."""
    full = {r["length"]: r for r in section["records"] if r["head"] == "full" and r["limit_gb"] is None}
    rows = []
    fused = [record for record in section["records"] if record["head"] == "jliger"]
    for record in sorted(fused, key=lambda record: (record["length"], record["limit_gb"] or 0)):
        other = full.get(record["length"])
        both = [None if each is None or each["out_of_memory"] else each for each in (other, record)]
        amounts = [None if each is None else memory_of(each) for each in both]
        saving = None if None in amounts else 1 - amounts[1] / amounts[0]
        cells = [
            "out of memory" if each is not None and each["out_of_memory"] else gigabytes(amount)
            for each, amount in zip((other, record), amounts, strict=True)
        ]
        speeds = [NOTHING if each is None else f"{each['tokens_per_second']:,.0f}" for each in both]
        limit = NOTHING if record["limit_gb"] is None else f"{record['limit_gb']:g} GB"
        claim = CLAIMED_SAVINGS.get(record["length"], NOTHING)
        rows.append([f"{record['length']:,}", limit, *cells, percent(saving), claim, *speeds])
    peaks = all(record["out_of_memory"] or record["peak_bytes"] is not None for record in section["records"])
    headings = (
        "tokens",
        "jliger's limit",
        "full logits, GB",
        "jliger, GB",
        "less",
        "claimed",
        "full logits, tokens/s",
        "jliger, tokens/s",
    )
    about = "the device's peak" if peaks else "XLA's account, or the device's peak where it is known"
    first = section["records"][0]
    once = sorted({r["length"] for r in section["records"] if not r["out_of_memory"] and not r["warmed_up"]})
    note = (
        f" Of {' and '.join(f'{length:,}' for length in once)} tokens the first step is the one timed." if once else ""
    )
    return (
        f"{first['config']}, {section['environment']['parameters']:,} parameters in {first['parameters']} with AdamW's "
        f"moments, arithmetic in {first['dtype']}; GB are {about}.{note}\n\n{markdown(headings, rows)}"
    )


def memory_of(record: Record) -> float:
    """The device's peak; where it isn't known, XLA's account."""
    return record["memory_bytes"]["total"] if record["peak_bytes"] is None else record["peak_bytes"]


def gigabytes(amount: float | None) -> str:
    return NOTHING if amount is None else f"{amount / GB:.3f}"


def panels(path: Path, page: Path) -> str:
    """The plot beside a results file."""
    return f"![what the studies found]({os.path.relpath(path.with_suffix('.png'), page.parent)})"


ACCUMULATION_KINDS: dict[str, Callable[[Path, Path], str]] = {
    "exactness": section_table("exactness", exactness),
    "stability": section_table("stability", stability),
    "training": section_table("train", training),
    "memory": section_table("memory", memory),
    "context": section_table("long_context", context),
    "panels": panels,
}
