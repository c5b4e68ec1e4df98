"""Real text for the examples: files to documents, documents to a byte-level BPE, tokens to batches.

The same files give the same tokenizer, held-out split and batches, so that two runs (or a run and its resumption) see
the same data.
"""

import contextlib
import functools
import hashlib
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from runs import RunError, replaced, say
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# A byte-level BPE starts from the 256 bytes and the end-of-text token.
SMALLEST_VOCAB = 257
TEXT_SUFFIXES = (".py", ".pyi", ".rst", ".txt", ".md")
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
# The standard library's own tests are mostly data, and half of its bytes. Its documentation (pydoc_data) is a Python
# module of long strings, of which the texts themselves are read.
SKIPPED_IN_LIBRARY = {"test", "tests", "idle_test", "pydoc_data"}
# Part of the cache's key: raise it if the same files would give other tokens.
CACHE_VERSION = 1


@dataclass(frozen=True)
class Corpus:
    """Token streams ready for training; documents are separated by the end-of-text token."""

    train: np.ndarray
    heldout: np.ndarray
    tokenizer: Tokenizer
    documents: int
    digest: str

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary; fewer than asked for if the text has too few distinct pairs."""
        return self.tokenizer.get_vocab_size()

    @property
    def end_of_text(self) -> int:
        return self.tokenizer.token_to_id(END_OF_TEXT)


def _library() -> tuple[list[Path], list[str]]:
    """The running Python's sources and documentation on this machine, and the language reference as `help` has it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    documentation = Path(sys.base_prefix) / "share" / "doc"
    folders = [Path(sysconfig.get_path("stdlib")), documentation / version, documentation / "python3-doc"]
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    return [folder for folder in folders if folder.is_dir()], list(dict(topics).values())


def _files(root: Path, skipped: set[str]) -> Iterator[Path]:
    """The text files under a folder; a file itself, whatever its name ends in."""
    if not root.exists():
        raise RunError(f"corpus path {root} does not exist")
    if root.is_file():
        yield root
    for folder, folders, files in root.walk():
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        yield from (folder / name for name in sorted(files) if name.endswith(TEXT_SUFFIXES))


def read_documents(paths: Sequence[Path] | None, max_bytes: int) -> list[str]:
    """Reads up to `max_bytes` of text from files and folders (None: Python's own library).

    Files that are not UTF-8 are skipped. Of equal files one is kept: a copy in each part of the held-out split would
    make the evaluation look better than it is. Documents are ordered by a hash of their content, so that a limit takes
    an even sample of the corpus, not its first folder.
    """
    skipped = SKIPPED_FOLDERS if paths is not None else SKIPPED_FOLDERS | SKIPPED_IN_LIBRARY
    roots, texts = _library() if paths is None else (paths, [])
    for path in (path for root in roots for path in _files(root, skipped)):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            texts.append(path.read_bytes().decode())
    by_content = {hashlib.sha256(text.encode()).digest(): text for text in texts if text.strip()}
    documents, left = [], max_bytes
    for _, text in sorted(by_content.items()):
        if left > 0:
            encoded = text.encode()[:left]
            documents.append(encoded.decode(errors="ignore"))
            left -= len(encoded)
    if not documents:
        where = f"in files ending in {', '.join(TEXT_SUFFIXES)} under {', '.join(map(str, roots))}"
        raise RunError(f"the corpus is empty: no UTF-8 text {where}; name files or folders that hold text")
    return documents


def split_heldout(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Splits by whole documents into (train, held-out); a single document is cut in two at the end of a line."""
    size = sum(map(len, documents))
    if len(documents) == 1:
        (only,) = documents
        wanted = int(size * (1 - fraction))
        cut = only.rfind("\n", 0, max(1, wanted)) + 1 or wanted
        if not only[:cut].strip() or not only[cut:].strip():
            raise RunError(f"the corpus is one file of {size} characters: too short for a held-out part")
        return [only[:cut]], [only[cut:]]
    # A document that is a large part of what is wanted stays in the training part, if there are enough others.
    small = [document for document in documents if len(document) <= size * fraction / 8]
    candidates = small if sum(map(len, small)) >= size * fraction else documents[:-1]
    ends = np.cumsum([len(document) for document in candidates])
    heldout = candidates[: int(np.searchsorted(ends, size * fraction)) + 1]
    return [document for document in documents if document not in set(heldout)], heldout


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, which represents any text without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], end_of_text: int | None = None) -> np.ndarray:
    """All texts as one stream of token ids, with the end-of-text token (None: END_OF_TEXT) after each text."""
    # If a text spells the end-of-text token out (as this file does), it means the characters, not the token.
    tokenizer.encode_special_tokens = True
    end = [tokenizer.token_to_id(END_OF_TEXT) if end_of_text is None else end_of_text]
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.concatenate([np.asarray(encoding.ids + end, np.int32) for encoding in encodings])


def load_corpus(
    paths: Sequence[Path] | None, *, vocab_size: int, max_bytes: int, heldout_fraction: float, cache_dir: Path
) -> Corpus:
    """Documents, their tokenizer (trained on the training part alone) and both token streams, cached.

    The cache's key is a hash of the text and of every option that changes the tokens, so it is never stale.
    """
    began = time.perf_counter()
    say("corpus: reading the text ...")
    documents = read_documents(paths, max_bytes)
    key = hashlib.sha256(f"{CACHE_VERSION} {vocab_size} {heldout_fraction}".encode())
    for document in documents:
        key.update(hashlib.sha256(document.encode()).digest())
    digest = key.hexdigest()[:16]
    tokenizer_path, tokens_path = cache_dir / f"{digest}.tokenizer.json", cache_dir / f"{digest}.npz"
    size = sum(len(document.encode()) for document in documents)
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        with np.load(tokens_path, allow_pickle=False) as arrays:
            train, heldout = arrays["train"], arrays["heldout"]
    # Whatever is wrong with a cache, it can be made again (`tokenizers` raises Exception).
    except Exception:
        say(f"corpus: training a tokenizer on {size / 1e6:.1f} MB (the next run finds it in {cache_dir}) ...")
        train_documents, heldout_documents = split_heldout(documents, heldout_fraction)
        tokenizer = train_tokenizer(train_documents, vocab_size)
        train, heldout = (encode(tokenizer, part) for part in (train_documents, heldout_documents))
        with replaced(tokenizer_path) as temporary:
            tokenizer.save(str(temporary))
        with replaced(tokens_path) as temporary:
            np.savez(temporary, train=train, heldout=heldout)
    corpus = Corpus(train, heldout, tokenizer, len(documents), digest)
    say(
        f"corpus: {len(documents)} files, {size / 1e6:.1f} MB, {len(train)} tokens to train on, {len(heldout)} held "
        f"out, vocabulary {corpus.vocab_size} ({time.perf_counter() - began:.1f} s)"
    )
    if corpus.vocab_size < vocab_size:
        say(f"corpus: too few distinct pairs for a vocabulary of {vocab_size}")
    return corpus


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Rows `[n, length + 1]` of consecutive tokens; each row begins with the last token of the row before."""
    if len(tokens) <= length:
        raise RunError(f"the corpus has {len(tokens)} tokens to train on, fewer than one window of {length + 1}")
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


@dataclass(frozen=True, eq=False)
class Batches:
    """Endless batches of shuffled rows, by number from 0: `batches[step]`. Each epoch has an order of its own."""

    rows: np.ndarray
    batch_size: int
    seed: int

    def __getitem__(self, number: int) -> np.ndarray:
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        return np.stack([self.rows[self._order(place // len(self.rows))[place % len(self.rows)]] for place in places])

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))


def heldout_batches(tokens: np.ndarray, batch_size: int, length: int, count: int) -> list[np.ndarray]:
    """Up to `count` batches of rows spread evenly over the held-out tokens, filled up with -1."""
    padding = -(len(tokens) - 1) % length if len(tokens) <= length else 0
    rows = windows(np.pad(tokens, (0, padding), constant_values=-1), length)
    rows = rows[np.linspace(0, len(rows), min(len(rows), batch_size * count), endpoint=False).astype(int)]
    filled = np.pad(rows, ((0, -len(rows) % batch_size), (0, 0)), constant_values=-1)
    return list(filled.reshape(-1, batch_size, length + 1))
