"""Runs train_sharded.py --benchmark for both heads and keeps their records in one file, with a table and a plot.

    python examples/sweep_sharded.py --out results/train_sharded_h200x4.json -- --config llama3-8b --mesh fsdp=4

What follows `--` goes to train_sharded.py. Each head has a process of its own, with its batches in ascending order: a
device's peak memory can't be reset, but a larger batch's is larger.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from options import COUNT
from reporting import COLORS, GIB, TITLES, number, plot, table_of
from runs import Record
from sweeps import HEAD, SPEED, conditions, gigabytes, memory_of, memory_title, run_child, sweep, sweep_parser

HEADS = ("jliger", "full")


def text_of(results: Record) -> str:
    """Every record, a line each, and the conditions."""
    first = results["records"][0]
    mesh = ", ".join(f"{axis}={size}" for axis, size in first["mesh"].items())
    sizes = f"length {first['length']}, {first['accumulate']} part(s) a batch, mesh {mesh}"
    columns = {**HEAD, "batch": number("batch"), **SPEED, "GiB a device": gigabytes}
    return f"{table_of(results['records'], columns)}\n\n{conditions(results, sizes)}"


def curves(results: Record, is_memory: bool, axes: Axes) -> None:
    """Tokens per second, or the memory of a device, against the batch."""
    records, limit = results["records"], results["environment"]["bytes_limit"]
    for head in HEADS:
        own = sorted((record for record in records if record["head"] == head), key=lambda record: record["batch"])
        fitting = [record for record in own if not record["out_of_memory"]]
        amounts = [memory_of(record) / GIB if is_memory else record["tokens_per_second"] for record in fitting]
        axes.plot([record["batch"] for record in fitting], amounts, "o-", color=COLORS[head], label=TITLES[head])
        refused = [record["batch"] for record in own if record["out_of_memory"]]
        if is_memory and limit and refused:
            label = f"{TITLES[head]}: out of memory"
            axes.plot(refused, [limit / GIB] * len(refused), "x", color=COLORS[head], label=label)
    if is_memory and limit:
        axes.axhline(limit / GIB, color="gray", linestyle=":", label="what JAX may use")
    name = f"{memory_title(records)} memory, GiB a device" if is_memory else "tokens per second"
    axes.set(xlabel="sequences per step", ylabel=name, ylim=(0, 1.1 * axes.get_ylim()[1]))
    axes.set_xscale("log", base=2)
    ticks = sorted({record["batch"] for record in records})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower right")


def draw(results: Record, path: Path) -> None:
    """Writes the plot of tokens per second and memory."""
    first, about = results["records"][0], results["environment"]
    title = f"{first['config']} on {about['devices']} × {about['device']}, length {first['length']}, {first['dtype']}"
    plot([partial(curves, results, is_memory) for is_memory in (False, True)], path, title=title)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    out = "results/train_sharded.json"
    parser = sweep_parser("sweep_sharded", __doc__, out, "train_sharded.py", timeout=900.0)
    add = parser.add_argument
    add("--batches", type=COUNT, nargs="+", default=[64, 128], metavar="N", help="for both heads (default: 64 128)")
    for head in HEADS:
        add(f"--{head}", type=COUNT, nargs="*", metavar="N", help=f"batches for {head} instead; none leaves it out")
    add("--largest", action="store_true", help="then the largest batch that fits, for each head")
    args = parser.parse_args(argv)
    batches = {head: args.batches if getattr(args, head) is None else getattr(args, head) for head in HEADS}

    def child(head: str) -> Record | None:
        largest = ["--largest"] if args.largest else []
        arguments = [*args.rest, "--head", head, "--batch", *batches[head], *largest, "--benchmark"]
        return run_child(f"head {head}", "train_sharded.py", arguments, args.timeout)

    children = dict.fromkeys((head for head in HEADS if batches[head]), child)
    sweep("sweep_sharded", args, argv, children, text_of, draw)


if __name__ == "__main__":
    main()
