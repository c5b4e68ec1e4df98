"""Runs measuring programs, each in a process of its own, and keeps their records in one file.

Nothing here uses JAX's devices: JAX would take some of a GPU's memory for this process, too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from options import NUMBER, parser_of
from reporting import GIB, TITLES, Column, number
from runs import OUT_OF_MEMORY_EXIT, Record, read_json, write_json
from tqdm import tqdm

Plot = Callable[[Record, Path], None]


def run_child(
    name: str, program: str, arguments: Sequence[object], timeout: float, variables: Mapping[str, str] | None = None
) -> Record | None:
    """What a program of this folder writes to the file after the last of its arguments, as far as it came."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "records.json")
        command = [sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments), str(file)]
        # By default JAX would leave a quarter of a GPU's memory to other processes.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ, **(variables or {})}
        try:
            code = subprocess.run(command, env=environment, timeout=timeout, check=False).returncode
            how = f"ended with code {code}"
        except subprocess.TimeoutExpired:
            code, how = None, f"took longer than {timeout:.0f} s"
        if code not in (0, OUT_OF_MEMORY_EXIT):
            print(f"the process of {name} {how}; what it had measured is kept", file=sys.stderr)
        return read_json(file) if file.exists() else None


def run_children(
    children: Mapping[str, Callable[[str], Record | None]], command: str, keep: Callable[[Record], None], quiet: bool
) -> Record:
    """The records of all children together; `keep` gets those that there are after each child."""
    environment: Record = {}
    records: list[Record] = []
    for name, child in (bar := tqdm(children.items(), unit="process", disable=quiet)):
        bar.set_description(name)
        part = child(name)
        if part is not None:
            environment = environment or {**part["environment"], "command": command}
            records += [{**record, "bytes_limit": part["environment"]["bytes_limit"]} for record in part["records"]]
            keep({"environment": environment, "records": records})
    if not records:
        sys.exit("error: nothing was measured")
    return {"environment": environment, "records": records}


def memory_of(record: Record) -> float:
    """Bytes of a device at most in use; XLA's account if the device does not say (CPUs)."""
    return record["memory_bytes"]["total"] if record["peak_bytes"] is None else record["peak_bytes"]


def memory_title(records: Iterable[Record]) -> str:
    """What `memory_of` is, in all of the records."""
    return "peak" if all(each["out_of_memory"] or each["peak_bytes"] is not None for each in records) else "XLA"


# Columns of a table of steps.
HEAD: Mapping[str, Column] = {"head": lambda record: TITLES[record["head"]]}
SPEED: Mapping[str, Column] = {
    "ms a step": number("milliseconds", ".0f"),
    "tokens/s": number("tokens_per_second", ",.0f"),
    "model-flop utilisation": number("model_flop_utilisation", ".1%"),
}


def gigabytes(record: Record) -> str:
    """The cell of a record's memory."""
    return "out of memory" if record["out_of_memory"] else f"{memory_of(record) / GIB:.2f}"


def conditions(results: Record, sizes: str) -> str:
    """What the figures were measured with."""
    about, first = results["environment"], results["records"][0]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{first['config']} ({about['parameters']:,} parameters), {first['dtype']}, {sizes}\n{about['devices']} x "
        f"{about['device']}, Python {about['python']}, {versions}, XLA_FLAGS={about['xla_flags'] or '(none)'}\n"
        f"{about['command']}"
    )


def sweep_parser(name: str, doc: str | None, out: str, program: str, timeout: float) -> argparse.ArgumentParser:
    """The options of a sweep."""
    parser = parser_of(name, doc)
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help="results; table and plot beside (%(default)s)")
    add("--timeout", type=NUMBER, default=timeout, metavar="S", help="seconds of one process (%(default)s)")
    add("--overwrite", action="store_true", help="replace the results file, if there is one")
    add("--plot-only", action="store_true", help="measure nothing; make table and plot of --out again")
    add("--no-progress", action="store_true", help="draw no progress bar")
    add("rest", nargs="*", metavar="-- OPTIONS", help=f"options of {program}, after --")
    return parser


def sweep(
    name: str,
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    children: Mapping[str, Callable[[str], Record | None]],
    text_of: Callable[[Record], str],
    plot: Plot,
) -> None:
    """Measures, or reads what had been measured, and writes results, table and plot."""
    if args.plot_only:
        if not args.out.exists():
            sys.exit(f"{name}: error: there is no {args.out}")
        results = read_json(args.out)
    else:
        if args.out.exists() and not args.overwrite:
            sys.exit(f"{name}: error: {args.out} exists: --overwrite replaces it, --out names another file")
        command = " ".join(["python", f"examples/{name}.py", *(sys.argv[1:] if argv is None else argv)])
        results = run_children(children, command, lambda found: write_json(args.out, found), args.no_progress)
    text = text_of(results)
    args.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    plot(results, args.out.with_suffix(".png"))
    print(f"{text}\n\nwritten: {args.out}, and .txt and .png beside it")
