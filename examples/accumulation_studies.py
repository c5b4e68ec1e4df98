"""Studies of gradient accumulation that run in one process: exactness, stability, and training on real text.

"Full" is full logits. "Means" is the usual mistake: the mean of the microbatches' means, which does not weight tokens
equally.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from corpus import Batches, Corpus
from language_model import HEADS, Head, evaluation, language_model_loss
from llama import LlamaConfig, Tree, initial_parameters
from reporting import TITLES
from runs import Record, read_metrics
from tqdm import tqdm
from training import Training, build_program, train

import jliger
from jliger.accumulation import AccumulatedLoss

DTYPES = ("float64", "float32", "bfloat16")
TOKENS = ("equal", "unequal")
LossFn = Callable[[Tree, jax.Array], tuple[jax.Array, Any]]
Step = Callable[[Tree, Any], tuple[AccumulatedLoss, Tree]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch and a model."""

    config: LlamaConfig
    rows: int
    length: int

    def loss_fn(self, head: str, dtype: str = "float32") -> LossFn:
        return language_model_loss(Head(head), replace(self.config, dtype=dtype))

    def parameters(self, seed: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Tree:
        return initial_parameters(self.config, jax.random.key(seed), dtype)

    def batch(self, tokens: str, seed: int) -> np.ndarray:
        """Random tokens `[rows, length + 1]`; with unequal tokens, a random number of each row counts."""
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, self.config.vocab_size, (self.rows, self.length + 1), np.int32)
        # As of texts, many rows are short and some are long.
        counts = np.ceil(self.length * rng.random((self.rows, 1)) ** 3) if tokens == "unequal" else self.length
        return np.where(np.arange(self.length + 1) <= counts, ids, -1)


def accumulated(loss_fn: LossFn, microbatches: int) -> Step:
    """The loss and gradients of a batch, weighted by tokens."""
    return jax.jit(jliger.accumulate_gradients(loss_fn, microbatches))


def mean_of_means(loss_fn: LossFn) -> LossFn:
    """The mistake: the mean of a microbatch, with weight 1."""

    def means(params: Tree, tokens: jax.Array) -> tuple[jax.Array, float]:
        loss, weight = loss_fn(params, tokens)
        return loss / jnp.maximum(weight, 1), 1.0

    return means


def norm(tree: Tree) -> float:
    """The norm of all arrays together, in float64."""
    return math.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(tree)))


def difference(one: Tree, other: Tree) -> Tree:
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), one, other)


def distances(result: tuple[AccumulatedLoss, Tree], truth: tuple[AccumulatedLoss, Tree]) -> dict[str, float]:
    """The distances of loss and gradients from the truth, relative to it."""
    loss, true_loss = float(result[0].loss), float(truth[0].loss)
    return {
        "loss": abs(loss - true_loss) / abs(true_loss),
        "gradient": norm(difference(result[1], truth[1])) / norm(truth[1]),
    }


def exactness(sizes: Sizes, dtypes: Sequence[str], microbatches: Sequence[int], quiet: bool) -> list[Record]:
    """Each way of accumulating against full logits of the whole batch, in each dtype.

    Parameters are float32 (float64 for float64), the arithmetic is of the dtype. The means, which are wrong whatever
    the dtype is, are of the first dtype alone.
    """
    records = []
    with tqdm(total=len(dtypes) * len(microbatches), desc="exactness", disable=quiet) as bar:
        for dtype in dtypes:
            with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
                params = sizes.parameters(0, jnp.promote_types(dtype, jnp.float32))
                batches = {tokens: sizes.batch(tokens, seed=0) for tokens in TOKENS}
                loss_fns = {head: sizes.loss_fn(head, dtype) for head in HEADS}
                whole = accumulated(loss_fns["full"], 1)
                truth = {tokens: whole(params, batch) for tokens, batch in batches.items()}
                if dtype == dtypes[0]:
                    loss_fns["means"] = mean_of_means(loss_fns["full"])
                for count in microbatches:
                    steps = {way: accumulated(loss_fn, count) for way, loss_fn in loss_fns.items()}
                    for tokens, batch in batches.items():
                        found = {way: distances(step(params, batch), truth[tokens]) for way, step in steps.items()}
                        records.append({"dtype": dtype, "tokens": tokens, "microbatches": count, **found})
                    bar.update()
    return records


def stability(sizes: Sizes, microbatches: int, seeds: int, cycles: int, quiet: bool) -> list[Record]:
    """The variance of loss and gradients over accumulation cycles of a constant model: a record per seed and way.

    Each cycle has a batch of its own, with unequal tokens, the same for all ways. The first cycle is done twice.
    """
    loss_fns = {head: sizes.loss_fn(head) for head in HEADS}
    whole = accumulated(loss_fns["full"], 1)
    loss_fns["means"] = mean_of_means(loss_fns["full"])
    ways = {way: accumulated(loss_fn, microbatches) for way, loss_fn in loss_fns.items()}
    records = []
    with tqdm(total=seeds * cycles, desc="stability", disable=quiet) as bar, jax.default_matmul_precision("highest"):
        for seed in range(seeds):
            params = sizes.parameters(seed)
            results: dict[str, list[tuple[AccumulatedLoss, Tree]]] = {way: [] for way in ways}
            apart: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for cycle in range(cycles):
                batch = sizes.batch("unequal", seed=1000 * seed + cycle)
                truth = whole(params, batch)
                for way, step in ways.items():
                    results[way].append(jax.device_get(step(params, batch)))
                    apart[way].append(distances(results[way][-1], truth))
                bar.update()
            again = {way: step(params, sizes.batch("unequal", seed=1000 * seed)) for way, step in ways.items()}
            for way in ways:
                losses = [float(result.loss) for result, _ in results[way]]
                record = {"seed": seed, "way": way, "loss_mean": statistics.mean(losses)}
                record["loss_variance"] = statistics.variance(losses)
                record["gradient_variance"] = variance_of([gradients for _, gradients in results[way]])
                for name in ("loss", "gradient"):
                    record[f"largest_{name}_difference"] = max(each[name] for each in apart[way])
                record["repeat_difference"] = max(distances(again[way], results[way][0]).values())
                records.append(record)
    return records


def variance_of(trees: Sequence[Tree]) -> float:
    """The mean squared distance from the mean, relative to the mean's squared norm."""
    mean = jax.tree.map(lambda *leaves: np.mean(np.asarray(leaves, np.float64), axis=0), *trees)
    squares = sum(norm(difference(tree, mean)) ** 2 for tree in trees) / (len(trees) - 1)
    return squares / norm(mean) ** 2


def rows_of_paragraphs(stream: np.ndarray, corpus: Corpus, length: int) -> np.ndarray:
    """Rows `[n, length + 1]` of one paragraph each, or a piece of one, filled up with -1."""
    # Paragraphs end with a token that has a blank line in it. In a byte-level BPE's tokens a new line is written as Ċ.
    blank = [index for token, index in corpus.tokenizer.get_vocab().items() if "ĊĊ" in token]
    ends = np.flatnonzero(np.isin(stream, [*blank, corpus.end_of_text]))
    rows = []
    for paragraph in np.split(stream, ends + 1):
        for start in range(0, len(paragraph) - 1, length):
            piece = paragraph[start : start + length + 1]
            rows.append(np.pad(piece, (0, length + 1 - len(piece)), constant_values=-1))
    return np.stack(rows).astype(np.int32)


@dataclass(frozen=True)
class Way:
    """One way of training: a head, how a batch is split, and what part of a batch the optimizer gets at once."""

    head: str
    microbatches: int = 1
    calls: int = 1
    is_weighted: bool = True

    @property
    def name(self) -> str:
        if not self.is_weighted:
            return f"{TITLES[self.head]}, mean of {self.microbatches} means"
        if self.calls > 1:
            return f"{TITLES[self.head]}, {self.calls} calls of the optimizer"
        return f"{TITLES[self.head]}, {f'{self.microbatches} microbatches' if self.microbatches > 1 else 'whole batch'}"


def ways_of_training(microbatches: int) -> Iterator[Way]:
    yield from (Way("full"), Way("full", microbatches), Way("jliger"), Way("jliger", microbatches))
    yield from (Way("jliger", calls=microbatches), Way("jliger", microbatches, is_weighted=False))


def training_of(way: Way, sizes: Sizes, rows: np.ndarray, args: argparse.Namespace, folder: Path) -> Training:
    loss_fn = sizes.loss_fn(way.head)
    highest = args.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(highest / 10, highest, args.steps // 10, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))
    if way.calls > 1:
        optimizer = jliger.weighted_multi_steps(optimizer, way.calls)

    def figures(results: Sequence[AccumulatedLoss], batch: np.ndarray, seconds: float) -> Record:
        del seconds
        sums = np.sum([(float(result.loss * result.weight), float(result.weight)) for result in results], axis=0)
        return {"loss": float(sums[0] / max(sums[1], 1)), "counts": np.sum(batch[:, 1:] >= 0, axis=1).tolist()}

    loss_fn = loss_fn if way.is_weighted else mean_of_means(loss_fn)
    batch = jax.ShapeDtypeStruct((sizes.rows // way.calls, sizes.length + 1), jnp.int32)
    create, batches = partial(sizes.parameters, 1), Batches(rows, sizes.rows, seed=2)
    return Training(
        way.name,
        folder / way.name,
        build_program(loss_fn, create, optimizer, batch, microbatches=way.microbatches),
        lambda step, params: batches[step - 1],
        figures=figures,
        parts=lambda batch: [batch[i :: way.calls] for i in range(way.calls)],
    )


def train_in_all_ways(corpus: Corpus, sizes: Sizes, args: argparse.Namespace) -> list[Record]:
    """The same training in each way: a record with its curve."""
    sizes = replace(sizes, config=replace(sizes.config, vocab_size=corpus.vocab_size))
    rows, heldout = (rows_of_paragraphs(part, corpus, sizes.length) for part in (corpus.train, corpus.heldout))
    # An even sample, of as many as make whole batches.
    count = min(len(heldout) // sizes.rows, 16)
    heldout = heldout[np.linspace(0, len(heldout), count * sizes.rows, endpoint=False).astype(int)]
    evaluate = evaluation(sizes.config, Head("jliger"), np.split(heldout, count), end_of_text=-1)
    ways, records = list(ways_of_training(args.microbatches)), []
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as folder:
        trainings = [training_of(way, sizes, rows, args, Path(folder)) for way in ways]
        train(trainings, args, args.steps)
        for way, training in zip(ways, trainings, strict=True):
            steps = list(read_metrics(training.folder)["train"].values())
            losses = [step["loss"] for step in steps]
            first = records[0]["losses"] if records else losses
            counts = np.concatenate([step["counts"] for step in steps])
            records.append(
                {
                    "way": way.name,
                    "head": way.head,
                    "is_weighted": way.is_weighted,
                    "losses": losses,
                    "last_loss": losses[-1],
                    "largest_difference": max(abs(a - b) / b for a, b in zip(losses, first, strict=True)),
                    "milliseconds": 1e3 * statistics.median(step["seconds"] for step in steps),
                    "memory_bytes": training.compiled.memory,
                    "tokens_per_row": {
                        "least": int(counts.min()),
                        "mean": float(counts.mean()),
                        "most": int(counts.max()),
                    },
                    "heldout_loss": evaluate(training.state["parameters"])["loss"],
                }
            )
    return records
