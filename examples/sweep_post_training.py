"""Measures steps of ORPO and of GRPO with either head, each in a process of its own, into one file, a table and a plot.

    python examples/sweep_post_training.py --out results/preference_grpo_h200.json -- --config llama3.2-1b

What follows `--` goes to measure.py.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from reporting import COLORS, GIB, TITLES, number, plot, table_of
from runs import Record
from sweeps import HEAD, SPEED, conditions, gigabytes, memory_of, memory_title, run_child, sweep, sweep_parser

LOSSES, HEADS = ("orpo", "dpo", "grpo"), ("jliger", "full")


def saving(records: Sequence[Record], record: Record) -> str:
    """How much less memory jliger needs than full logits, in the same loss."""
    full = [each for each in records if (each["loss"], each["head"]) == (record["loss"], "full")]
    if record["head"] == "full" or any(each["out_of_memory"] for each in (record, *full)) or not full:
        return "-"
    return f"{1 - memory_of(record) / memory_of(full[0]):.1%}"


def text_of(results: Record) -> str:
    """Every record, a line each, and the conditions."""
    records = results["records"]
    columns = {
        "loss": number("loss"),
        **HEAD,
        **SPEED,
        "XLA temporary GiB": number("memory_bytes/temporary", ".2f", GIB),
        "peak GiB": gigabytes,
        "saved": partial(saving, records),
    }
    first = records[0]
    sizes = (
        f"parameters in {first['parameters']}, {first['sequences']} sequences of {first['length']} tokens a step, "
        f"{first['prompt_length']} of them prompt"
    )
    return f"{table_of(records, columns)}\n\n{conditions(results, sizes)}"


def bars(records: Sequence[Record], is_memory: bool, axes: Axes) -> None:
    """A group of bars per loss, a bar per head."""
    losses, width = list(dict.fromkeys(record["loss"] for record in records)), 0.4
    for place, head in enumerate(HEADS):
        fitting = [record for record in records if record["head"] == head and not record["out_of_memory"]]
        at = [losses.index(record["loss"]) + (place - 0.5) * width for record in fitting]
        amounts = [memory_of(record) / GIB if is_memory else record["tokens_per_second"] for record in fitting]
        drawn = axes.bar(at, amounts, width, color=COLORS[head], label=TITLES[head])
        axes.bar_label(drawn, fmt="{:.1f}" if is_memory else "{:,.0f}")
    axes.set_xticks(range(len(losses)), [loss.upper() for loss in losses])
    name = f"{memory_title(records)} memory, GiB" if is_memory else "tokens per second"
    axes.set(ylabel=name, ylim=(0, 1.25 * axes.get_ylim()[1]))
    axes.legend(loc="upper right", ncols=2)


def draw(results: Record, path: Path) -> None:
    """Writes the plot of tokens per second and memory."""
    records = results["records"]
    first, device = records[0], results["environment"]["device"]
    sizes = f"{first['sequences']} sequences of {first['length']} tokens, {first['dtype']}"
    panels = [partial(bars, records, is_memory) for is_memory in (False, True)]
    plot(panels, path, title=f"{first['config']} on {device}, {sizes}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    out = "results/preference_grpo.json"
    parser = sweep_parser("sweep_post_training", __doc__, out, "measure.py", timeout=300.0)
    add = parser.add_argument
    add("--losses", choices=LOSSES, nargs="+", default=["orpo", "grpo"], help="what to measure (default: orpo grpo)")
    add("--heads", choices=HEADS, nargs="+", default=list(HEADS), help="with which heads (default: both)")
    args = parser.parse_args(argv)
    pairs = {f"{loss}, {head}": (loss, head) for loss in args.losses for head in args.heads}

    def child(name: str) -> Record | None:
        loss, head = pairs[name]
        # Defaults first: what follows -- counts.
        arguments = ["--rows", 32, "--learning-rate", 1e-5, *args.rest, "--what", loss, "--head", head, "--out"]
        return run_child(name, "measure.py", arguments, args.timeout)

    sweep("sweep_post_training", args, argv, dict.fromkeys(pairs, child), text_of, draw)


if __name__ == "__main__":
    main()
