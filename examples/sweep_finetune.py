"""Measures fine-tuning steps of several models with both heads, and writes one file, a table and a plot.

    python examples/sweep_finetune.py --out results/finetune_h100.json --models llama-3.2-1b llama-3-8b:16

`llama-3-8b:16` is LoRA of rank 16. Both heads are measured at the largest batch that full logits allow, then jliger at
the largest that it allows. Each model has a process of its own. `--add` keeps the results file's other models. Each
record has the command that measured it.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from options import NUMBER, parser_of
from reporting import COLORS, GIB, TITLES, Column, number, plot, table_of
from runs import Record, RunError, run_program, write_json
from shapes import SHAPES
from sweeps import KEPT, command_of, memory_of, parts_of, read_results, run_child

# A device that does nothing else can be given to XLA as a whole: memory in pieces would fit smaller batches only.
VARIABLES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}

# What the records of one file have in common: where they were measured, and the settings of the steps.
SAME = ("device", "devices", "versions", "xla_flags")
SAME_STEPS = ("length", "dtype", "param_dtype", "mesh")

# The share of the memory that a batch takes at least if it is said to be the largest.
FILLED = 0.85


def model(text: str) -> tuple[str, int]:
    """An argparse type: a shape's name and the rank of adapters."""
    name, _, rank = text.partition(":")
    if name not in SHAPES or (rank and not rank.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: needed is NAME or NAME:RANK, of {', '.join(SHAPES)}")
    return name, int(rank or 0)


def measure(args: argparse.Namespace, results: Record, command: str) -> None:
    """Measures each model and writes the results file after it; new records of a model replace its old ones."""
    end = time.monotonic() + args.budget

    def children() -> Iterator[Callable[[], Record | None]]:
        for name, rank in args.models:
            if (seconds := min(args.timeout, end - time.monotonic())) <= 0:
                break
            options = ["--shape", name, "--lora-rank", rank, *args.rest, "--largest", *args.largest, "--"]
            yield partial(run_child, name, "measure_finetune.py", options, seconds, VARIABLES)

    for part in parts_of(children()):
        add(results, part, command)
        write_json(args.out, results)


def conditions(results: Record) -> Record:
    """What the records of a file have in common; its first record stands for all."""
    steps = {name: results["records"][0].get(name) for name in SAME_STEPS}
    return {name: results["environment"][name] for name in SAME} | steps


def add(results: Record, part: Record, command: str) -> None:
    """Adds what a command measured, in place of earlier records of the same models."""
    about, earlier = part["environment"], results["environment"]
    if results["records"]:
        old, new = conditions(results), conditions(part)
        other = [f"{name} was {old[name]} and is {new[name]}" for name in old if old[name] != new[name]]
        if other:
            raise RunError(f"--add: {', '.join(other)}, so records are not comparable: --out names another file")
    measured = set(map(model_of, part["records"]))
    records = [{"command": earlier["command"], **each} for each in results["records"] if model_of(each) not in measured]
    records += [{**each, "command": command} for each in part["records"]]
    commands = "; ".join(dict.fromkeys(each["command"] for each in records))
    results |= {"environment": {**about, "command": commands}, "records": records}


def model_of(record: Record) -> str:
    return record["shape"] + (f", LoRA {record['lora_rank']}" if record["lora_rank"] else "")


def compared(results: Record) -> list[Record]:
    """For each model: full logits at their largest batch, jliger at the same batch and at its own largest.

    Memory is compared at the same batch only. So is speed, if full logits left much of the memory free: then a larger
    batch would fit, and the largest ones of both heads are not known.
    """
    fitting = [record for record in results["records"] if not record["out_of_memory"]]
    limit = results["environment"]["bytes_limit"] or 0
    rows = []
    for name in dict.fromkeys(map(model_of, fitting)):
        own = [record for record in fitting if model_of(record) == name]
        full, fused = ([record for record in own if record["head"] == head] for head in ("full", "jliger"))
        if not full:
            rows += fused
            continue
        best = max(full, key=lambda record: record["batch"])
        rows.append(best)
        for record in fused:
            is_same = record["batch"] == best["batch"]
            if is_same or record["batch"] == max(each["batch"] for each in fused):
                is_comparable = is_same or memory_of(best) > FILLED * limit
                faster = record["tokens_per_second"] / best["tokens_per_second"] - 1 if is_comparable else None
                saved = 1 - memory_of(record) / memory_of(best) if is_same else None
                rows.append({**record, "faster": faster, "saved": saved})
    return rows


def text_of(results: Record) -> str:
    about = results["environment"]
    columns: dict[str, Column] = {
        "model": model_of,
        "head": lambda record: TITLES[record["head"]],
        "batch": number("batch"),
        "ms a step": number("milliseconds", ".0f"),
        "tokens/s": number("tokens_per_second", ",.0f"),
        "GiB a device" if about["devices"] > 1 else "GiB": lambda record: f"{memory_of(record) / GIB:.1f}",
        "more tokens/s": number("faster", "+.1%"),
        "memory saved": number("saved", ".1%"),
    }
    first = results["records"][0]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{table_of(compared(results), columns)}\n\nlength {first['length']}, arithmetic {first['dtype']}, parameters "
        f"{first['param_dtype']}, AdamW\n{about['devices']} x {about['device']}, Python {about['python']}, {versions}, "
        f"XLA_FLAGS={about['xla_flags'] or '(none)'}\n{about['command']}"
    )


def bars(rows: Sequence[Record], is_memory: bool, axes: Axes) -> None:
    """A bar for each row of the table."""
    for place, record in enumerate(rows):
        amount = memory_of(record) / GIB if is_memory else record["tokens_per_second"]
        drawn = axes.bar(place, amount, color=COLORS[record["head"]])
        axes.bar_label(drawn, fmt="{:.1f}" if is_memory else "{:,.0f}")
    labels = [f"{model_of(record)}\n{TITLES[record['head']]}, {record['batch']}" for record in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=7)
    axes.set(title="peak memory, GiB" if is_memory else "tokens per second")
    axes.margins(y=0.1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("sweep_finetune", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("results/finetune.json"), help="results; table and plot beside (%(default)s)")
    add("--models", type=model, nargs="+", default=[], metavar="NAME[:RANK]", help=f"of {', '.join(SHAPES)}")
    add("--largest", choices=TITLES, nargs="*", default=list(TITLES), help="heads with a largest batch (both)")
    add("--timeout", type=NUMBER, default=300.0, metavar="S", help="seconds of one process (%(default)s)")
    add("--budget", type=NUMBER, default=math.inf, metavar="S", help="seconds of all of them (no limit)")
    add("--add", action="store_true", help="keep what --out has of other models")
    add("--overwrite", action="store_true", help="replace --out, if there is one")
    add("--plot-only", action="store_true", help="measure nothing; make table and plot of --out again")
    add("rest", nargs="*", metavar="-- OPTIONS", help="options of measure_finetune.py, after --")
    args = parser.parse_args(argv)
    if not (args.models or args.plot_only):
        parser.error(f"--models: name at least one of {', '.join(SHAPES)}")
    run_program("sweep_finetune", partial(run, command=command_of("sweep_finetune", argv)), args, KEPT)


def run(args: argparse.Namespace, command: str) -> None:
    if args.out.exists() and not (args.plot_only or args.add or args.overwrite):
        raise RunError(f"{args.out} exists: --add keeps it, --overwrite replaces it")
    results: Record = {"environment": {}, "records": []}
    if args.plot_only or (args.add and args.out.exists()):
        results = read_results(args.out, ("shape", "lora_rank", "head", "batch"), ("environment",))
    if not args.plot_only:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        measure(args, results, command)
    if not results["records"]:
        raise RunError("nothing was measured")
    text = text_of(results)
    args.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    rows = compared(results)
    panels = [partial(bars, rows, is_memory) for is_memory in (False, True)]
    plot(panels, args.out.with_suffix(".png"), width=7, title=results["environment"]["device"])
    print(f"{text}\n\nwritten: {args.out}, and .txt and .png beside it")


if __name__ == "__main__":
    main()
