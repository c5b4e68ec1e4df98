"""Runs train_sharded.py --benchmark for both heads and keeps their records in one file, with a table and a plot.

    python examples/sweep_sharded.py --out results/train_sharded_h200x4.json -- --config llama3-8b --mesh fsdp=4

What follows `--` goes to train_sharded.py. Each head has a process of its own, whose batches ascend: a device's peak
memory can't be reset, but a larger batch's is larger.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from reporting import COLORS, TITLES, Record, table, write_json
from runs import interruptible, positive

HEADS = ("jliger", "full")
GIB = 2**30


def measured(head: str, args: argparse.Namespace) -> Record | None:
    """One head's records, as far as its process came."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "records.json")
        batches = args.batches if getattr(args, head) is None else getattr(args, head)
        program = Path(__file__).with_name("train_sharded.py")
        command = [sys.executable, str(program), *args.rest, "--head", head, "--benchmark", str(file)]
        command += ["--batch", *map(str, batches), *(["--largest"] if args.largest else [])]
        # JAX would leave a quarter of a GPU's memory to others.
        variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
        try:
            ended = subprocess.run(command, env=variables, timeout=args.timeout, check=False).returncode
            how = f"ended with code {ended}"
        except subprocess.TimeoutExpired:
            ended, how = None, f"took longer than {args.timeout:.0f} s"
        if ended not in (0, 3):
            print(f"sweep_sharded: the process of head {head} {how}; what it had measured is kept", file=sys.stderr)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def memory_of(record: Record) -> float:
    """GiB of a device at most in use; where devices don't say (CPUs), XLA's account."""
    peak = record["peak_bytes"]
    return (record["memory_bytes"]["total"] if peak is None else peak) / GIB


def summary_table(records: Sequence[Record]) -> str:
    """Every record, a line each."""
    rows = [["head", "batch", "ms a step", "tokens/s", "model-flop utilisation", "GiB a device"]]
    for record in records:
        name, batch = TITLES[record["head"]], str(record["batch"])
        if record["out_of_memory"]:
            rows.append([name, batch, "-", "-", "-", "out of memory"])
            continue
        utilisation = record["model_flop_utilisation"]
        share = "-" if utilisation is None else f"{100 * utilisation:.1f} %"
        speed = f"{record['tokens_per_second']:,.0f}"
        rows.append([name, batch, f"{record['milliseconds']:.0f}", speed, share, f"{memory_of(record):.2f}"])
    return table(rows)


def conditions(found: Record) -> str:
    """What the figures were measured with."""
    about, first = found["environment"], found["records"][0]
    mesh = ", ".join(f"{axis}={size}" for axis, size in first["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{first['config']} ({about['parameters']:,} parameters), length {first['length']}, {first['dtype']}, "
        f"{first['accumulate']} part(s) a batch, mesh {mesh}\n"
        f"{about['devices']} x {about['device']}, Python {about['python']}, {versions}, "
        f"XLA_FLAGS={about['xla_flags'] or '(none)'}\n{about['command']}"
    )


def plot(found: Record, path: Path) -> None:
    """Writes tokens a second and memory of a device against the batch."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    records, about = found["records"], found["environment"]
    for head in HEADS:
        fitting = sorted(
            (record for record in records if record["head"] == head and not record["out_of_memory"]),
            key=lambda record: record["batch"],
        )
        batches = [record["batch"] for record in fitting]
        style = {"marker": "o", "color": COLORS[head], "label": TITLES[head]}
        speed.plot(batches, [record["tokens_per_second"] for record in fitting], **style)
        memory.plot(batches, [memory_of(record) for record in fitting], **style)
        refused = [record["batch"] for record in records if record["head"] == head and record["out_of_memory"]]
        if refused and about["bytes_limit"]:
            height = about["bytes_limit"] / GIB
            label = f"{TITLES[head]}: out of memory"
            memory.plot(refused, [height] * len(refused), "x", color=COLORS[head], label=label)
    if about["bytes_limit"]:
        memory.axhline(about["bytes_limit"] / GIB, color="gray", linestyle=":", label="what JAX may use")
    first = records[0]
    figure.suptitle(
        f"{first['config']} on {about['devices']} × {about['device']}, length {first['length']}, {first['dtype']}"
    )
    is_peak = all(record["out_of_memory"] or record["peak_bytes"] is not None for record in records)
    for axes, name in ((speed, "tokens per second"), (memory, f"{'peak' if is_peak else 'XLA'} memory, GiB a device")):
        axes.set(xlabel="sequences per step", ylabel=name, ylim=(0, 1.1 * axes.get_ylim()[1]))
        axes.set_xscale("log", base=2)
        ticks = sorted({record["batch"] for record in records})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.legend(loc="lower right")
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(beside, dpi=120)
    beside.replace(path)


@interruptible("sweep_sharded")
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="sweep_sharded", description=(__doc__ or "").partition("\n")[0])
    count = positive(int)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("results/train_sharded.json"),
        help="results; table and plot beside (%(default)s)",
    )
    add("--batches", type=count, nargs="+", default=[64, 128], metavar="N", help="for both heads (default: 64 128)")
    for head in HEADS:
        add(f"--{head}", type=count, nargs="*", metavar="N", help=f"batches for {head} instead; none leaves it out")
    add("--largest", action="store_true", help="then the largest batch that fits, for each head")
    add("--timeout", type=positive(float), default=900.0, metavar="S", help="of one head's process (%(default)s)")
    add("--overwrite", action="store_true", help="replace the results file, if there is one")
    add("--plot-only", action="store_true", help="measure nothing; make table and plot of --out again")
    add("rest", nargs="*", metavar="-- OPTIONS", help="options of train_sharded.py, after --")
    args = parser.parse_args(argv)
    if args.plot_only:
        found = json.loads(args.out.read_text(encoding="utf-8"))
    else:
        if args.out.exists() and not args.overwrite:
            sys.exit(f"sweep_sharded: error: {args.out} exists: --overwrite replaces it, --out names another file")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        heads = [head for head in HEADS if getattr(args, head) != []]
        parts = [part for head in heads if (part := measured(head, args)) is not None]
        if not parts:
            sys.exit("sweep_sharded: error: nothing was measured")
        command = " ".join(["python", "examples/sweep_sharded.py", *(sys.argv[1:] if argv is None else argv)])
        records = [record for part in parts for record in part["records"]]
        found = {"environment": {**parts[0]["environment"], "command": command}, "records": records}
        write_json(args.out, found)
    text = f"{summary_table(found['records'])}\n\n{conditions(found)}"
    args.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    plot(found, args.out.with_suffix(".png"))
    print(f"{text}\n\nwritten: {args.out}, and .txt and .png beside it")


if __name__ == "__main__":
    main()
