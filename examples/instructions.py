"""Data to fine-tune on: instructions, conversations or texts in a JSON file, to packed rows of tokens.

A record has Alpaca's fields (`instruction`, `output`, perhaps `input`), or `messages` of `role` and `content`, or a
`text`. Only what the model has to write counts: outputs and the assistant's messages, or all of a text. A record that
cannot be used is never dropped in silence: `Dataset.problems` names it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from runs import Record, RunError, read_json
from tokenizers import Tokenizer

IGNORED = -100
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
    "\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# Of the names that other formats have for the roles.
ROLES = {"human": "user", "gpt": "assistant"}

# A text and whether it counts.
Piece = tuple[str, bool]


class DataError(RunError):
    """The data cannot be used; the message says why and what to do."""


class _RecordError(Exception):
    """A record cannot be used; the message says why."""


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer of a checkpoint


def _content(token: str | Record | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


class ModelTokenizer:
    """The tokenizer of a checkpoint folder, its end of a text, and its chat template if it has one."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise DataError(
                f"there is no {path}; transformers writes one: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        # `tokenizers` raises Exception.
        except Exception as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        about = (
            read_json(path.with_name("tokenizer_config.json")) if (folder / "tokenizer_config.json").exists() else {}
        )
        self.special = {key: _content(value) for key, value in about.items() if key.endswith("_token") and value}
        self.end = self._end(folder)
        self._template = self._chat_template(folder, about)

    def _end(self, folder: Path) -> int:
        name = self.special.get("eos_token")
        end = self.tokenizer.token_to_id(name) if name else read_json(folder / "config.json").get("eos_token_id")
        end = end[0] if isinstance(end, list) else end
        if end is None:
            raise DataError(f"{folder} does not say which token ends a text (eos_token in tokenizer_config.json)")
        return end

    def _chat_template(self, folder: Path, about: Record) -> Any:
        path, text = folder / "chat_template.jinja", about.get("chat_template")
        if path.exists():
            text = path.read_text(encoding="utf-8")
        if isinstance(text, list):
            text = next((each["template"] for each in text if each["name"] == "default"), None)
        if text is None:
            return None
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise DataError("the checkpoint has a chat template, which needs jinja2: pip install jinja2") from None

        self._template_error = TemplateError

        def refuse(message: str) -> None:
            raise _RecordError(f"the chat template refuses it: {message}")

        extensions = ["jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = refuse
        # Some templates tell today's date. A date that does not change makes every run see the same data.
        environment.globals["strftime_now"] = lambda form: "26 Jul 2024"
        return environment.from_string(text)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render(self, messages: Sequence[Record], *, is_prompt: bool = False) -> str:
        """A conversation as text; a prompt ends where the assistant is to go on."""
        if self._template is None:
            raise _RecordError(
                "it has messages, and the checkpoint has no chat template (an instruction-tuned one has)"
            )
        try:
            return self._template.render(messages=messages, add_generation_prompt=is_prompt, **self.special)
        except self._template_error as error:
            raise _RecordError(f"the chat template fails: {error}") from error

    def encode(self, pieces: Sequence[Piece], is_chat: bool) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and which of them count. The pieces are encoded one by one, as when the model is used.

        The text of a chat spells its special tokens out. Elsewhere what looks like a special token is text, the
        beginning is what the tokenizer puts there, and the end counts.
        """
        self.tokenizer.encode_special_tokens = not is_chat
        ids = [] if is_chat else [each for each in self.tokenizer.encode("").ids if each != self.end]
        counts = [False] * len(ids)
        for text, does_count in pieces:
            encoded = self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += encoded
            counts += [does_count] * len(encoded)
        if not is_chat:
            ids.append(self.end)
            counts.append(True)
        return np.asarray(ids, np.int32), np.asarray(counts, bool)


# ---------------------------------------------------------------------------------------------------------------------
# Records to pieces


def _text(record: Record, key: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        raise _RecordError(f"{key!r} is {'missing' if value is None else f'no string but {type(value).__name__}'}")
    return value


def _messages(record: Record) -> list[Record]:
    """Messages of role and content; `conversations` of `from` and `value` are another name for them."""
    key, role, content = ("messages", "role", "content") if "messages" in record else ("conversations", "from", "value")
    if not isinstance(record[key], list) or not all(isinstance(each, dict) for each in record[key]):
        raise _RecordError(f"{key!r} is no list of objects")
    return [
        {"role": ROLES.get(name := _text(each, role), name), "content": _text(each, content)} for each in record[key]
    ]


def _chat(tokenizer: ModelTokenizer, messages: list[Record]) -> Iterator[list[Piece]]:
    """A conversation's pieces.

    Some templates write a message differently once others follow it, such as without its reasoning. Such a conversation
    becomes one example per message of the assistant, each as the model sees and writes it.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise _RecordError("no message is the assistant's")
    spans = []
    for turn in turns:
        prompt, written = tokenizer.render(messages[:turn], is_prompt=True), tokenizer.render(messages[: turn + 1])
        if not written.startswith(prompt):
            raise _RecordError("the chat template's prompt is not the beginning of its conversation")
        spans.append((prompt, written))
    whole = spans[-1][1]
    if not all(whole.startswith(written) for _, written in spans):
        yield from ([(prompt, False), (written[len(prompt) :], True)] for prompt, written in spans)
        return
    pieces, at = [], 0
    for prompt, written in spans:
        pieces += [(whole[at : len(prompt)], False), (whole[len(prompt) : len(written)], True)]
        at = len(written)
    yield pieces


def _pieces(tokenizer: ModelTokenizer, record: Any) -> Iterator[tuple[list[Piece], bool]]:
    """The examples of a record: pieces, and whether they are a chat."""
    if not isinstance(record, dict):
        raise _RecordError(f"it is no object but {type(record).__name__}")
    if "messages" in record or "conversations" in record:
        yield from ((pieces, True) for pieces in _chat(tokenizer, _messages(record)))
    elif "instruction" in record:
        fields = {"instruction": _text(record, "instruction"), "input": _text(record, "input", "")}
        output = _text(record, "output")
        if tokenizer.has_chat_template:
            asked = "\n\n".join(text for text in fields.values() if text)
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
            yield from ((pieces, True) for pieces in _chat(tokenizer, messages))
        else:
            prompt = (WITH_INPUT if fields["input"] else WITHOUT_INPUT).format(**fields)
            yield [(prompt, False), (output, True)], False
    elif "text" in record:
        yield [(_text(record, "text"), True)], False
    else:
        keys = ", ".join(map(repr, list(record)[:5])) or "none"
        raise _RecordError(f"its fields are {keys}; needed are 'instruction' and 'output', 'messages', or 'text'")


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a JSON list or of JSON lines, with their places; of what is no JSON, the error."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            yield from ((f"record {number}", record) for number, record in enumerate(json.loads(text), 1))
        except ValueError as error:
            raise DataError(f"{path} begins like a JSON list and is none: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                yield f"line {number}", _RecordError(f"it is no JSON: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# Examples to rows


@dataclass
class Dataset:
    """Examples, as inputs and labels that are already shifted, and what could not be used as it was."""

    examples: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    truncated: int = 0

    def in_words(self) -> str:
        tokens = sum(len(inputs) for inputs, _ in self.examples)
        counted = sum(int(np.sum(labels >= 0)) for _, labels in self.examples)
        parts = [f"{len(self.examples)} examples, {tokens} tokens, {counted} of which count"]
        if self.truncated:
            parts.append(f"{self.truncated} examples were cut at --length")
        if self.problems:
            more = f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
            parts.append(f"{len(self.problems)} records were left out: {'; '.join(self.problems[:5])}{more}")
        return ", ".join(parts)


def read_dataset(path: Path, tokenizer: ModelTokenizer, length: int) -> Dataset:
    """Reads and encodes all records; an example longer than `length` is cut there."""
    dataset = Dataset()
    for place, record in read_records(path):
        try:
            if isinstance(record, _RecordError):
                raise record
            for pieces, is_chat in _pieces(tokenizer, record):
                ids, counts = tokenizer.encode(pieces, is_chat)
                inputs, labels = ids[:-1], np.where(counts[1:], ids[1:], IGNORED)
                if not np.any(labels[:length] >= 0):
                    raise _RecordError(f"no token that counts is among the first {length} (--length)")
                dataset.truncated += len(inputs) > length
                dataset.examples.append((inputs[:length], labels[:length]))
        except _RecordError as error:
            dataset.problems.append(f"{place}: {error}")
    if not dataset.examples:
        raise DataError(f"{path} has no example that can be used: {'; '.join(dataset.problems[:5]) or 'it is empty'}")
    return dataset


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Examples to train on, shuffled, and to evaluate on."""
    order = np.random.default_rng(seed).permutation(len(dataset.examples))
    examples = [dataset.examples[number] for number in order]
    heldout = round(fraction * len(examples))
    if heldout == len(examples):
        raise DataError(f"of {len(examples)} examples, --eval-fraction {fraction} leaves none to train on")
    return examples[heldout:], examples[:heldout]


# How many rows are filled at a time: an example goes into the first one that has room for it.
OPEN_ROWS = 256


def pack(examples: Sequence[tuple[np.ndarray, np.ndarray]], length: int, is_packed: bool = True) -> np.ndarray:
    """Rows `[n, 4, length]` of tokens, labels, segments and positions; a row has one example if not `is_packed`.

    Segments are numbered from 1 in each row; 0 is padding. Positions begin with 0 in each segment.
    """
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    room: list[int] = []
    first = 0
    for example in examples:
        size = len(example[0])
        fitting = (row for row in range(first, len(rows)) if room[row] >= size)
        row = next(fitting, None) if is_packed else None
        if row is None:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
            first = max(first, len(rows) - OPEN_ROWS)
        rows[row].append(example)
        room[row] -= size
    packed = np.zeros((len(rows), 4, length), np.int32)
    packed[:, 1] = IGNORED
    for row, content in zip(packed, rows, strict=True):
        at = 0
        for segment, (inputs, labels) in enumerate(content, 1):
            part = slice(at, at + len(inputs))
            row[0, part], row[1, part], row[2, part], row[3, part] = inputs, labels, segment, np.arange(len(inputs))
            at += len(inputs)
    return packed


def eval_batches(rows: np.ndarray, batch_size: int, limit: int) -> list[np.ndarray]:
    """Up to `limit` batches; the last one is filled up with rows in which nothing counts."""
    rows = rows[: batch_size * limit]
    filling = np.zeros((-len(rows) % batch_size, *rows.shape[1:]), np.int32)
    filling[:, 1] = IGNORED
    return list(np.concatenate([rows, filling]).reshape(-1, batch_size, *rows.shape[1:]))
