"""Measures steps of ORPO and of GRPO with either head, each in a process of its own, into one file, a table and a plot.

    python examples/sweep_post_training.py --out results/preference_grpo_h200.json -- --config llama3.2-1b

What follows `--` goes to measure_post_training.py. While one process measures, the next one imports and lowers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from matplotlib.figure import Figure
from reporting import COLORS, TITLES, Record, save_figure, table, write_json
from runs import interruptible, positive
from tqdm import tqdm

# Those of measure_post_training.py, which is not imported: JAX would take some of a GPU's memory for this process, too.
LOSSES, HEADS = ("orpo", "dpo", "grpo"), ("jliger", "full")
OUT_OF_MEMORY_EXIT = 3
GIB = 2**30


def measured(args: argparse.Namespace) -> Iterator[Record]:
    """What the process of each loss and head writes, as far as it comes to that."""
    program = Path(__file__).with_name("measure_post_training.py")
    # JAX would take most of a GPU's memory beforehand, and there are two such processes at a time.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    pairs = [(loss, head) for loss in args.losses for head in args.heads]
    with (
        tempfile.TemporaryDirectory() as folder,
        ExitStack() as stack,
        tqdm(total=len(pairs), unit="step measured", disable=args.no_progress) as bar,
    ):

        def start(pair: tuple[str, str]) -> tuple[str, subprocess.Popen[bytes], Path]:
            loss, head = pair
            file = Path(folder, f"{loss}_{head}.json")
            command = [sys.executable, str(program), *args.rest]
            command += ["--loss", loss, "--head", head, "--out", str(file), "--wait"]
            process = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE)
            # Without effect on one that has ended.
            stack.callback(process.kill)
            return f"{loss}, {head}", process, file

        starts = map(start, pairs)
        following = next(starts)
        while following is not None:
            (name, process, file), following = following, next(starts, None)
            bar.set_description(name)
            try:
                # The line that it waits for.
                process.communicate(b"\n", timeout=args.timeout)
                how = f"ended with code {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                how = f"took longer than {args.timeout:.0f} s"
            if process.returncode not in (0, OUT_OF_MEMORY_EXIT):
                print(f"sweep_post_training: the process of {name} {how}", file=sys.stderr)
            if file.exists():
                yield json.loads(file.read_text(encoding="utf-8"))
            bar.update()


def memory_of(record: Record) -> int:
    """Bytes of the device at most in use; where it doesn't say (CPUs), XLA's account."""
    return record["memory_bytes"]["total"] if record["peak_bytes"] is None else record["peak_bytes"]


def saving(records: Sequence[Record], record: Record) -> float | None:
    """Which share of the memory with full logits jliger does without, in the same loss; None for full logits."""
    full = [each for each in records if (each["loss"], each["head"]) == (record["loss"], "full")]
    if record["head"] == "full" or any(each["out_of_memory"] for each in (record, *full)) or not full:
        return None
    return 1 - memory_of(record) / memory_of(full[0])


def summary_table(records: Sequence[Record]) -> str:
    """Every record, a line each."""
    heading = [
        "loss",
        "head",
        "ms a step",
        "tokens/s",
        "model-flop utilisation",
        "XLA temporary GiB",
        "peak GiB",
        "saved",
    ]
    rows = [heading]
    for record in records:
        name = [record["loss"], TITLES[record["head"]]]
        if record["out_of_memory"]:
            rows.append([*name, "-", "-", "-", "-", "out of memory", "-"])
            continue
        utilisation, share = record["model_flop_utilisation"], saving(records, record)
        rows.append(
            [
                *name,
                f"{record['milliseconds']:.0f}",
                f"{record['tokens_per_second']:,.0f}",
                "-" if utilisation is None else f"{100 * utilisation:.1f} %",
                f"{record['memory_bytes']['temporary'] / GIB:.2f}",
                f"{memory_of(record) / GIB:.2f}",
                "-" if share is None else f"{100 * share:.1f} %",
            ]
        )
    return table(rows)


def conditions(found: Record) -> str:
    """What the figures were measured with."""
    about, first = found["environment"], found["records"][0]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{first['config']} ({about['parameters']:,} parameters, {first['parameters']}), {first['dtype']}, "
        f"{first['sequences']} sequences of {first['length']} tokens a step, {first['prompt_length']} of them prompt\n"
        f"{about['device']}, Python {about['python']}, {versions}, XLA_FLAGS={about['xla_flags'] or '(none)'}\n"
        f"{about['command']}"
    )


def plot(found: Record, path: Path) -> None:
    """Writes tokens a second and memory, a group of bars a loss."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    records, width = found["records"], 0.4
    losses = list(dict.fromkeys(record["loss"] for record in records))
    for place, head in enumerate(HEADS):
        fitting = [record for record in records if record["head"] == head and not record["out_of_memory"]]
        at = [losses.index(record["loss"]) + (place - 0.5) * width for record in fitting]
        for axes, amounts, form in (
            (speed, [record["tokens_per_second"] for record in fitting], "{:,.0f}"),
            (memory, [memory_of(record) / GIB for record in fitting], "{:.1f}"),
        ):
            axes.bar_label(axes.bar(at, amounts, width, color=COLORS[head], label=TITLES[head]), fmt=form)
    is_peak = all(record["out_of_memory"] or record["peak_bytes"] is not None for record in records)
    for axes, name in ((speed, "tokens per second"), (memory, f"{'peak' if is_peak else 'XLA'} memory, GiB")):
        axes.set_xticks(range(len(losses)), [loss.upper() for loss in losses])
        axes.set(ylabel=name, ylim=(0, 1.25 * axes.get_ylim()[1]))
        axes.legend(loc="upper right", ncols=2)
    first = records[0]
    figure.suptitle(
        f"{first['config']} on {found['environment']['device']}, {first['sequences']} sequences of {first['length']} "
        f"tokens, {first['dtype']}"
    )
    save_figure(figure, path)


@interruptible("sweep_post_training")
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="sweep_post_training", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    default = Path("results/preference_grpo.json")
    add("--out", type=Path, default=default, help="results; table and plot beside (%(default)s)")
    add("--losses", choices=LOSSES, nargs="+", default=["orpo", "grpo"], help="what to measure (default: orpo grpo)")
    add("--heads", choices=HEADS, nargs="+", default=list(HEADS), help="with which heads (default: both)")
    add("--timeout", type=positive(float), default=300.0, metavar="S", help="of one measurement (%(default)s)")
    add("--overwrite", action="store_true", help="replace the results file, if there is one")
    add("--plot-only", action="store_true", help="measure nothing; make table and plot of --out again")
    add("--no-progress", action="store_true", help="draw no progress bar")
    add("rest", nargs="*", metavar="-- OPTIONS", help="options of measure_post_training.py, after --")
    args = parser.parse_args(argv)
    if args.plot_only:
        if not args.out.exists():
            sys.exit(f"sweep_post_training: error: there is no {args.out}")
        found = json.loads(args.out.read_text(encoding="utf-8"))
    else:
        if args.out.exists() and not args.overwrite:
            sys.exit(
                f"sweep_post_training: error: {args.out} exists: --overwrite replaces it, --out names another file"
            )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", "examples/sweep_post_training.py", *(sys.argv[1:] if argv is None else argv)])
        found: Record = {"records": []}
        for part in measured(args):
            found = {
                "environment": {**part["environment"], "command": command},
                "records": [*found["records"], *part["records"]],
            }
            # As soon as it is known: a later process may take all the time there is.
            write_json(args.out, found)
        if not found["records"]:
            sys.exit("sweep_post_training: error: nothing was measured")
    text = f"{summary_table(found['records'])}\n\n{conditions(found)}"
    args.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    plot(found, args.out.with_suffix(".png"))
    print(f"{text}\n\nwritten: {args.out}, and .txt and .png beside it")


if __name__ == "__main__":
    main()
