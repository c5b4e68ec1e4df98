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
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import accumulation_plot
import accumulation_studies as studies
import options
from language_model import HEADS
from llama import LlamaConfig
from options import COUNT, NUMBER
from reporting import number, table_of
from runs import Record, read_json, run_program, write_json
from sweeps import run_child, run_children

from jliger.bench.report import environment

# The models that are compared and trained.
COMPARED = LlamaConfig(1024, 32, 96, 2, 4, 2, tie_embeddings=True)
TRAINED = LlamaConfig(4096, 64, 192, 2, 4, 2, tie_embeddings=True)


class Run(NamedTuple):
    """One process of `long-context`: a head, a limit to the GPU's memory, and the lengths to measure."""

    head: str
    limit_gb: float | None
    lengths: list[int]


def parse_run(text: str) -> Run:
    """An argparse type: `jliger@24:16384,65536` or `full:16384`."""
    name, _, lengths = text.partition(":")
    head, _, limit = name.partition("@")
    try:
        run = Run(head, float(limit) if limit else None, [int(length) for length in lengths.split(",")])
    except ValueError:
        run = None
    if run is None or head not in HEADS or min(run.lengths) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write HEAD:LENGTHS or HEAD@GB:LENGTHS, as in jliger@24:16384,65536"
        )
    return run


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


def in_process(records: list[Record], command: str, args: argparse.Namespace, names: str, **more: Any) -> Record:
    settings = {name: getattr(args, name) for name in names.split()} | more
    return {"environment": {**environment(), "command": command}, "settings": settings, "records": records}


def exactness(args: argparse.Namespace, command: str) -> Record:
    sizes = studies.Sizes(replace(COMPARED, vocab_size=args.vocab_size), args.rows, args.length)
    records = studies.exactness(sizes, args.dtypes, args.microbatches, args.no_progress)
    return in_process(records, command, args, "rows length vocab_size")


def stability(args: argparse.Namespace, command: str) -> Record:
    sizes = studies.Sizes(replace(COMPARED, vocab_size=args.vocab_size), args.rows, args.length)
    records = studies.stability(sizes, args.microbatches, args.seeds, args.cycles, args.no_progress)
    return in_process(records, command, args, "rows length vocab_size microbatches seeds cycles")


def train(args: argparse.Namespace, command: str) -> Record:
    corpus = options.corpus_of(args)
    records = studies.train_in_all_ways(corpus, studies.Sizes(TRAINED, args.rows, args.length), args)
    more = {"vocab_size": corpus.vocab_size, "documents": corpus.documents}
    return in_process(records, command, args, "rows length microbatches steps", **more)


def measured(args: argparse.Namespace, command: str) -> Record:
    """What measure.py finds, in a process for each run."""
    runs = {f"{i}: {run.head}": run for i, run in enumerate(args.runs)}

    def child(name: str) -> Record | None:
        run = runs[name]
        limit = [] if run.limit_gb is None else ["--limit", f"{run.limit_gb:g}"]
        lengths = ["--lengths", *run.lengths] if run.lengths else []
        defaults = MEASURE_OPTIONS[args.command, args.on_gpu].split()
        arguments = [*defaults, *args.rest, "--head", run.head, *lengths, *limit, "--out"]
        return run_child(name, "measure.py", arguments, args.timeout, variables_for(run.limit_gb))

    return run_children(dict.fromkeys(runs, child), command, args.no_progress)


COMMANDS: dict[str, Callable[[argparse.Namespace, str], Record]] = {
    "exactness": exactness,
    "stability": stability,
    "train": train,
    "memory": measured,
    "long-context": measured,
}
# The options of measure.py by command, and by whether there is a GPU.
MEASURE_OPTIONS = {
    ("memory", True): "--what loss step --config small --rows 8 --lengths 1024 --microbatches 1 8 --chunk-sizes 1024 "
    "--timed-steps 3 --timed-seconds 3",
    ("memory", False): "--what loss step --dtype float32 --rows 8 --lengths 256 --microbatches 1 8 --chunk-sizes 256 "
    "--tokens 4096 --vocab 8192 --timed-steps 3 --timed-seconds 3",
    ("long-context", True): "--config llama3.2-1b --parameters bfloat16 --timed-steps 3 --timed-seconds 3",
    ("long-context", False): "--dtype float32 --timed-steps 3 --timed-seconds 3",
}


# The figures of each section that are printed.
COLUMNS = {
    "exactness": "dtype tokens microbatches full/loss full/gradient jliger/loss jliger/gradient means/gradient",
    "stability": "seed way loss_mean loss_variance gradient_variance largest_gradient_difference repeat_difference",
    "train": "way last_loss heldout_loss largest_difference milliseconds memory_bytes/temporary",
    "memory": "head what dtype microbatches chunk_size tokens length milliseconds memory_bytes/temporary peak_bytes",
    "long-context": "head limit_gb length out_of_memory milliseconds tokens_per_second memory_bytes/total peak_bytes",
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; what isn't given depends on whether there is a GPU."""
    parser = options.parser_of("gradient_accumulation", __doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, metavar="FILE", help="results (results/gradient_accumulation_DEVICE.json)")
    common.add_argument("--no-progress", action="store_true", help="draw no progress bars")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    on_gpu = os.environ.get("JAX_PLATFORMS") != "cpu" and gpu_mebibytes() is not None

    def command(name: str, text: str) -> Any:
        return commands.add_parser(name, help=text, description=text, parents=[common]).add_argument

    def sizes(add: Any, length: int) -> None:
        add("--rows", type=COUNT, default=16, metavar="N", help="sequences a batch (%(default)s)")
        add("--length", type=COUNT, default=length, metavar="N", help="tokens a sequence (%(default)s)")

    add = command("exactness", "loss and gradients of each way against the whole batch")
    sizes(add, 32)
    add("--vocab-size", type=COUNT, default=1024, metavar="N", help="(%(default)s)")
    add("--microbatches", type=COUNT, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="(%(default)s)")
    add("--dtypes", nargs="+", choices=studies.DTYPES, default=list(studies.DTYPES))

    add = command("stability", "variance over accumulation cycles and seeds")
    sizes(add, 32)
    add("--vocab-size", type=COUNT, default=1024, metavar="N", help="(%(default)s)")
    add("--microbatches", type=COUNT, default=8, metavar="N", help="(%(default)s)")
    add("--seeds", type=COUNT, default=5, metavar="N", help="models (%(default)s)")
    add("--cycles", type=COUNT, default=10, metavar="N", help="batches for each (%(default)s)")

    add = command("train", "the same training on real text in six ways")
    sizes(add, 64)
    options.add_corpus_options(commands.choices["train"])
    commands.choices["train"].set_defaults(vocab_size=4096, max_bytes=2_000_000)
    add("--microbatches", type=COUNT, default=8, metavar="N", help="(%(default)s)")
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

    args, rest = parser.parse_known_args(argv)
    args.rest, args.on_gpu = rest, on_gpu
    if args.rest and COMMANDS[args.command] is not measured:
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
    command = " ".join(["python", "examples/gradient_accumulation.py", *(sys.argv[1:] if argv is None else argv)])

    def run(args: argparse.Namespace) -> None:
        section = COMMANDS[args.command](args, command)
        name = section["environment"]["device"].lower().replace("nvidia", "").strip().replace(" ", "_")
        out: Path = args.out or Path(f"results/gradient_accumulation_{name}.json")
        results = read_json(out) if out.exists() else {}
        results[args.command.replace("-", "_")] = section
        write_json(out, results)
        accumulation_plot.plot(results, out.with_suffix(".png"))
        columns = {name.replace("_", " "): number(name) for name in COLUMNS[args.command].split()}
        print(f"{table_of(section['records'], columns)}\n\nwritten: {out}, and the plot beside it")

    run_program("gradient_accumulation", run, args, "nothing was written")


if __name__ == "__main__":
    main()
