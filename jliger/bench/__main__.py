"""`python -m jliger.bench WHAT`: measures on the devices at hand, prints tables, writes JSON and a plot."""

import argparse
from pathlib import Path

from jliger.bench import distillation, head, logprobs, mesh, plot


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jliger.bench", description=__doc__)
    choices = ("head", "logprobs", "distillation", "mesh")
    parser.add_argument("what", nargs="?", choices=choices, default="head", help="what to measure")
    parser.add_argument("--out", type=Path, help="the JSON file to write; runs/bench/WHAT.json if not given")
    parser.add_argument("--rounds", type=int, default=5, help="how often each function is timed at least")
    parser.add_argument("--seconds", type=float, default=6, help="what the rounds of one shape may take beyond that")
    parser.add_argument("--peers", action="store_true", help="also time what is installed of other libraries")
    parser.add_argument("--only", nargs="*", default=(), metavar="SHAPE", help='shapes, such as "(8192, 4096, 128256)"')
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds got {arguments.rounds}; pass at least 1")
    out = arguments.out or Path(f"runs/bench/{arguments.what}.json")
    effort = head.Effort(arguments.rounds, arguments.seconds)
    if arguments.what == "mesh":
        mesh.run(out, rounds=arguments.rounds, seconds=arguments.seconds)
        picture = plot.mesh_plot(out)
    elif arguments.what == "logprobs":
        logprobs.run(out, effort)
        picture = plot.head_plot(out)
    elif arguments.what == "distillation":
        distillation.run(out, effort)
        picture = plot.head_plot(out, floor="four products")
    else:
        head.run(out, effort, with_peers=arguments.peers, only=arguments.only)
        picture = plot.head_plot(out)
    print("wrote", out, "and", picture)


if __name__ == "__main__":
    main()
