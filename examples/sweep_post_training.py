"""Measures steps of ORPO, DPO and GRPO with either head, a process each, into one file, a table and a plot.

    python examples/sweep_post_training.py --out results/preference_grpo_h200.json -- --config llama3.2-1b

What follows `--` goes to measure.py. With `--largest 28 24 20`, each loss is measured with the largest of these numbers
of sequences that full logits fit.
"""

from collections.abc import Sequence

from options import COUNT
from runs import Record
from sweeps import run_child, sweep, sweep_parser

LOSSES, HEADS = ("orpo", "dpo", "grpo"), ("jliger", "full")


def main(argv: Sequence[str] | None = None) -> None:
    out = "results/preference_grpo.json"
    parser = sweep_parser("sweep_post_training", __doc__, "measure.py", out, timeout=300.0)
    add = parser.add_argument
    add("--losses", choices=LOSSES, nargs="+", default=["orpo", "grpo"], help="what to measure (default: orpo grpo)")
    add("--heads", choices=HEADS, nargs="+", default=list(HEADS), help="with which heads (default: both)")
    add("--largest", type=COUNT, nargs="+", metavar="N", help="sequences to try; needs both heads")
    args = parser.parse_args(argv)
    if args.largest and len(args.heads) < len(HEADS):
        parser.error("--largest needs both heads: the largest number that full logits fit is measured with both")
    pairs = {f"{loss}, {head}": (loss, head) for loss in args.losses for head in args.heads}

    def measured(name: str, *sequences: object) -> Record | None:
        loss, head = pairs[name]
        # What follows -- comes later, and counts.
        arguments = ["--rows", 32, "--learning-rate", 1e-5, *args.rest, *sequences, "--what", loss, "--head", head]
        return run_child(name, "measure.py", [*arguments, "--out"], args.timeout)

    def largest(loss: str) -> Record | None:
        """Both heads' records, with as many sequences as full logits fit; the fewest to try if none does."""
        full, count = None, 0
        for count in sorted(args.largest, reverse=True):
            full = measured(f"{loss}, full", "--rows", count)
            if full is not None and not full["records"][-1]["out_of_memory"]:
                break
        own = measured(f"{loss}, jliger", "--rows", count)
        parts = [part for part in (own, full) if part is not None]
        return {**parts[0], "records": [part["records"][-1] for part in parts]} if parts else None

    settings = ("parameters", "dtype", "length", "prompt_length")
    children = dict.fromkeys(args.losses, largest) if args.largest else dict.fromkeys(pairs, measured)
    sweep("sweep_post_training", args, argv, children, "loss", settings)


if __name__ == "__main__":
    main()
