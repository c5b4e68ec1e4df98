"""`python -m jliger.bench`: measures on the device at hand, prints a table, writes JSON and a plot."""

import argparse
from pathlib import Path

from jliger.bench import head, plot


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jliger.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/head.json"), help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="how often each function is timed at least")
    parser.add_argument("--seconds", type=float, default=6, help="what the rounds of one shape may take beyond that")
    parser.add_argument("--peers", action="store_true", help="also time what is installed of other libraries")
    parser.add_argument("--only", nargs="*", default=(), metavar="SHAPE", help='shapes, such as "(8192, 4096, 128256)"')
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds got {arguments.rounds}; pass at least 1")
    effort = head.Effort(arguments.rounds, arguments.seconds)
    head.run(arguments.out, effort, with_peers=arguments.peers, only=arguments.only)
    print("wrote", arguments.out, "and", plot.head_plot(arguments.out))


if __name__ == "__main__":
    main()
