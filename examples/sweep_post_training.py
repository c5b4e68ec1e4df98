"""Measures steps of ORPO and of GRPO with either head, each in a process of its own, into one file, a table and a plot.

    python examples/sweep_post_training.py --out results/preference_grpo_h200.json -- --config llama3.2-1b

What follows `--` goes to measure.py.
"""

from collections.abc import Sequence

from runs import Record
from sweeps import run_child, sweep, sweep_parser

LOSSES, HEADS = ("orpo", "dpo", "grpo"), ("jliger", "full")


def main(argv: Sequence[str] | None = None) -> None:
    out = "results/preference_grpo.json"
    parser = sweep_parser("sweep_post_training", __doc__, "measure.py", out, timeout=300.0)
    add = parser.add_argument
    add("--losses", choices=LOSSES, nargs="+", default=["orpo", "grpo"], help="what to measure (default: orpo grpo)")
    add("--heads", choices=HEADS, nargs="+", default=list(HEADS), help="with which heads (default: both)")
    args = parser.parse_args(argv)
    pairs = {f"{loss}, {head}": (loss, head) for loss in args.losses for head in args.heads}

    def child(name: str) -> Record | None:
        loss, head = pairs[name]
        # What follows -- comes later, and counts.
        arguments = ["--rows", 32, "--learning-rate", 1e-5, *args.rest, "--what", loss, "--head", head, "--out"]
        return run_child(name, "measure.py", arguments, args.timeout)

    settings = ("parameters", "dtype", "sequences", "length", "prompt_length")
    sweep("sweep_post_training", args, argv, dict.fromkeys(pairs, child), "loss", settings)


if __name__ == "__main__":
    main()
