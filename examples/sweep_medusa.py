"""Measures Medusa's steps with both heads, and writes one file, a table and a plot.

    python examples/sweep_medusa.py --out results/medusa_h200.json -- --shape llama-3-8b

`3:1:4` is a step with 3 heads of stage 1 with 4 rows. Each way to compute the losses has a process of its own, with its
cases in the order given. Begin with the one that needs the least memory: a device's peak can't be reset. XLA's account
stands in for a peak that an earlier case had reached.
"""

from collections.abc import Sequence

from measure_medusa import case
from runs import Record
from sweeps import run_child, sweep, sweep_parser

HEADS = ("full", "jliger")


def main(argv: Sequence[str] | None = None) -> None:
    parser = sweep_parser("sweep_medusa", __doc__, "measure_medusa.py", "results/medusa.json", timeout=300.0)
    add, default = parser.add_argument, [(3, 1, 4), (5, 1, 4)]
    add("--cases", type=case, nargs="+", default=default, metavar="CASE", help="for both (3:1:4 5:1:4)")
    for head in HEADS:
        add(f"--{head}", type=case, nargs="*", metavar="CASE", help=f"cases of {head} instead; none leaves it out")
    args = parser.parse_args(argv)
    cases = {head: args.cases if getattr(args, head) is None else getattr(args, head) for head in HEADS}

    def measured(head: str) -> Record | None:
        own = ["--head", head, "--cases", *(":".join(map(str, each)) for each in cases[head]), "--"]
        return run_child(head, "measure_medusa.py", [*args.rest, *own], args.timeout)

    children = dict.fromkeys((head for head in HEADS if cases[head]), measured)
    sweep("sweep_medusa", args, argv, children, "case", ("length", "dtype", "param_dtype", "mesh"))


if __name__ == "__main__":
    main()
