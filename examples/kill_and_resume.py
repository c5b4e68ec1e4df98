"""Kills a run of train_sharded.py, continues it on fewer devices and on all again, and compares the losses.

    python examples/kill_and_resume.py --out results/resume_h200x4.json --count 4
    python examples/kill_and_resume.py --out runs/resume.json --count 4 --simulate --steps 12 -- --length 32

The run is killed by SIGKILL in the middle of a step. One copy of its folder continues on half of the devices and then
on all of them, another on all of them at once. What follows `--` goes to train_sharded.py.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from options import COUNT, parser_of
from reporting import table
from runs import CONFIG, Record, RunError, read_json, read_metrics, run_program, write_json
from sweeps import command_of

PROGRAM = Path(__file__).with_name("train_sharded.py")
# What this program passes to train_sharded.py, and its own option for it, if there is one.
PASSED = {
    "--steps": "--steps",
    "--mesh": "--count",
    "--devices": "--count and --simulate",
    "--out": "",
    "--stop-at": "",
}


@dataclass(frozen=True)
class Training:
    """A process that trains; `log` has its messages, since a pipe that nobody reads could fill up."""

    process: subprocess.Popen[str]
    log: Path

    def finish(self, code: int = 0) -> None:
        if self.process.wait() != code:
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RunError(f"train_sharded.py ended with code {self.process.returncode}, not {code}: {' '.join(last)}")

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        while self.process.poll() is None and not is_there():
            time.sleep(0.02)


def start(args: argparse.Namespace, cleanup: ExitStack, folder: Path, count: int, *more: str) -> Training:
    """Starts training in a folder on so many devices; `cleanup` ends it if it still runs."""
    given = ["--steps", args.steps, "--checkpoint-every", 2, "--no-progress", *args.rest, "--mesh", f"fsdp={count}"]
    given += ["--devices", count] if args.simulate else []
    # Two runs may share the devices.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not args.simulate:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(count)))
    command = [sys.executable, str(PROGRAM), "--out", str(folder), *map(str, given), *more]
    environment = {**os.environ, **variables}
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file, text=True)
    cleanup.callback(process.wait)
    cleanup.callback(process.kill)
    return Training(process, log)


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    return {step: record["loss"] for step, record in read_metrics(folder).get("train", {}).items()}


def measure(args: argparse.Namespace, folder: Path, cleanup: ExitStack) -> Record:
    """The losses of a run that nothing broke, and of the continued ones."""
    begin = partial(start, args, cleanup)
    whole, killed, again = (folder / name for name in ("whole", "killed", "again"))
    unbroken = begin(whole, args.count)
    # The text has been tokenized by then, and the next run finds the tokens.
    unbroken.wait_for((whole / CONFIG).exists)
    victim = begin(killed, args.count)
    victim.wait_for(lambda: args.kill_after in losses(killed))
    victim.process.send_signal(signal.SIGKILL)
    victim.finish(-signal.SIGKILL)
    seen = max(losses(killed))
    if seen >= args.steps - 1:
        raise RunError(f"the run was at step {seen} before it could be killed; raise --steps")
    shutil.copytree(killed, again)
    half, middle = args.count // 2, (seen + args.steps) // 2
    both = [
        begin(killed, half, "--resume", "--stop-at", str(middle)),
        begin(again, args.count, "--resume"),
    ]
    for each in (*both, unbroken):
        each.finish()
    begin(killed, args.count, "--resume").finish()
    runs = {
        "unbroken": whole,
        f"killed, on {half} up to {middle}, on {args.count}": killed,
        f"killed, on {args.count}": again,
    }
    curves = {name: [loss for _, loss in sorted(losses(each).items())] for name, each in runs.items()}
    first, *others = curves.values()
    apart = [max(abs(a - b) / abs(a) for a, b in zip(first, other, strict=True)) for other in others]
    about = read_json(killed / "summary.json")
    facts = {name: about[name] for name in ("device", "jax", "dtype", "batch_size", "length")}
    return {**facts, "devices": args.count, "killed_after": seen, "apart": apart, "losses": curves}


def text_of(result: Record) -> str:
    curves = result["losses"]
    rows = [
        ["step", *curves],
        *(
            [str(step + 1), *(f"{loss:.6f}" for loss in row)]
            for step, row in enumerate(zip(*curves.values(), strict=True))
        ),
    ]
    apart = " and ".join(f"{each:.1e}" for each in result["apart"])
    return (
        f"{table(rows)}\n\nKilled after step {result['killed_after']}. From the unbroken run the losses differ by at "
        f"most {apart} of the loss.\n{result['devices']} x {result['device']}, jax {result['jax']}, {result['dtype']}, "
        f"{result['batch_size']} x {result['length']} tokens a step\n{result['command']}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("kill_and_resume", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/resume.json"), help="losses; a table beside it (%(default)s)")
    add("--count", type=COUNT, default=4, metavar="N", help="devices, an even number (%(default)s)")
    add("--simulate", action="store_true", help="simulate the devices on this machine's CPU")
    add("--steps", type=COUNT, default=16, metavar="N", help="of the whole training (%(default)s)")
    add("--kill-after", type=COUNT, default=5, metavar="STEP", help="as soon as this step is done (%(default)s)")
    add("rest", nargs="*", metavar="-- OPTIONS", help="options of train_sharded.py, after --")
    args = parser.parse_args(argv)
    if args.count % 2:
        parser.error(f"--count {args.count} must be even: one run continues on half of the devices")
    if args.kill_after >= args.steps - 1:
        parser.error(f"--kill-after {args.kill_after} must be two steps or more before --steps {args.steps}")
    for name in (word.partition("=")[0] for word in args.rest):
        if name in PASSED:
            instead = f": pass {PASSED[name]} before --" if PASSED[name] else ""
            parser.error(f"{name} after -- is set by this program{instead}")
    command = command_of("kill_and_resume", argv)
    run_program("kill_and_resume", partial(run, command=command), args, "nothing was written")


def run(args: argparse.Namespace, command: str) -> None:
    # A folder that can't be made would be noticed too late.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as cleanup:
        result = {**measure(args, Path(folder), cleanup), "command": command}
    write_json(args.out, result)
    args.out.with_suffix(".txt").write_text(text_of(result) + "\n", encoding="utf-8")
    print(text_of(result))


if __name__ == "__main__":
    main()
