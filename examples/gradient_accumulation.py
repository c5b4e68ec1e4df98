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
from measure import CONFIGS
from options import COUNT, DTYPES, NUMBER
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


def measured(
    args: argparse.Namespace, command: str, runs: Sequence[Run], names: Sequence[str], more: Sequence[Any] = ()
) -> Record:
    """What measure.py finds in a process for each run, with the options of these names."""
    for name in ("config", "dtype", "parameters", "timed_steps", "timed_seconds", *names):
        value = getattr(args, name)
        more = [*more, f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    by_name = {f"{i}: {run.head}": run for i, run in enumerate(runs)}

    def child(name: str) -> Record | None:
        run = by_name[name]
        limit = [] if run.limit_gb is None else ["--limit", f"{run.limit_gb:g}"]
        arguments = [*more, "--head", run.head, "--lengths", *run.lengths, *limit, "--out"]
        return run_child(name, "measure.py", arguments, args.timeout, variables_for(run.limit_gb))

    return run_children(dict.fromkeys(by_name, child), command, args.no_progress)


def memory(args: argparse.Namespace, command: str) -> Record:
    runs = [Run(head, None, [args.length]) for head in HEADS]
    names = ("rows", "microbatches", "tokens", "vocab", "chunk_sizes")
    return measured(args, command, runs, names, ["--what", "loss", "step"])


def long_context(args: argparse.Namespace, command: str) -> Record:
    return measured(args, command, args.runs, ())


COMMANDS: dict[str, Callable[[argparse.Namespace, str], Record]] = {
    "exactness": exactness,
    "stability": stability,
    "train": train,
    "memory": memory,
    "long-context": long_context,
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

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    def small(parser: argparse.ArgumentParser, length: int, microbatches: Any) -> None:
        add = parser.add_argument
        add("--rows", type=COUNT, default=16, metavar="N", help="sequences a batch (%(default)s)")
        add("--length", type=COUNT, default=length, metavar="N", help="tokens a sequence (%(default)s)")
        nargs = "+" if isinstance(microbatches, list) else None
        add("--microbatches", type=COUNT, nargs=nargs, default=microbatches, metavar="N", help="(%(default)s)")

    def add_measuring(parser: argparse.ArgumentParser, config: str) -> None:
        add, dtype = parser.add_argument, "bfloat16" if on_gpu else "float32"
        add("--config", choices=list(CONFIGS), default=config if on_gpu else "tiny", help="(%(default)s)")
        add("--dtype", choices=DTYPES, default=dtype, help="of the arithmetic (%(default)s)")
        add("--parameters", choices=DTYPES, default=dtype, help="of parameters and AdamW's moments (%(default)s)")
        add("--timed-steps", type=COUNT, default=3, metavar="N", help="calls to time (%(default)s)")
        add("--timed-seconds", type=NUMBER, default=3.0, metavar="X", help="no more of them after this (%(default)s)")
        add("--timeout", type=NUMBER, default=300.0, metavar="S", help="seconds of one process (%(default)s)")

    exact = command("exactness", "loss and gradients of each way against the whole batch")
    small(exact, 32, [1, 2, 4, 8, 16])
    exact.add_argument("--vocab-size", type=COUNT, default=1024, metavar="N", help="(%(default)s)")
    exact.add_argument("--dtypes", nargs="+", choices=studies.DTYPES, default=list(studies.DTYPES))

    stable = command("stability", "variance over accumulation cycles and seeds")
    small(stable, 32, 8)
    stable.add_argument("--vocab-size", type=COUNT, default=1024, metavar="N", help="(%(default)s)")
    stable.add_argument("--seeds", type=COUNT, default=5, metavar="N", help="models (%(default)s)")
    stable.add_argument("--cycles", type=COUNT, default=10, metavar="N", help="batches for each (%(default)s)")

    training = command("train", "the same training on real text in six ways")
    small(training, 64, 8)
    options.add_corpus_options(training)
    training.set_defaults(vocab_size=4096, max_bytes=2_000_000)
    training.add_argument("--steps", type=COUNT, default=60, metavar="N", help="updates (%(default)s)")
    training.add_argument("--learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the highest (%(default)s)")

    losses = command("memory", "memory of the loss, and of whole steps with and without microbatches")
    add_measuring(losses, "small")
    small(losses, 1024 if on_gpu else 256, [1, 8])
    add = losses.add_argument
    add("--tokens", type=COUNT, default=8192 if on_gpu else 4096, metavar="N", help="of the loss alone (%(default)s)")
    add("--vocab", type=COUNT, default=50_000 if on_gpu else 8192, metavar="N", help="of the loss alone (%(default)s)")
    add("--chunk-sizes", type=COUNT, nargs="*", default=[1024 if on_gpu else 256], metavar="N", help="of jliger's loss")
    losses.set_defaults(rows=8, parameters="float32")

    runs = "jliger:1024,2048 full:1024,2048"
    if on_gpu:
        runs = "jliger@24:16384,32768,65536 jliger@80:131072 full:16384,32768,65536,131072"
    text = "whole steps on one long sequence, each head and memory limit in a process of its own"
    long = command("long-context", text)
    default = [parse_run(run) for run in runs.split()]
    long.add_argument("--runs", type=parse_run, nargs="+", default=default, metavar="HEAD[@GB]:LENGTHS")
    add_measuring(long, "llama3.2-1b")

    args = parser.parse_args(argv)
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
