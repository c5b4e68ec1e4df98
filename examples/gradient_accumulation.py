"""Studies of gradient accumulation: exactness, stability, training on real text, memory, and long context.

    python examples/gradient_accumulation.py exactness     # all ways of accumulating against the whole batch
    python examples/gradient_accumulation.py stability     # variance over accumulation cycles and seeds
    python examples/gradient_accumulation.py train         # the same training in six ways
    python examples/gradient_accumulation.py memory        # of the loss, and of whole steps
    python examples/gradient_accumulation.py long-context  # whole steps on one long sequence, within memory limits

Each writes its part of one results file, named after the device, and draws the plot beside it anew. On a CPU sizes are
small. docs/accumulation_study.md says what was found.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import accumulation_plot
import accumulation_studies as studies
import decoder
from accumulation_losses import HEADS
from corpus import CorpusError, load_corpus
from language_model import DTYPES
from reporting import Record, table, write_json
from runs import interruptible, positive

from jliger.bench.report import environment

GIB = 2**30


class Run(NamedTuple):
    """One process of `long-context`: a head, what memory is limited to, and the lengths to measure."""

    head: str
    limit_gb: float | None
    lengths: list[int]


def parse_run(text: str) -> Run:
    """An argparse type: `jliger@24:16384,65536` or `full:16384`."""
    name, _, lengths = text.partition(":")
    head, _, limit = name.partition("@")
    try:
        found = Run(head, float(limit) if limit else None, [int(length) for length in lengths.split(",")])
    except ValueError:
        found = None
    if found is None or head not in HEADS or min(found.lengths) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write HEAD:LENGTHS or HEAD@GB:LENGTHS, as in jliger@24:16384,65536"
        )
    return found


# ---- processes of their own ------------------------------------------------------------------------------------


def has_gpu() -> bool:
    """Without JAX, which would take the GPU's memory from the processes to come."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and _gpu_mebibytes() is not None


def _gpu_mebibytes() -> float | None:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return float(output.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def variables_for(limit_gb: float | None) -> dict[str, str]:
    """The environment of a process whose GPU memory is limited."""
    variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    if limit_gb is not None:
        mebibytes = _gpu_mebibytes()
        if mebibytes is None:
            sys.exit("gradient_accumulation: error: a memory limit is for GPUs, and nvidia-smi finds none")
        variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{limit_gb * 1e9 / (mebibytes * 2**20):.5f}"
    return variables


def measured(options: Sequence[str], limit_gb: float | None, timeout: float) -> Record | None:
    """What accumulation_memory.py found in a process of its own, as far as it came."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "records.json")
        program = Path(__file__).with_name("accumulation_memory.py")
        command = [sys.executable, str(program), "--out", str(file), *options]
        command += [] if limit_gb is None else ["--limit", f"{limit_gb:g}"]
        try:
            ended = subprocess.run(command, env=variables_for(limit_gb), timeout=timeout, check=False).returncode
            how = f"ended with code {ended}"
        except subprocess.TimeoutExpired:
            ended, how = None, f"took longer than {timeout:.0f} s"
        if ended != 0:
            print(f"gradient_accumulation: {' '.join(options)} {how}; what it had measured is kept", file=sys.stderr)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def sections_of(parts: Sequence[Record | None], command: str) -> Record:
    """The records of several processes as one section."""
    found = [part for part in parts if part is not None]
    if not found:
        sys.exit("gradient_accumulation: error: nothing was measured")
    records = [
        {**record, "bytes_limit": part["environment"]["bytes_limit"]} for part in found for record in part["records"]
    ]
    about = {name: value for name, value in found[0]["environment"].items() if name != "bytes_limit"}
    return {"environment": {**about, "command": command}, "records": records}


# ---- commands: each returns its section of the results file ------------------------------------------------------


def in_process(records: list[Record], command: str, **settings: Any) -> Record:
    """A section that was found in this process."""
    return {"environment": {**environment(), "command": command}, "settings": settings, "records": records}


def exactness(args: argparse.Namespace, command: str) -> Record:
    sizes = small_sizes(args)
    records = studies.exactness(sizes, args.dtypes, args.microbatches, not args.no_progress)
    return in_process(records, command, rows=sizes.rows, length=sizes.length, vocab_size=sizes.config.vocab_size)


def stability(args: argparse.Namespace, command: str) -> Record:
    sizes = small_sizes(args)
    records = studies.stability(sizes, args.microbatches, args.seeds, args.cycles, not args.no_progress)
    settings = {"rows": sizes.rows, "length": sizes.length, "vocab_size": sizes.config.vocab_size}
    return in_process(
        records, command, **settings, microbatches=args.microbatches, seeds=args.seeds, cycles=args.cycles
    )


def small_sizes(args: argparse.Namespace) -> studies.Sizes:
    """Of the model that loss and gradients are compared on."""
    config = replace(decoder.CONFIGS["tiny"], vocab_size=args.vocab_size, hidden_size=32, mlp_size=96)
    return studies.Sizes(config, args.rows, args.length)


def train(args: argparse.Namespace, command: str) -> Record:
    corpus = load_corpus(
        args.corpus,
        vocab_size=args.vocab_size,
        max_bytes=args.max_bytes,
        heldout_fraction=0.05,
        cache_dir=args.cache_dir,
    )
    sizes = studies.Sizes(decoder.CONFIGS["tiny"], args.rows, args.length)
    records = studies.train(corpus, sizes, args.microbatches, args.steps, args.learning_rate, not args.no_progress)
    settings = {"rows": args.rows, "length": args.length, "microbatches": args.microbatches, "steps": args.steps}
    return in_process(records, command, **settings, vocab_size=corpus.vocab_size, documents=corpus.documents)


def memory(args: argparse.Namespace, command: str) -> Record:
    options = ["--what", "loss", "step", "--config", args.config, "--dtype", args.dtype, "--rows", str(args.rows)]
    options += ["--lengths", str(args.length), "--microbatches", *map(str, args.microbatches)]
    options += ["--tokens", str(args.tokens), "--vocab", str(args.vocab), "--chunk-sizes", *map(str, args.chunk_sizes)]
    return sections_of([measured([*options, "--head", head], None, args.timeout) for head in HEADS], command)


def long_context(args: argparse.Namespace, command: str) -> Record:
    options = ["--config", args.config, "--dtype", args.dtype, "--parameters", args.parameters]
    options += ["--timed-steps", str(args.timed_steps), "--timed-seconds", str(args.timed_seconds)]
    parts = [
        measured([*options, "--head", run.head, "--lengths", *map(str, run.lengths)], run.limit_gb, args.timeout)
        for run in args.runs
    ]
    return sections_of(parts, command)


COMMANDS: dict[str, Callable[[argparse.Namespace, str], Record]] = {
    "exactness": exactness,
    "stability": stability,
    "train": train,
    "memory": memory,
    "long-context": long_context,
}


# ---- what is printed ---------------------------------------------------------------------------------------------


def table_of(name: str, section: Record) -> str:
    """A section's records, a line each."""
    return table({"exactness": _exactness, "stability": _stability, "train": _train}.get(name, _memory)(section))


def _exactness(section: Record) -> list[list[str]]:
    rows = [["dtype", "tokens", "microbatches", *(f"{way}: {what}" for way in WAYS for what in ("loss", "gradient"))]]
    for record in section["records"]:
        found = [record.get(way) for way in WAYS]
        figures = [f"{each[what]:.1e}" if each else "-" for each in found for what in ("loss", "gradient")]
        rows.append([record["dtype"], record["tokens"], str(record["microbatches"]), *figures])
    return rows


WAYS = ("full", "jliger", "means")


def _stability(section: Record) -> list[list[str]]:
    names = (
        "loss_mean",
        "loss_variance",
        "gradient_variance",
        "largest_loss_difference",
        "largest_gradient_difference",
    )
    rows = [["seed", "way", *(name.replace("_", " ") for name in names), "repeat difference"]]
    for record in section["records"]:
        figures = [f"{record[name]:.6g}" for name in names[:3]] + [f"{record[name]:.1e}" for name in names[3:]]
        rows.append([str(record["seed"]), record["way"], *figures, f"{record['repeat_difference']:.1e}"])
    return rows


def _train(section: Record) -> list[list[str]]:
    rows = [["way", "last loss", "held-out loss", "largest difference", "ms a step", "temporary MiB"]]
    first = section["records"][0]
    for record in section["records"]:
        pairs = zip(record["losses"], first["losses"], strict=True)
        apart = max(abs(one - other) / other for one, other in pairs)
        memory = record["memory_bytes"]["temporary"] / 2**20
        figures = [f"{record['losses'][-1]:.6f}", f"{record['heldout_loss']:.6f}", f"{apart:.1e}"]
        rows.append([record["way"], *figures, f"{record['milliseconds']:.0f}", f"{memory:.1f}"])
    return rows


def _memory(section: Record) -> list[list[str]]:
    rows = [["what", "head", "limit GB", "tokens", "ms", "tokens/s", "XLA: temporary GiB", "all GiB", "peak GiB"]]
    for record in section["records"]:
        tokens = record["tokens"] if record["what"] == "loss" else record["rows"] * record["length"]
        what = [record["what"], record["dtype"]]
        what += [f"chunks of {record['chunk_size']}"] if record.get("chunk_size") else []
        what += [f"{record['microbatches']} microbatches"] if record.get("microbatches", 1) > 1 else []
        limit = "-" if record["limit_gb"] is None else f"{record['limit_gb']:g}"
        row = [", ".join(what), record["head"], limit, f"{tokens:,}"]
        if record["out_of_memory"]:
            rows.append([*row, "out of memory", *["-"] * 4])
            continue
        speed = f"{1e3 * tokens / record['milliseconds']:,.0f}"
        amounts = [record["memory_bytes"]["temporary"], record["memory_bytes"]["total"], record["peak_bytes"]]
        figures = ["-" if amount is None else f"{amount / GIB:.3f}" for amount in amounts]
        rows.append([*row, f"{record['milliseconds']:.1f}", speed, *figures])
    return rows


# ---- the command line --------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; what isn't given depends on whether there is a GPU."""
    parser = argparse.ArgumentParser(prog="gradient_accumulation", description=(__doc__ or "").partition("\n")[0])
    count, number = positive(int), positive(float)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, metavar="FILE", help="results (results/gradient_accumulation_DEVICE.json)")
    common.add_argument("--no-progress", action="store_true", help="draw no progress bars")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> Any:
        return commands.add_parser(name, help=text, description=text, parents=[common]).add_argument

    def sizes(add: Any, vocab: int, rows: int, length: int) -> None:
        add("--vocab-size", type=count, default=vocab, metavar="N", help="(%(default)s)")
        add("--rows", type=count, default=rows, metavar="N", help="sequences a batch (%(default)s)")
        add("--length", type=count, default=length, metavar="N", help="tokens a sequence (%(default)s)")

    add = command("exactness", "loss and gradients of each way against the whole batch")
    sizes(add, 1024, 16, 32)
    add("--dtypes", nargs="+", choices=list(studies.DTYPES), default=list(studies.DTYPES))
    add("--microbatches", type=count, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")

    add = command("stability", "variance over accumulation cycles and seeds")
    sizes(add, 1024, 16, 32)
    add("--microbatches", type=count, default=8, metavar="N", help="(%(default)s)")
    add("--seeds", type=count, default=5, metavar="N", help="models (%(default)s)")
    add("--cycles", type=count, default=10, metavar="N", help="batches for each, at least 2 (%(default)s)")

    add = command("train", "the same training on real text in six ways")
    sizes(add, 4096, 16, 64)
    add("--microbatches", type=count, default=8, metavar="N", help="(%(default)s)")
    add("--steps", type=count, default=60, metavar="N", help="updates (%(default)s)")
    add("--learning-rate", type=number, default=3e-3, metavar="X", help="the highest, after warmup (%(default)s)")
    add("--corpus", type=Path, nargs="+", metavar="PATH", help="files and folders of text (default: Python's library)")
    add("--max-bytes", type=count, default=2_000_000, metavar="N", help="read this much text at most (%(default)s)")
    add("--cache-dir", type=Path, default=Path("runs/cache"), help="keeps tokenizers and tokens (%(default)s)")

    on_gpu = has_gpu()
    add = command("memory", "memory of the loss, and of whole steps with and without microbatches")
    add("--config", choices=list(decoder.CONFIGS), default="small" if on_gpu else "tiny", help="(%(default)s)")
    add("--dtype", choices=list(DTYPES), default="bfloat16" if on_gpu else "float32", help="(%(default)s)")
    add("--rows", type=count, default=8, metavar="N", help="sequences a step (%(default)s)")
    add("--length", type=count, default=1024 if on_gpu else 256, metavar="N", help="tokens a sequence (%(default)s)")
    add("--microbatches", type=count, nargs="+", default=[1, 8], metavar="N", help="of a step")
    add("--tokens", type=count, default=8192 if on_gpu else 4096, metavar="N", help="of the loss alone (%(default)s)")
    add("--vocab", type=count, default=50_000 if on_gpu else 8192, metavar="N", help="of the loss alone (%(default)s)")
    add("--chunk-sizes", type=count, nargs="*", default=[1024 if on_gpu else 256], metavar="N", help="of jliger's loss")
    add("--timeout", type=number, default=300.0, metavar="S", help="of one head's process (%(default)s)")

    runs = (
        "jliger@24:16384,32768,65536 jliger@80:131072 full:16384,32768,65536,131072"
        if on_gpu
        else "jliger:1024,2048 full:1024,2048"
    )
    add = command(
        "long-context", "whole steps on one long sequence, each head and memory limit in a process of its own"
    )
    add(
        "--runs",
        type=parse_run,
        nargs="+",
        default=[parse_run(run) for run in runs.split()],
        metavar="HEAD[@GB]:LENGTHS",
    )
    add("--config", choices=list(decoder.CONFIGS), default="llama3.2-1b" if on_gpu else "tiny", help="(%(default)s)")
    add("--dtype", choices=list(DTYPES), default="bfloat16" if on_gpu else "float32", help="(%(default)s)")
    add(
        "--parameters",
        choices=list(DTYPES),
        default="bfloat16" if on_gpu else "float32",
        help="of parameters and AdamW's moments (%(default)s)",
    )
    add("--timed-steps", type=count, default=3, metavar="N", help="steps to time (%(default)s)")
    add("--timed-seconds", type=number, default=3.0, metavar="X", help="but no more of them after this (%(default)s)")
    add("--timeout", type=number, default=300.0, metavar="S", help="of one process (%(default)s)")

    args = parser.parse_args(argv)
    if args.command == "stability" and args.cycles < 2:
        parser.error(f"--cycles {args.cycles}: a variance needs 2 or more")
    for microbatches in (
        [args.microbatches]
        if isinstance(getattr(args, "microbatches", None), int)
        else getattr(args, "microbatches", [])
    ):
        if args.rows % microbatches:
            parser.error(f"--microbatches {microbatches} doesn't divide --rows {args.rows}")
    return args


@interruptible("gradient_accumulation")
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse_args(argv)
    given = sys.argv[1:] if argv is None else list(argv)
    command = " ".join(["python", "examples/gradient_accumulation.py", *given])
    try:
        section = COMMANDS[args.command](args, command)
    except CorpusError as error:
        sys.exit(f"gradient_accumulation: error: {error}")
    name = section["environment"]["device"].lower().replace("nvidia", "").strip().replace(" ", "_")
    out: Path = args.out or Path(f"results/gradient_accumulation_{name}.json")
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    found[args.command.replace("-", "_")] = section
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    accumulation_plot.plot(found, out.with_suffix(".png"))
    print(f"{table_of(args.command, section)}\n\nwritten: {out}, and the plot beside it")


if __name__ == "__main__":
    main()
