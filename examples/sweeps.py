"""Runs measuring programs, each in a process of its own, and keeps their records in one file.

Nothing here uses JAX's devices: JAX would take some of a GPU's memory for this process, too.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from options import NUMBER, parser_of
from reporting import COLORS, GIB, TITLES, Column, number, plot, table_of
from runs import OUT_OF_MEMORY_EXIT, Record, RunError, read_json, run_program, write_json
from tqdm import tqdm

Child = Callable[[str], Record | None]
# Ends a program's message after Ctrl-C.
KEPT = "what had been measured is kept"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a child ran; `part` is what the child had measured."""

    def __init__(self, part: Record | None) -> None:
        super().__init__()
        self.part = part


def run_child(
    name: str, program: str, arguments: Sequence[object], timeout: float, variables: Mapping[str, str] | None = None
) -> Record | None:
    """What a program of this folder writes to the file after the last of its arguments, as far as it came.

    Raises:
      Interrupted: after Ctrl-C, with the same; `parts_of` hands it on.
    """
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
        except KeyboardInterrupt as error:
            raise Interrupted(read_json(file) if file.exists() else None) from error
        if code not in (0, OUT_OF_MEMORY_EXIT):
            print(f"the process of {name} {how}; {KEPT}", file=sys.stderr)
        return read_json(file) if file.exists() else None


def parts_of(children: Iterable[Callable[[], Record | None]]) -> Iterator[Record]:
    """What each child measured. After Ctrl-C, what the child had measured until then is still handed on."""
    for child in children:
        try:
            part, interruption = child(), None
        except Interrupted as error:
            part, interruption = error.part, error
        if part is not None:
            yield part
        if interruption is not None:
            raise interruption


def read_results(path: Path, names: Collection[str], about: Collection[str] = ()) -> Record:
    """A results file that has `about`, and `names` in each of its records."""
    try:
        results = read_json(path)
        found = [set(about) - set(results), *(set(names) - set(record) for record in results["records"])]
    except FileNotFoundError:
        raise RunError(f"there is no results file {path}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no results file ({error!r})") from error
    if missing := set().union(*found):
        raise RunError(f"{path} is no results file of this program: it lacks {', '.join(sorted(missing))}")
    return results


def merged(paths: Sequence[Path], group: str, settings: Sequence[str]) -> Record:
    """The records of several results files, in one. Their steps must have been measured under the same conditions.

    Raises:
      RunError: the environments differ in more than the command, the records in one of `settings`, or two files have
        the same step of the same head.
    """
    parts = [read_results(path, (group, "head", *settings), ("environment",)) for path in paths]
    results: Record = {"environment": {**parts[0]["environment"]}, "records": []}
    seen: dict[tuple[object, str], Path] = {}
    first: Record = {}
    for path, part in zip(paths, parts, strict=True):
        for record in part["records"]:
            own = {**part["environment"], "command": "", **{name: record[name] for name in settings}}
            first = first or own
            if other := [name for name in first | own if first.get(name) != own.get(name)]:
                raise RunError(
                    f"{path} was not measured under the conditions of {paths[0]}: {', '.join(other)} differ. "
                    "Keep them apart"
                )
            key = (record[group], record["head"])
            if key in seen:
                raise RunError(f"{path} and {seen[key]} both have {key[1]} at {group} {key[0]}: leave one out")
            seen[key] = path
            results["records"].append(record)
    results["environment"]["command"] = "; ".join(part["environment"]["command"] for part in parts)
    return results


def run_children(children: Mapping[str, Child], command: str, quiet: bool, out: Path | None = None) -> Record:
    """The records of all children together; they are written to `out` after each child."""
    results: Record = {"environment": {}, "records": []}

    def calls() -> Iterator[Callable[[], Record | None]]:
        for name, child in (bar := tqdm(children.items(), unit="process", disable=quiet)):
            bar.set_description(name)
            yield partial(child, name)

    for part in parts_of(calls()):
        limit = part["environment"]["bytes_limit"]
        results["environment"] = {**part["environment"], "command": command}
        results["records"] += [{**record, "bytes_limit": limit} for record in part["records"]]
        if out is not None:
            write_json(out, results)
    if not results["records"]:
        raise RunError("nothing was measured")
    return results


def memory_of(record: Record) -> float:
    """Bytes of a device at most in use; XLA's account if the device does not say (CPUs)."""
    return record["memory_bytes"]["total"] if record["peak_bytes"] is None else record["peak_bytes"]


def saving(records: Sequence[Record], group: str, record: Record) -> str:
    """How much less memory jliger needs than full logits in the same group."""
    full = [each for each in records if each["head"] == "full" and each[group] == record[group]]
    if record["head"] == "full" or any(each["out_of_memory"] for each in (record, *full)) or not full:
        return "-"
    return f"{1 - memory_of(record) / memory_of(full[0]):.1%}"


def text_of(results: Record, group: str, settings: Sequence[str]) -> str:
    """Every record, a line each, and what the figures were measured with."""
    about, first = results["environment"], results["records"][0]
    # Some programs do not say how many operations their model needs.
    utilised = any(record.get("model_flop_utilisation") is not None for record in results["records"])
    columns: dict[str, Column] = {
        group: number(group, ""),
        **({"sequences": number("sequences", "")} if "sequences" in first else {}),
        "head": lambda record: TITLES[record["head"]],
        "ms a step": number("milliseconds", ".0f"),
        "tokens/s": number("tokens_per_second", ",.0f"),
        **({"model-flop utilisation": number("model_flop_utilisation", ".1%")} if utilised else {}),
        "XLA temporary GiB": number("memory_bytes/temporary", ".2f", GIB),
        "GiB": lambda record: "out of memory" if record["out_of_memory"] else f"{memory_of(record) / GIB:.2f}",
        "saved": partial(saving, results["records"], group),
    }
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    sizes = ", ".join(f"{name} {first[name]}" for name in settings if name != "config")
    return (
        f"{table_of(results['records'], columns)}\n\n{first['config']} ({about['parameters']:,} parameters), {sizes}\n"
        f"{about['devices']} x {about['device']}, Python {about['python']}, {versions}, "
        f"XLA_FLAGS={about['xla_flags'] or '(none)'}\n" + about["command"].replace("; ", "\n")
    )


def bars(records: Sequence[Record], group: str, is_memory: bool, axes: Axes) -> None:
    groups, width = list(dict.fromkeys(record[group] for record in records)), 0.4
    for place, head in enumerate(("jliger", "full")):
        own = [record for record in records if record["head"] == head]
        fitting = [record for record in own if not record["out_of_memory"]]
        at = {id(record): groups.index(record[group]) + (place - 0.5) * width for record in own}
        amounts = [memory_of(record) / GIB if is_memory else record["tokens_per_second"] for record in fitting]
        drawn = axes.bar([at[id(each)] for each in fitting], amounts, width, color=COLORS[head], label=TITLES[head])
        axes.bar_label(drawn, fmt="{:.1f}" if is_memory else "{:,.0f}", fontsize="small")
        for record in own:
            if record["out_of_memory"]:
                axes.text(at[id(record)], 0, "out of memory", rotation=90, ha="center", color=COLORS[head])
    sequences = {record[group]: f"\n{record['sequences']} sequences" for record in records if "sequences" in record}
    names = [f"{each}".upper().replace(", ", "\n") + sequences.get(each, "") for each in groups]
    axes.set_xticks(range(len(groups)), names)
    is_peak = all(record["out_of_memory"] or record["peak_bytes"] is not None for record in records)
    name = f"{'peak' if is_peak else 'XLA'} memory, GiB a device" if is_memory else "tokens per second"
    axes.set(xlabel=group, ylabel=name, ylim=(0, 1.25 * axes.get_ylim()[1]))
    axes.legend(loc="upper right", ncols=2)


def sweep_parser(name: str, doc: str | None, program: str, out: str, timeout: float) -> argparse.ArgumentParser:
    parser = parser_of(name, doc)
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help="results; table and plot beside (%(default)s)")
    add("--timeout", type=NUMBER, default=timeout, metavar="S", help="seconds of one process (%(default)s)")
    add("--overwrite", action="store_true", help="replace the results file, if there is one")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--plot-only", action="store_true", help="measure nothing; make table and plot of --out again")
    either("--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing; put these files' records into --out")
    add("--no-progress", action="store_true", help="draw no progress bar")
    add("rest", nargs="*", metavar="-- OPTIONS", help=f"options of {program}, after --")
    return parser


def command_of(name: str, argv: Sequence[str] | None) -> str:
    """The command that a results file names. Of absolute paths the last part stays: the folder is a machine's own."""
    words = sys.argv[1:] if argv is None else argv
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", f"examples/{name}.py", *words])


def sweep(
    name: str,
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    children: Mapping[str, Child],
    group: str,
    settings: Sequence[str],
) -> None:
    """Measures, or reads what had been measured, and writes results, table and plot; `group` is a record's key."""
    command = command_of(name, argv)
    run_program(
        name, partial(run_sweep, children=children, group=group, settings=settings, command=command), args, KEPT
    )


def run_sweep(
    args: argparse.Namespace, children: Mapping[str, Child], group: str, settings: Sequence[str], command: str
) -> None:
    settings = ("config", *settings)
    if args.plot_only:
        results = read_results(args.out, (group, "head", *settings), ("environment",))
    else:
        if args.out.exists() and not args.overwrite:
            raise RunError(f"{args.out} exists: --overwrite replaces it, --out names another file")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.merge:
            results = merged(args.merge, group, settings)
            write_json(args.out, results)
        else:
            results = run_children(children, command, args.no_progress, args.out)
    text = text_of(results, group, settings)
    args.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    records = sorted(results["records"], key=lambda record: record.get("batch", 0))
    panels = [partial(bars, records, group, is_memory) for is_memory in (False, True)]
    # Numbers and names of neighbouring groups would overlap otherwise.
    width = max(5.0, 1.4 * len({record[group] for record in records}))
    title = f"{records[0]['config']} on {results['environment']['device']}"
    plot(panels, args.out.with_suffix(".png"), width, title)
    print(f"{text}\n\nwritten: {args.out}, and .txt and .png beside it")
