"""Checkpoints of a training run by Orbax: read back as they were saved, or clearly refused."""

import hashlib
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from reporting import write_json


class CheckpointError(Exception):
    """The checkpoint can't be read; the message says which one and what to do."""


# Lies in a checkpoint's folder, so that it is moved and removed with it.
MANIFEST = "sha256.json"


def hashes_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file under a folder but the manifest, by relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(_hash_of, files)
        return {path.relative_to(folder).as_posix(): found for path, found in zip(files, hashes, strict=True)}


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> None:
    """Raises ValueError where a file isn't as it was saved.

    Orbax doesn't notice every changed byte, and from a truncated file it raises from several threads at once.
    Without a manifest nothing is compared: the checkpoint was whole when the program was killed beside it.
    """
    if not (folder / MANIFEST).exists():
        return
    saved = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    found = hashes_of(folder)
    for name in saved:
        if found.get(name) != saved[name]:
            raise ValueError(f"file {name} {'has changed' if name in found else 'is missing'}")


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C takes effect after this block: Orbax, interrupted in it, leaves threads that end in tracebacks."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt


class Checkpoints:
    """Orbax checkpoints of step, training state and data position, each with a manifest of its files.

    The state is any tree of arrays. Each process writes what its devices hold, and reads what they are to hold: a
    checkpoint isn't bound to the mesh that it was saved from.
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

    def save(self, step: int, state: Any, position: int) -> None:
        """Writes a checkpoint; it counts only once it is whole, so a kill meanwhile leaves the one before.

        Ctrl-C meanwhile takes effect once it is written.
        """
        data = {"step": step, "position": position}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        with interrupted_afterwards():
            self._manager.save(step, args=arguments, force=True)
            if jax.process_index() == 0:
                folder = self.directory / str(step)
                write_json(folder / MANIFEST, hashes_of(folder))

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, int] | None:
        """Step, state and data position of the latest checkpoint, or None where there is none.

        The state comes as `abstract_state` says: its structure, shapes, dtypes and shardings.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        try:
            verify(self.directory / str(step))
            with interrupted_afterwards():
                restored = self._manager.restore(step, args=arguments)
            position = int(restored["data"]["position"])
        # Whatever a damaged file makes Orbax or TensorStore raise, it is the same to the user.
        except Exception as error:
            earlier = max((other for other in self._manager.all_steps() if other < step), default=None)
            instead = "start from the beginning" if earlier is None else f"continue from step {earlier}"
            reason = (str(error).strip() or "no detail").splitlines()[0]
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory / str(step)} can't be read "
                f"({type(error).__name__}: {reason}). Nothing was changed. Move that folder away and run "
                f"again with --resume to {instead}, or name another --out"
            ) from error
        return step, restored["state"], position
