"""Real text for the examples: files to documents, documents to a byte-level BPE, tokens to batches.

Everything here is deterministic: the same files give the same tokenizer, the same held-out split and the same
batches, so that two runs (or a run and its resumption) see the same data.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# A byte-level BPE starts from the 256 bytes and the end-of-text token.
SMALLEST_VOCAB = 257
TEXT_SUFFIXES = (".py", ".pyi", ".rst", ".txt", ".md")
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
# The standard library's own tests are data more than prose or program, and half of its bytes.
# Its documentation (pydoc_data) is a Python module of long strings: the texts themselves are read instead.
SKIPPED_IN_LIBRARY = {"test", "tests", "idle_test", "pydoc_data"}
# Part of the cache's key: to be raised when the same files would give other tokens.
CACHE_VERSION = 1


class CorpusError(ValueError):
    """The corpus can't be used; the message says why and what to do."""


@dataclass(frozen=True)
class Document:
    """One file's text, under a name that doesn't depend on where the folder lies."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Token streams ready for training; documents are separated by the end-of-text token."""

    train: np.ndarray
    heldout: np.ndarray
    tokenizer: Tokenizer
    documents: int
    size: int
    digest: str

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary (fewer than asked for where the text has too few distinct pairs)."""
        return self.tokenizer.get_vocab_size()

    @property
    def end_of_text(self) -> int:
        """The id of the token between documents."""
        return self.tokenizer.token_to_id(END_OF_TEXT)


def python_library_paths() -> list[Path]:
    """The running Python's own sources and documentation, as far as they are found on this machine."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    documentation = Path(sys.base_prefix) / "share" / "doc"
    found = [Path(sysconfig.get_path("stdlib")), documentation / version, documentation / "python3-doc"]
    return [path for path in found if path.is_dir()]


def _language_reference() -> dict[str, str]:
    """What `help()` shows by topic: the language reference's chapters, where this Python has them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return dict(topics)


def _walk(folder: Path, skipped: set[str]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if name.endswith(TEXT_SUFFIXES))


def read_documents(paths: Sequence[Path] | None, max_bytes: int) -> list[Document]:
    """Reads up to `max_bytes` of text from files and folders (None: Python's own library).

    Files that aren't UTF-8 are skipped, and of files with equal content one is kept: a copy in both parts of
    the held-out split would make the evaluation look better than it is. The order follows a hash of the
    content, so that a cap keeps an even sample of the corpus and not the first folder of it.
    """
    skipped = SKIPPED_FOLDERS if paths is not None else SKIPPED_FOLDERS | SKIPPED_IN_LIBRARY
    roots = python_library_paths() if paths is None else list(paths)
    by_content: dict[str, Document] = {}
    if paths is None:
        for name, text in _language_reference().items():
            by_content[hashlib.sha256(text.encode()).hexdigest()] = Document(f"topics/{name}", text)
    for number, root in enumerate(roots):
        if not root.exists():
            raise CorpusError(f"corpus path {root} does not exist")
        for path in [root] if root.is_file() else _walk(root, skipped):
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            if not text.strip():
                continue
            name = path.name if path == root else path.relative_to(root).as_posix()
            by_content.setdefault(hashlib.sha256(text.encode()).hexdigest(), Document(f"{number}/{name}", text))
    documents: list[Document] = []
    left = max_bytes
    for _, document in sorted(by_content.items()):
        encoded = document.text.encode()
        if len(encoded) > left:
            document = Document(document.name, encoded[:left].decode(errors="ignore"))
        if document.text:
            documents.append(document)
        left -= len(encoded)
        if left <= 0:
            break
    if not documents:
        raise CorpusError(
            f"the corpus is empty: no UTF-8 text in files ending in {', '.join(TEXT_SUFFIXES)} under "
            f"{', '.join(map(str, roots))}; name files or folders that hold text"
        )
    return documents


def split_heldout(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Splits by whole documents into (train, held-out); a single file is cut in two at a line's end."""
    size = sum(len(document.text) for document in documents)
    if len(documents) == 1:
        (only,) = documents
        cut = only.text.rfind("\n", 0, max(1, int(size * (1 - fraction)))) + 1 or int(size * (1 - fraction))
        parts = [Document(only.name, only.text[:cut]), Document(only.name, only.text[cut:])]
        if not all(part.text.strip() for part in parts):
            raise CorpusError(f"the corpus is one file of {size} characters: too short for a held-out part")
        return parts[:1], parts[1:]
    # A document that would be much of the held-out part by itself stays in training, where others suffice.
    wanted = size * fraction
    small = [document for document in documents if len(document.text) <= wanted / 8]
    heldout: list[Document] = []
    for document in small if sum(len(document.text) for document in small) >= wanted else documents[:-1]:
        heldout.append(document)
        if sum(len(taken.text) for taken in heldout) >= wanted:
            break
    names = {document.name for document in heldout}
    return [document for document in documents if document.name not in names], heldout


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, which represents any text without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts as one stream of token ids, each text followed by the end-of-text token."""
    # A text that spells the end-of-text token out (as this file does) means the characters, not the token.
    tokenizer.encode_special_tokens = True
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.concatenate([np.asarray(encoding.ids + end, np.int32) for encoding in encodings])


def _read_cache(tokenizer_path: Path, tokens_path: Path) -> tuple[Tokenizer, np.ndarray, np.ndarray] | None:
    """The cached tokenizer and token streams, or None where there are none to be read."""
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        with np.load(tokens_path, allow_pickle=False) as arrays:
            return tokenizer, arrays["train"], arrays["heldout"]
    # A cache holds nothing that can't be made again, whatever is wrong with it (`tokenizers` raises
    # Exception).
    except Exception:
        return None


def _write_cache(tokenizer: Tokenizer, train: np.ndarray, heldout: np.ndarray, paths: tuple[Path, Path]) -> None:
    """Writes each file beside its place and moves it there, so that a killed run leaves no half file."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{os.getpid()}-{path.name}")
        if path.suffix == ".npz":
            np.savez(beside, train=train, heldout=heldout)
        else:
            tokenizer.save(str(beside))
        beside.replace(path)


def load_corpus(
    paths: Sequence[Path] | None,
    *,
    vocab_size: int,
    max_bytes: int,
    heldout_fraction: float,
    cache_dir: Path,
) -> Corpus:
    """Documents, their tokenizer (trained on the training part alone) and both token streams, cached.

    The cache's key is made of the text itself and of every option that changes the tokens, so it can't be
    stale.
    """
    documents = read_documents(paths, max_bytes)
    key = hashlib.sha256(f"{CACHE_VERSION} {vocab_size} {heldout_fraction}".encode())
    for document in documents:
        key.update(hashlib.sha256(document.text.encode()).digest())
    digest = key.hexdigest()[:16]
    cache_paths = (cache_dir / f"{digest}.tokenizer.json", cache_dir / f"{digest}.npz")
    cached = _read_cache(*cache_paths)
    if cached is None:
        train_documents, heldout_documents = split_heldout(documents, heldout_fraction)
        train_texts = [document.text for document in train_documents]
        tokenizer = train_tokenizer(train_texts, vocab_size)
        train = encode(tokenizer, train_texts)
        heldout = encode(tokenizer, [document.text for document in heldout_documents])
        _write_cache(tokenizer, train, heldout, cache_paths)
    else:
        tokenizer, train, heldout = cached
    size = sum(len(document.text.encode()) for document in documents)
    return Corpus(train, heldout, tokenizer, len(documents), size, digest)


class Batches:
    """Endless shuffled batches; `position`, the number of windows taken, and `seed` are all its state.

    A window is `length + 1` tokens (inputs and labels overlap); windows don't overlap otherwise. Each epoch
    has its own order, made from the seed and the epoch's number, so a position can be returned to at once.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, length: int, seed: int, position: int = 0) -> None:
        self.windows = (len(tokens) - 1) // length
        if self.windows < 1:
            raise CorpusError(f"the corpus has {len(tokens)} tokens to train on, fewer than one window of {length + 1}")
        self.tokens = tokens
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> np.ndarray:
        rows = []
        for place in range(self.position, self.position + self.batch_size):
            epoch, index = divmod(place, self.windows)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
            start = int(self._order[index]) * self.length
            rows.append(self.tokens[start : start + self.length + 1])
        self.position += self.batch_size
        return np.stack(rows)


def heldout_batches(tokens: np.ndarray, batch_size: int, length: int, count: int) -> list[np.ndarray]:
    """Up to `count` batches of windows spread evenly over the held-out tokens; -1 fills what has no token."""
    windows = max(1, (len(tokens) - 1) // length)
    chosen = min(windows, batch_size * count)
    rows = np.full((-(-chosen // batch_size) * batch_size, length + 1), -1, np.int32)
    for row, window in enumerate(np.linspace(0, windows, chosen, endpoint=False).astype(int)):
        piece = tokens[window * length : (window + 1) * length + 1]
        rows[row, : len(piece)] = piece
    return list(rows.reshape(-1, batch_size, length + 1))
