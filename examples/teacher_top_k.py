"""The K largest log-probabilities of a teacher on disk: it runs once over a text, and students learn from the files.

A folder has `ids.npy` and `logprobs.npy`, each `[rows, length, K]`, which are read as they are needed, and
`header.json`, which says what they are of. The header is written last: without it a folder is not complete.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from numpy.lib.format import open_memmap
from runs import Record, RunError, read_json, write_json
from tqdm import tqdm

import jliger

HEADER = "header.json"
DTYPES = {"ids": np.int32, "logprobs": np.float32}


def write(
    folder: Path,
    header: Record,
    rows: np.ndarray,
    top_k: Callable[[np.ndarray], jliger.LinearTopK],
    batch_size: int,
    *,
    quiet: bool = False,
) -> None:
    """Runs the teacher over rows `[rows, length + 1]` of tokens, a batch at a time.

    `top_k` finds the `header["k"]` largest of each token after the first; -1 is no token.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEADER).unlink(missing_ok=True)
    shape = (len(rows), rows.shape[1] - 1, header["k"])
    arrays = {name: open_memmap(folder / f"{name}.npy", "w+", dtype, shape) for name, dtype in DTYPES.items()}
    for start in tqdm(range(0, len(rows), batch_size), desc="teacher's top k", unit="batch", disable=quiet):
        batch = rows[start : start + batch_size]
        filled = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)), constant_values=-1)
        found = jax.device_get(top_k(filled))
        for name, array in arrays.items():
            array[start : start + len(batch)] = getattr(found, name)[: len(batch)]
    for array in arrays.values():
        array.flush()
    write_json(folder / HEADER, {**header, "seconds": time.perf_counter() - began})


def read(folder: Path, header: Record) -> tuple[Record, dict[str, np.ndarray]] | None:
    """The header and the arrays in a folder, or None if it holds none.

    Raises RunError if they cannot be read, or if they are not what `header` says.
    """
    if not (folder / HEADER).exists():
        return None
    try:
        stored = read_json(folder / HEADER)
        changes = [
            f"{name} was {stored[name]} and is {value}" for name, value in header.items() if stored[name] != value
        ]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in DTYPES}
    # A header of something else may lack a name.
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{folder} cannot be read as a teacher's log-probabilities ({error!r}); remove it") from error
    if changes:
        raise RunError(f"{folder} holds other log-probabilities: {', '.join(changes)}. Name another --top-k-dir")
    return stored, arrays
