"""Runs train_sharded.py --benchmark for both heads and keeps their records in one file, with a table and a plot.

    python examples/sweep_sharded.py --out results/train_sharded_h200x4.json -- --config llama3-8b --mesh fsdp=4

What follows `--` goes to train_sharded.py. Each head has a process of its own, with its batches in ascending order: a
device's peak memory can't be reset, but a larger batch's is larger.
"""

from collections.abc import Sequence

from options import COUNT
from runs import Record
from sweeps import run_child, sweep, sweep_parser

HEADS = ("jliger", "full")


def main(argv: Sequence[str] | None = None) -> None:
    out = "results/train_sharded.json"
    parser = sweep_parser("sweep_sharded", __doc__, "train_sharded.py", out, timeout=900.0)
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
    sweep("sweep_sharded", args, argv, children, "batch", ("dtype", "length", "accumulate", "mesh"))


if __name__ == "__main__":
    main()
