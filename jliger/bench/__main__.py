"""`python -m jliger.bench [WHAT ...]`: measures on this machine's devices, prints tables, writes JSON and plots.

Several processes make the same measurements, one after the other; the results are medians over processes. Methods are
timed in bursts of calls that alternate with bursts of the matrix products that every method needs. docs/benchmarks.md
explains the method.
"""

import argparse
from pathlib import Path

from jliger.bench import processes, report

BENCHMARKS = ("head", "chunk_sizes", "logprobs", "distillation", "top_k", "operations", "float8", "mesh")


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m jliger.bench", description=summary, epilog=details)
    parser.add_argument(
        "what", nargs="*", default=["head"], metavar="WHAT", help=f"any of {', '.join(BENCHMARKS)} (head)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="the folder of the result files (runs/bench)"
    )
    parser.add_argument("--processes", type=int, default=3, help="how many processes measure, one after the other (3)")
    parser.add_argument("--quick", action="store_true", help="one process and one shape, in about a minute")
    parser.add_argument("--peers", action="store_true", help="also PyTorch's methods, where they are installed")
    parser.add_argument(
        "--only",
        nargs="*",
        default=(),
        metavar="SHAPE",
        help='shapes of the head on a GPU, such as "(8192, 4096, 128256)"',
    )
    # Given to the processes that measure: the file to write, and whether to time first calls.
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first-calls", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.what) - set(BENCHMARKS):
        parser.error(f"WHAT got {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
    if arguments.processes < 1:
        parser.error(f"--processes got {arguments.processes}; pass at least 1")
    if arguments.part is not None:
        # Only measuring processes load JAX: the process that starts them must not occupy the device.
        from jliger.bench import process

        process.run(arguments)
        return
    options = [*(["--quick"] if arguments.quick else []), *(["--peers"] if arguments.peers else [])]
    if arguments.only:
        options += ["--only", *arguments.only]
    count = 1 if arguments.quick else arguments.processes
    _show(processes.run(arguments.what, arguments.out, count=count, options=options))


def _show(written: dict[str, Path]) -> None:
    """Prints the tables of the results, and draws their plots."""
    from jliger.bench import plot

    for what, path in written.items():
        result = report.read_json(path)
        print(report.table(result["records"], report.MESH_COLUMNS if what == "mesh" else report.COLUMNS))
        print("wrote", path, *plot.draw(what, path))


if __name__ == "__main__":
    main()
