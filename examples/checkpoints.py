"""Checkpoints of a training run, by Orbax. A damaged one is named and refused."""

import hashlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from runs import RunError, read_json, write_json

# This file lies in the checkpoint's folder, so that it is moved and removed with it.
MANIFEST = "sha256.json"


class CheckpointError(RunError):
    """The checkpoint cannot be read; the message says which one and what to do."""


def hashes_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, except the manifest, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def verify(folder: Path) -> None:
    """Raises ValueError if a file has changed since it was saved.

    Orbax does not notice every changed byte, and from a truncated file it raises in several threads at once. A
    checkpoint without a manifest is taken as it is: the program was killed after Orbax had finished it.
    """
    saved = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    hashes = hashes_of(folder) if saved else {}
    for name in saved:
        if hashes.get(name) != saved[name]:
            raise ValueError(f"file {name} {'has changed' if name in hashes else 'is missing'}")


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block: interrupted inside it, Orbax leaves threads that end in tracebacks."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt


class Checkpoints:
    """Orbax checkpoints of the training state, each with a manifest of its files.

    Each process writes what its devices hold and reads what they are to hold, so that a checkpoint can be read under
    another mesh than it was written from.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory.absolute()
        policy = ocp.checkpoint_managers.LatestN(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any) -> None:
        """Writes a checkpoint. It counts once it is complete: a kill before that leaves the one before."""
        with interrupted_afterwards():
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
            if jax.process_index() == 0:
                folder = self.directory / str(step)
                write_json(folder / MANIFEST, hashes_of(folder))

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any]:
        """Step and state of the latest checkpoint, or 0 and None if there is none.

        `abstract_state` gives the structure, shapes, dtypes and shardings.
        """
        step = self._manager.latest_step()
        if step is None:
            return 0, None
        folder = self.directory / str(step)
        try:
            verify(folder)
            with interrupted_afterwards():
                return step, self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
        # A damaged file makes Orbax and TensorStore raise errors of many types.
        except Exception as error:
            earlier = max((other for other in self._manager.all_steps() if other < step), default=None)
            instead = "start from the beginning" if earlier is None else f"continue from step {earlier}"
            reason = (str(error).strip() or "no detail").splitlines()[0]
            raise CheckpointError(
                f"the checkpoint of step {step} in {folder} cannot be read ({type(error).__name__}: {reason}). Nothing "
                f"was changed. Move that folder away and run again with --resume to {instead}, or name another --out"
            ) from error
