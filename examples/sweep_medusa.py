"""Measures Medusa's steps with both heads, and writes one file, a table and a plot.

    python examples/sweep_medusa.py --out results/medusa_h100.json -- --shape llama-3-8b --batch 4

Each number of heads, stage and way to compute the losses has a process of its own.
"""

from collections.abc import Sequence

from options import COUNT
from runs import Record
from sweeps import run_child, sweep, sweep_parser

HEADS = ("full", "jliger")


def main(argv: Sequence[str] | None = None) -> None:
    parser = sweep_parser("sweep_medusa", __doc__, "measure_medusa.py", "results/medusa.json", timeout=120.0)
    add = parser.add_argument
    add("--medusa-heads", type=COUNT, nargs="+", default=[3, 5], metavar="K", help="heads (3 5)")
    add("--stages", type=int, choices=(1, 2), nargs="+", default=[1], help="1: the heads, 2: everything (1)")
    args = parser.parse_args(argv)
    counts = [(count, stage, head) for count in args.medusa_heads for stage in args.stages for head in HEADS]
    cases = {f"{count} heads, stage {stage}, {head}": (count, stage, head) for count, stage, head in counts}

    def measured(name: str) -> Record | None:
        count, stage, head = cases[name]
        own = ["--medusa-heads", count, "--stages", stage, "--head", head, "--"]
        return run_child(name, "measure_medusa.py", [*args.rest, *own], args.timeout)

    settings = ("batch", "length", "dtype", "param_dtype")
    sweep("sweep_medusa", args, argv, dict.fromkeys(cases, measured), "case", settings)


if __name__ == "__main__":
    main()
