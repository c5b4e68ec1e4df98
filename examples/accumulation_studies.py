"""Studies of gradient accumulation that run in one process: exactness, stability, and training on real text.

"Full" is full logits, "means" the usual fault: the mean of microbatches' means, where tokens should count alike.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
from accumulation_losses import HEADS, Sums, sums_of
from corpus import Corpus
from llama import LlamaConfig, Tree
from reporting import Record, memory_of
from tqdm import tqdm

import jliger

DTYPES = {"float64": jnp.float64, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
TOKENS = ("equal", "unequal")
Step = Callable[[Tree, Tree], tuple[jax.Array, Tree]]


@dataclass(frozen=True)
class Sizes:
    """Of a batch and a model."""

    config: LlamaConfig
    rows: int
    length: int

    def batch(self, tokens: str, seed: int) -> dict[str, np.ndarray]:
        """Random tokens and labels `[rows, length]`; with unequal tokens a random number of each row's count."""
        rng = np.random.default_rng(seed)
        ids, labels = rng.integers(0, self.config.vocab_size, (2, self.rows, self.length), np.int32)
        # Short rows and long ones, as texts are: few have about the mean.
        counts = np.ceil(self.length * rng.random((self.rows, 1)) ** 3) if tokens == "unequal" else self.length
        return {"tokens": ids, "labels": np.where(np.arange(self.length) < counts, labels, -1).astype(np.int32)}


def accumulated(sums: Sums, microbatches: int) -> Step:
    """Loss and gradients of a batch, by tokens."""
    step = jliger.accumulate_gradients(sums, microbatches)

    def loss_and_gradients(params: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        found, gradients = step(params, batch)
        return found.loss, gradients

    return jax.jit(loss_and_gradients)


def mean_of_means(sums: Sums, microbatches: int) -> Step:
    """The fault: each microbatch's mean counts as much as any other's."""

    def means(params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
        loss, weight = sums(params, batch)
        return loss / jnp.maximum(weight, 1), jnp.ones(())

    return accumulated(means, microbatches)


def norm(tree: Tree) -> float:
    """Of all arrays together, in float64."""
    return math.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(tree)))


def difference(one: Tree, other: Tree) -> Tree:
    """In float64."""
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), one, other)


def distances(found: tuple[jax.Array, Tree], truth: tuple[jax.Array, Tree]) -> dict[str, float]:
    """How far loss and gradients are from the truth, relative to it."""
    return {
        "loss": abs(float(found[0]) - float(truth[0])) / abs(float(truth[0])),
        "gradient": norm(difference(found[1], truth[1])) / norm(truth[1]),
    }


# ---- exactness -------------------------------------------------------------------------------------------------


def exactness(sizes: Sizes, dtypes: Sequence[str], microbatches: Sequence[int], progress: bool) -> list[Record]:
    """Each way of accumulating against full logits of the whole batch, in each dtype.

    Parameters are float32 (float64 for float64), and the arithmetic is of the dtype. The means, which are no matter of
    rounding, are of the first dtype alone.
    """
    records = []
    bar = tqdm(total=len(dtypes) * len(microbatches), desc="exactness", disable=not progress)
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            width = jnp.promote_types(DTYPES[dtype], jnp.float32)
            params = decoder.initial_parameters(sizes.config, jax.random.key(0), width)
            batches = {tokens: sizes.batch(tokens, seed=0) for tokens in TOKENS}
            sums = {head: sums_of(head, sizes.config, DTYPES[dtype]) for head in HEADS}
            whole = accumulated(sums["full"], 1)
            truth = {tokens: whole(params, batch) for tokens, batch in batches.items()}
            for count in microbatches:
                ways = {
                    "full": whole if count == 1 else accumulated(sums["full"], count),
                    "jliger": accumulated(sums["jliger"], count),
                }
                if dtype == dtypes[0]:
                    ways["means"] = whole if count == 1 else mean_of_means(sums["full"], count)
                for tokens, batch in batches.items():
                    found = {way: distances(step(params, batch), truth[tokens]) for way, step in ways.items()}
                    records.append({"dtype": dtype, "tokens": tokens, "microbatches": count, **found})
                bar.update()
    bar.close()
    return records


# ---- stability -------------------------------------------------------------------------------------------------


def stability(sizes: Sizes, microbatches: int, seeds: int, cycles: int, progress: bool) -> list[Record]:
    """How loss and gradients vary over accumulation cycles of a model that stays as it is: a record a seed and way.

    Each cycle has a batch of its own, with unequal tokens; all ways see the same. The first cycle is done twice.
    """
    sums = {head: sums_of(head, sizes.config, jnp.float32) for head in HEADS}
    whole = accumulated(sums["full"], 1)
    ways = {head: accumulated(sums[head], microbatches) for head in HEADS}
    ways["means"] = mean_of_means(sums["full"], microbatches)
    records = []
    bar = tqdm(total=seeds * cycles, desc="stability", disable=not progress)
    with jax.default_matmul_precision("highest"):
        for seed in range(seeds):
            params = decoder.initial_parameters(sizes.config, jax.random.key(seed), jnp.float32)
            found: dict[str, list[tuple[float, Tree]]] = {way: [] for way in ways}
            apart: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            repeats = {}
            for cycle in range(cycles):
                batch = sizes.batch("unequal", seed=1000 * seed + cycle)
                truth = whole(params, batch)
                for way, step in ways.items():
                    loss, gradients = step(params, batch)
                    found[way].append((float(loss), jax.tree.map(np.asarray, gradients)))
                    apart[way].append(distances((loss, gradients), truth))
                    if cycle == 0:
                        again = step(params, batch)
                        repeats[way] = max(distances(again, (loss, gradients)).values())
                bar.update()
            records += [
                {
                    "seed": seed,
                    "way": way,
                    "loss_mean": statistics.mean(loss for loss, _ in found[way]),
                    "loss_variance": statistics.variance([loss for loss, _ in found[way]]),
                    "gradient_variance": variance_of([gradients for _, gradients in found[way]]),
                    "largest_loss_difference": max(each["loss"] for each in apart[way]),
                    "largest_gradient_difference": max(each["gradient"] for each in apart[way]),
                    "repeat_difference": repeats[way],
                }
                for way in ways
            ]
    bar.close()
    return records


def variance_of(trees: Sequence[Tree]) -> float:
    """The mean squared distance from the mean, relative to the mean's squared norm."""
    mean = jax.tree.map(lambda *leaves: np.mean(np.asarray(leaves, np.float64), axis=0), *trees)
    squares = sum(norm(difference(tree, mean)) ** 2 for tree in trees) / (len(trees) - 1)
    return squares / norm(mean) ** 2


# ---- training --------------------------------------------------------------------------------------------------


def paragraph_ends(corpus: Corpus) -> np.ndarray:
    """The tokens that end a paragraph: those with a blank line in them, and that between documents."""
    # In a byte-level BPE's tokens a new line is written as Ċ.
    blank = [index for token, index in corpus.tokenizer.get_vocab().items() if "ĊĊ" in token]
    return np.asarray([*blank, corpus.end_of_text])


def rows_of_paragraphs(stream: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """Rows `[n, length + 1]` of one paragraph each, or a piece of one: what it doesn't fill is −1."""
    rows = []
    for paragraph in np.split(stream, np.flatnonzero(np.isin(stream, ends)) + 1):
        for start in range(0, len(paragraph) - 1, length):
            piece = paragraph[start : start + length + 1]
            rows.append(np.pad(piece, (0, length + 1 - len(piece)), constant_values=-1))
    return np.stack(rows).astype(np.int32)


def batches_of(rows: np.ndarray, size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of shuffled rows, epoch after epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - size + 1, size):
            yield as_batch(rows[order[start : start + size]])


def as_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens and their successors; where there is none, a label that doesn't count."""
    return {"tokens": np.maximum(rows[:, :-1], 0), "labels": rows[:, 1:]}


@dataclass(frozen=True)
class Way:
    """One way of training: a head, how a batch is split, and what of a batch the optimizer sees at once."""

    head: str
    microbatches: int = 1
    calls: int = 1
    is_weighted: bool = True

    @property
    def name(self) -> str:
        """For people."""
        title = {"full": "full logits", "jliger": "jliger"}[self.head]
        if not self.is_weighted:
            return f"{title}, mean of {self.microbatches} means"
        if self.calls > 1:
            return f"{title}, {self.calls} calls of the optimizer"
        return f"{title}, {self.microbatches} microbatches" if self.microbatches > 1 else f"{title}, whole batch"


def ways_of_training(microbatches: int) -> list[Way]:
    """The others are compared with the first."""
    return [
        Way("full"),
        Way("full", microbatches),
        Way("jliger"),
        Way("jliger", microbatches),
        Way("jliger", calls=microbatches),
        Way("jliger", microbatches, is_weighted=False),
    ]


def train(
    corpus: Corpus, sizes: Sizes, microbatches: int, steps: int, learning_rate: float, progress: bool
) -> list[Record]:
    """The same training in each way: a record with its curve."""
    sizes = replace(sizes, config=replace(sizes.config, vocab_size=corpus.vocab_size))
    ends = paragraph_ends(corpus)
    rows = rows_of_paragraphs(corpus.train, ends, sizes.length)
    # An even sample of them, as many as make whole batches.
    heldout = rows_of_paragraphs(corpus.heldout, ends, sizes.length)
    count = min(len(heldout) // sizes.rows, 16) * sizes.rows
    heldout = heldout[np.linspace(0, len(heldout), count, endpoint=False).astype(int)]
    records = []
    with jax.default_matmul_precision("highest"):
        evaluate = jax.jit(sums_of("jliger", sizes.config, jnp.float32))
        for way in ways_of_training(microbatches):
            params, record = _train_one(way, sizes, rows, steps, learning_rate, progress)
            found = [
                evaluate(params, as_batch(heldout[i : i + sizes.rows])) for i in range(0, len(heldout), sizes.rows)
            ]
            heldout_loss = sum(float(loss) for loss, _ in found) / sum(float(weight) for _, weight in found)
            records.append({**record, "heldout_loss": heldout_loss})
    return records


def _train_one(
    way: Way, sizes: Sizes, rows: np.ndarray, steps: int, learning_rate: float, progress: bool
) -> tuple[Tree, Record]:
    sums = sums_of(way.head, sizes.config, jnp.float32)
    gradients_of = jliger.accumulate_gradients(sums, way.microbatches)
    if not way.is_weighted:
        means = mean_of_means(sums, way.microbatches)
    schedule = optax.warmup_cosine_decay_schedule(learning_rate / 10, learning_rate, steps // 10, steps)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))
    optimizer = jliger.weighted_multi_steps(inner, way.calls) if way.calls > 1 else optax.with_extra_args_support(inner)

    def step(state: Tree, batch: Tree) -> tuple[Tree, tuple[jax.Array, jax.Array]]:
        params, optimizer_state = state
        if way.is_weighted:
            found, gradients = gradients_of(params, batch)
            loss, weight = found.loss, found.weight
        else:
            loss, gradients = means(params, batch)
            weight = jnp.ones(())
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params, weight=weight)
        return (optax.apply_updates(params, updates), optimizer_state), (loss, weight)

    params = decoder.initial_parameters(sizes.config, jax.random.key(1), jnp.float32)
    state = (params, optimizer.init(params))
    batches = batches_of(rows, sizes.rows, seed=2)

    def parts_of(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        return [{name: array[i :: way.calls] for name, array in batch.items()} for i in range(way.calls)]

    first = parts_of(next(batches_of(rows, sizes.rows, seed=2)))[0]
    compiled = jax.jit(step, donate_argnums=0).lower(state, first).compile()
    losses, times, counts = [], [], []
    for _ in tqdm(range(steps), desc=way.name, disable=not progress):
        began = time.perf_counter()
        batch = next(batches)
        found = []
        for part in parts_of(batch):
            state, (loss, weight) = compiled(state, part)
            found.append((float(loss), float(weight)))
        losses.append(sum(loss * weight for loss, weight in found) / max(sum(weight for _, weight in found), 1))
        times.append(time.perf_counter() - began)
        counts.append(np.sum(batch["labels"] >= 0, axis=1))
    return state[0], {
        "way": way.name,
        "head": way.head,
        "is_weighted": way.is_weighted,
        "losses": losses,
        "milliseconds": 1e3 * statistics.median(times),
        "memory_bytes": memory_of(compiled.memory_analysis()),
        "tokens_per_row": summary_of(np.concatenate(counts)),
    }


def summary_of(counts: np.ndarray) -> dict[str, Any]:
    """Least, mean and most."""
    return {"least": int(counts.min()), "mean": float(counts.mean()), "most": int(counts.max())}
