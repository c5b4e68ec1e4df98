"""A run's folder: what is written to it, what is read from it, and how a program ends."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import sync_global_devices

Record = dict[str, Any]
Events = dict[str, dict[int, Record]]

# Files and folders of a run.
CONFIG, TOKENIZER, SUMMARY, PLOT = "config.json", "tokenizer.json", "summary.json", "plot.png"
METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
# Exit codes: 128 plus the number of SIGINT, and a device's memory that does not suffice.
INTERRUPTED_EXIT, OUT_OF_MEMORY_EXIT = 130, 3


class RunError(Exception):
    """The run cannot start or continue; the message says why and what to do."""


class DeviceMemoryError(RunError):
    """The step, or the state, does not fit into a device's memory."""


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to instead; the file then moves to `path`, so that nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    yield temporary
    temporary.replace(path)


def write_json(path: Path, content: Record) -> None:
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))


def write_metrics(folder: Path, event: str, step: int, **values: Any) -> None:
    """Appends a record to the folder's metrics file, a JSON object on a line of its own; only the first process does.

    Nothing is ever removed. A resumed run writes the steps after its checkpoint again; the later record counts.
    """
    if jax.process_index() == 0:
        path = folder / METRICS
        folder.mkdir(parents=True, exist_ok=True)
        # If a kill cut the last line off, this record starts a new one.
        is_cut = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
        with path.open("a", encoding="utf-8") as file:
            record = json.dumps({"event": event, "step": step, **values}, allow_nan=False)
            file.write(f"\n{record}\n" if is_cut else f"{record}\n")


def read_metrics(folder: Path) -> Events:
    """The records of a folder's metrics file by event and step, without a line that a kill cut off."""
    events: Events = {}
    path = folder / METRICS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            events.setdefault(record["event"], {})[record["step"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    return events


def read_heads(folder: Path) -> dict[str, Events]:
    """The records of each head that has been trained in a folder, by this call or an earlier one."""
    metrics = {name: read_metrics(folder / name) for name in ("full", "jliger")}
    return {name: events for name, events in metrics.items() if "compiled" in events}


def check_folder(out: Path, settings: Record, *, resume: bool | None, overwrite: bool) -> None:
    """Refuses a folder in which this run may not begin or continue; changes nothing.

    `resume` is None if the program has no such option.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file")
    is_run = (out / CONFIG).is_file()
    if resume:
        if not is_run:
            raise RunError(f"--resume: {out} holds no run (there is no {CONFIG} in it)")
        try:
            earlier = {key: read_json(out / CONFIG).get(key) for key in settings}
        except (ValueError, AttributeError) as error:
            raise RunError(f"{out / CONFIG} cannot be read ({error}); nothing was changed") from error
        own = json.loads(json.dumps(settings))  # as they are read back: tuples are lists
        changes = [f"{key} was {earlier[key]} and is {value}" for key, value in own.items() if earlier[key] != value]
        if changes:
            raise RunError(f"--resume: the run in {out} has other settings: {', '.join(changes)}. Nothing was changed")
    elif is_run and not overwrite:
        resuming = "" if resume is None else "--resume continues it, "
        raise RunError(f"{out} holds a run: {resuming}--overwrite removes it, --out names another folder")
    elif not is_run and out.exists() and any(out.iterdir()):
        raise RunError(f"{out} holds files that are no run of this program; --out names another folder")


def begin_folder(out: Path, settings: Record, contents: Sequence[str]) -> None:
    """Removes an earlier run's `contents` (and nothing else) and writes this run's configuration."""
    # The configuration is removed last: as long as it is there, the folder is known to hold a run.
    for path in [out / name for name in (*contents, CONFIG)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    write_json(out / CONFIG, settings)


def open_folder(args: argparse.Namespace, settings: Record, contents: Sequence[str], tokenizer: Any = None) -> None:
    """Checks the folder `--out` and, unless the run is resumed, begins it."""
    resume = getattr(args, "resume", None)
    check_folder(args.out, settings, resume=resume, overwrite=args.overwrite)
    # No process begins the folder before every process has checked it.
    sync_global_devices("folder checked")
    if not resume and jax.process_index() == 0:
        begin_folder(args.out, settings, (*contents, TOKENIZER, SUMMARY, PLOT))
        if tokenizer is not None:
            tokenizer.save(str(args.out / TOKENIZER))
    sync_global_devices("folder begun")
    device = jax.devices()[0]
    say(f"device: {device.platform} ({device.device_kind}), JAX {jax.__version__}")


def run_program(
    name: str, run: Callable[[Any], None], args: argparse.Namespace, if_interrupted: str = "--overwrite begins again"
) -> None:
    """Runs a program; a user's mistake, Ctrl-C and too little memory end it with one line and an exit code."""
    # GPUs would otherwise round float32 operands of products to fewer bits, and curves could not be compared.
    precision = "highest" if getattr(args, "dtype", None) == "float32" else "default"
    try:
        with jax.default_matmul_precision(precision):
            run(args)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {if_interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)
    except DeviceMemoryError as error:
        print(f"{name}: out of memory: {error}. Try a smaller batch", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY_EXIT)
    except (RunError, OSError) as error:
        sys.exit(f"{name}: error: {error}")
