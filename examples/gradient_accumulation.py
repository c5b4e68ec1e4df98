"""Studies of gradient accumulation: exactness, stability, training on real text, memory, and long context.

    python examples/gradient_accumulation.py exactness     # all ways of accumulating against the whole batch
    python examples/gradient_accumulation.py stability     # variance over accumulation cycles and seeds
    python examples/gradient_accumulation.py train         # the same training in six ways
    python examples/gradient_accumulation.py memory        # of the loss, and of whole steps
    python examples/gradient_accumulation.py long-context  # whole steps on one long sequence, within memory limits

Each writes its section of one results file, named after the device, and draws the plot beside it. On a CPU sizes are
small. docs/accumulation_study.md says what was found.
"""

import argparse
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import accumulation_studies as studies
import options
import reporting
from language_model import HEADS
from matplotlib.axes import Axes
from options import COUNT, NUMBER
from reporting import COLORS, GIB, TITLES, number, table_of
from runs import Record, read_json, run_program, write_json
from sweeps import command_of, memory_of, run_child, run_children

from jliger.bench.report import environment


class Run(NamedTuple):
    """One process of `long-context`: a head, a limit to the GPU's memory, and the lengths to measure."""

    head: str
    limit_gb: float | None
    lengths: list[int]


def parse_run(text: str) -> Run:
    """An argparse type: `jliger@24:16384,65536` or `full:16384`."""
    match = re.fullmatch(rf"({'|'.join(HEADS)})(?:@([\d.]+))?:([1-9]\d*(?:,[1-9]\d*)*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write HEAD:LENGTHS or HEAD@GB:LENGTHS, as in jliger@24:16384,65536"
        )
    head, limit, lengths = match.groups()
    return Run(head, float(limit) if limit else None, [int(length) for length in lengths.split(",")])


def gpu_mebibytes() -> float | None:
    """The memory of the first GPU; None if there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return float(output.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def variables_for(limit_gb: float | None) -> dict[str, str]:
    """The environment of a process whose GPU memory is limited."""
    if limit_gb is None:
        return {}
    mebibytes = gpu_mebibytes()
    if mebibytes is None:
        sys.exit("gradient_accumulation: error: a memory limit is for GPUs, and nvidia-smi finds none")
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{limit_gb * 1e9 / (mebibytes * 2**20):.5f}"}


def studied(args: argparse.Namespace, command: str) -> Record:
    """What a study finds in this process."""
    records = STUDIES[args.command](args)
    names = ("rows", "length", "vocab_size", "microbatches", "seeds", "cycles", "steps")
    settings = {name: value for name, value in vars(args).items() if name in names}
    return {"environment": {**environment(), "command": command}, "settings": settings, "records": records}


def measured(args: argparse.Namespace, command: str) -> Record:
    """What measure.py finds, in a process for each run."""
    runs = {f"{i}: {run.head}": run for i, run in enumerate(args.runs)}

    def child(name: str) -> Record | None:
        run = runs[name]
        limit = [] if run.limit_gb is None else ["--limit", f"{run.limit_gb:g}"]
        lengths = ["--lengths", *run.lengths] if run.lengths else []
        defaults = ["--timed-steps", 3, "--timed-seconds", 3, *MEASURE_OPTIONS[args.command, args.on_gpu].split()]
        arguments = [*defaults, *args.rest, "--head", run.head, *lengths, *limit, "--out"]
        return run_child(name, "measure.py", arguments, args.timeout, variables_for(run.limit_gb))

    return run_children(dict.fromkeys(runs, child), command, args.no_progress)


STUDIES: dict[str, Callable[[argparse.Namespace], list[Record]]] = {
    "exactness": studies.exactness,
    "stability": studies.stability,
    "train": studies.train_in_all_ways,
}
# The options of measure.py by command, and by whether there is a GPU.
MEASURE_OPTIONS = {
    ("memory", True): "--what loss step --config small --rows 8 --lengths 1024 --microbatches 1 8 --chunk-sizes 1024",
    ("memory", False): "--what loss step --dtype float32 --rows 8 --lengths 256 --microbatches 1 8 --chunk-sizes 256 "
    "--tokens 4096 --vocab 8192",
    ("long-context", True): "--config llama3.2-1b --parameters bfloat16",
    ("long-context", False): "--dtype float32",
}
# The figures of each section that are printed.
COLUMNS = {
    "exactness": "dtype tokens microbatches full/loss full/gradient jliger/loss jliger/gradient means/gradient",
    "stability": "seed way loss_mean loss_variance gradient_variance largest_gradient_difference repeat_difference",
    "train": "way last_loss heldout_loss largest_difference milliseconds memory_bytes/temporary",
    "memory": "head what dtype microbatches chunk_size tokens length milliseconds memory_bytes/temporary peak_bytes",
    "long-context": "head limit_gb length out_of_memory milliseconds tokens_per_second memory_bytes/total peak_bytes",
}


def draw_training(records: Sequence[Record], axes: Axes) -> None:
    first, *others = records
    for record in others:
        pairs = zip(record["losses"], first["losses"], strict=True)
        # Equal losses have no place on a logarithmic axis.
        apart = [abs(one - other) / other or math.nan for one, other in pairs]
        axes.plot(range(1, len(apart) + 1), apart, label=record["way"], linewidth=1)
    axes.set(title=f"Training: distance from {first['way']}", xlabel="update", ylabel="of the loss", yscale="log")
    axes.legend(fontsize="x-small")


def draw_long_context(records: Sequence[Record], axes: Axes) -> None:
    for head, color in COLORS.items():
        fitting = [record for record in records if record["head"] == head and not record["out_of_memory"]]
        points = sorted((record["length"], memory_of(record) / GIB) for record in fitting)
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=color, label=TITLES[head])
    for limit in sorted({record["limit_gb"] for record in records} - {None}):
        axes.axhline(limit * 1e9 / GIB, color="gray", linestyle=":", label=f"limit of {limit:g} GB")
    axes.set(title="Whole steps on one sequence", xlabel="tokens", ylabel="GiB", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend()


def plot(results: Record, path: Path) -> None:
    """A panel for each section that a curve says more of than a table, if there is one."""
    drawings = {"train": draw_training, "long_context": draw_long_context}
    if panels := [partial(draw, results[name]["records"]) for name, draw in drawings.items() if name in results]:
        reporting.plot(panels, path, width=7)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; what isn't given depends on whether there is a GPU."""
    parser = options.parser_of("gradient_accumulation", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    on_gpu = os.environ.get("JAX_PLATFORMS") != "cpu" and gpu_mebibytes() is not None

    def command(name: str, text: str) -> Any:
        add = commands.add_parser(name, help=text, description=text).add_argument
        add("--out", type=Path, metavar="FILE", help="results (results/gradient_accumulation_DEVICE.json)")
        add("--no-progress", action="store_true", help="draw no progress bars")
        return add

    def sizes(add: Any, length: int, microbatches: Any, **more: Any) -> None:
        add("--rows", type=COUNT, default=16, metavar="N", help="sequences a batch (%(default)s)")
        add("--length", type=COUNT, default=length, metavar="N", help="tokens a sequence (%(default)s)")
        add("--microbatches", type=COUNT, default=microbatches, metavar="N", help="(%(default)s)", **more)

    add = command("exactness", "loss and gradients of each way against the whole batch")
    sizes(add, 32, [1, 2, 4, 8, 16], nargs="+")
    add("--vocab-size", type=COUNT, default=1024, metavar="N", help="(%(default)s)")
    add("--dtypes", nargs="+", choices=studies.DTYPES, default=list(studies.DTYPES))

    add = command("stability", "variance over accumulation cycles and seeds")
    sizes(add, 32, 8)
    add("--vocab-size", type=COUNT, default=1024, metavar="N", help="(%(default)s)")
    add("--seeds", type=COUNT, default=5, metavar="N", help="models (%(default)s)")
    add("--cycles", type=COUNT, default=10, metavar="N", help="batches for each (%(default)s)")

    add = command("train", "the same training on real text in six ways")
    sizes(add, 64, 8)
    options.add_corpus_options(commands.choices["train"])
    commands.choices["train"].set_defaults(vocab_size=4096, max_bytes=2_000_000)
    add("--steps", type=COUNT, default=60, metavar="N", help="updates (%(default)s)")
    add("--learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the highest (%(default)s)")

    more = "; other options go to measure.py"
    add = command("memory", f"memory of the loss, and of whole steps with and without microbatches{more}")
    add("--timeout", type=NUMBER, default=300.0, metavar="S", help="seconds of one head's process (%(default)s)")
    commands.choices["memory"].set_defaults(runs=[Run(head, None, []) for head in HEADS])

    add = command("long-context", f"whole steps on one long sequence, each run in a process of its own{more}")
    runs = "jliger:1024,2048 full:1024,2048"
    if on_gpu:
        runs = "jliger@24:16384,32768,65536 jliger@80:131072 full:16384,32768,65536,131072"
    default = [parse_run(run) for run in runs.split()]
    add("--runs", type=parse_run, nargs="+", default=default, metavar="HEAD[@GB]:LENGTHS", help=f"({runs})")
    add("--timeout", type=NUMBER, default=300.0, metavar="S", help="seconds of one process (%(default)s)")

    args, args.rest = parser.parse_known_args(argv)
    # The studies compare float32 with float32.
    args.on_gpu, args.dtype = on_gpu, "float32"
    if args.rest and args.command in STUDIES:
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    if args.command == "stability" and args.cycles < 2:
        parser.error(f"--cycles {args.cycles}: a variance needs 2 or more")
    counts = getattr(args, "microbatches", [])
    for microbatches in counts if isinstance(counts, list) else [counts]:
        if args.rows % microbatches:
            parser.error(f"--microbatches {microbatches} doesn't divide --rows {args.rows}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    command = command_of("gradient_accumulation", argv)

    def run(args: argparse.Namespace) -> None:
        section = (studied if args.command in STUDIES else measured)(args, command)
        name = section["environment"]["device"].lower().replace("nvidia", "").strip().replace(" ", "_")
        out: Path = args.out or Path(f"results/gradient_accumulation_{name}.json")
        results = read_json(out) if out.exists() else {}
        results[args.command.replace("-", "_")] = section
        write_json(out, results)
        plot(results, out.with_suffix(".png"))
        columns = {name.replace("_", " "): number(name) for name in COLUMNS[args.command].split()}
        print(f"{table_of(section['records'], columns)}\n\nwritten: {out}")

    run_program("gradient_accumulation", run, args, "nothing was written")


if __name__ == "__main__":
    main()
