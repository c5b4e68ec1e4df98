"""Studies of gradient accumulation that run in one process: exactness, stability, and training on real text.

"Full" is full logits. "Means" is the usual mistake: the mean of the microbatches' means, which does not weight tokens
equally. GPUs have to be told not to round float32 operands of products (`runs.run_program`).
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
from corpus import Batches, Corpus
from language_model import HEADS, Head, evaluation, language_model_loss
from llama import LlamaConfig, Tree, initial_parameters
from numpy.linalg import norm
from runs import Record, read_metrics
from tqdm import tqdm
from training import Training, build_program, train

import jliger
from jliger.accumulation import AccumulatedLoss

DTYPES = ("float64", "float32", "bfloat16")
TOKENS = ("equal", "unequal")
LossFn = Callable[[Tree, jax.Array], tuple[jax.Array, Any]]
Step = Callable[[Tree, Any], tuple[AccumulatedLoss, Tree]]


# The models that are compared and trained.
COMPARED = LlamaConfig(1024, 32, 96, 2, 4, 2, tie_embeddings=True)
TRAINED = LlamaConfig(4096, 64, 192, 2, 4, 2, tie_embeddings=True)


class Sizes:
    """The sizes of a model and of its batches, as the options say."""

    def __init__(self, config: LlamaConfig, vocab_size: int, args: argparse.Namespace) -> None:
        self.config, self.rows, self.length = replace(config, vocab_size=vocab_size), args.rows, args.length

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


def vector(tree: Tree) -> np.ndarray:
    """All arrays of a tree as one vector in float64."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def distances(result: tuple[AccumulatedLoss, Tree], truth: tuple[AccumulatedLoss, Tree]) -> dict[str, float]:
    """The distances of loss and gradients from the truth, relative to it."""
    pairs = {"loss": (result[0].loss, truth[0].loss), "gradient": (result[1], truth[1])}
    vectors = {name: (vector(found), vector(true)) for name, (found, true) in pairs.items()}
    return {name: float(norm(found - true) / norm(true)) for name, (found, true) in vectors.items()}


def exactness(args: argparse.Namespace) -> list[Record]:
    """Each way of accumulating against full logits of the whole batch, in each dtype.

    Parameters are float32 (float64 for float64), the arithmetic is of the dtype. The means, which are wrong whatever
    the dtype is, are of the first dtype alone.
    """
    sizes, records = Sizes(COMPARED, args.vocab_size, args), []
    total = len(args.dtypes) * len(args.microbatches)
    with tqdm(total=total, desc="exactness", disable=args.no_progress) as bar:
        for dtype in args.dtypes:
            with jax.enable_x64(dtype == "float64"):
                params = sizes.parameters(0, jnp.promote_types(dtype, jnp.float32))
                batches = {tokens: sizes.batch(tokens, seed=0) for tokens in TOKENS}
                loss_fns = {head: sizes.loss_fn(head, dtype) for head in HEADS}
                whole = accumulated(loss_fns["full"], 1)
                truth = {tokens: whole(params, batch) for tokens, batch in batches.items()}
                if dtype == args.dtypes[0]:
                    loss_fns["means"] = mean_of_means(loss_fns["full"])
                for count in args.microbatches:
                    steps = {way: accumulated(loss_fn, count) for way, loss_fn in loss_fns.items()}
                    for tokens, batch in batches.items():
                        found = {way: distances(step(params, batch), truth[tokens]) for way, step in steps.items()}
                        records.append({"dtype": dtype, "tokens": tokens, "microbatches": count, **found})
                    bar.update()
    return records


def stability(args: argparse.Namespace) -> list[Record]:
    """The variance of loss and gradients over accumulation cycles of a constant model: a record per seed and way.

    Each cycle has a batch of its own, with unequal tokens, the same for all ways. The first cycle is done twice.
    """
    sizes = Sizes(COMPARED, args.vocab_size, args)
    loss_fns = {head: sizes.loss_fn(head) for head in HEADS}
    whole = accumulated(loss_fns["full"], 1)
    loss_fns["means"] = mean_of_means(loss_fns["full"])
    steps = {way: accumulated(loss_fn, args.microbatches) for way, loss_fn in loss_fns.items()}
    records = []
    for seed in tqdm(range(args.seeds), desc="stability", disable=args.no_progress):
        params = sizes.parameters(seed)
        batches = [sizes.batch("unequal", seed=1000 * seed + cycle) for cycle in range(args.cycles)]
        truths = [whole(params, batch) for batch in batches]
        for way, step in steps.items():
            results = [jax.device_get(step(params, batch)) for batch in batches]
            apart = [distances(result, truth) for result, truth in zip(results, truths, strict=True)]
            losses = [float(result.loss) for result, _ in results]
            record = {"seed": seed, "way": way, "loss_mean": statistics.mean(losses)}
            record["loss_variance"] = statistics.variance(losses)
            record["gradient_variance"] = variance_of(np.stack([vector(gradients) for _, gradients in results]))
            for name in ("loss", "gradient"):
                record[f"largest_{name}_difference"] = max(each[name] for each in apart)
            record["repeat_difference"] = max(distances(step(params, batches[0]), results[0]).values())
            records.append(record)
    return records


def variance_of(vectors: np.ndarray) -> float:
    """The mean squared distance of the rows from their mean, relative to the mean's squared norm."""
    return float(vectors.var(axis=0, ddof=1).sum() / norm(vectors.mean(axis=0)) ** 2)


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


class Way(NamedTuple):
    """One way of training: a head, how a batch is split, and in how many parts the optimizer gets it."""

    head: str
    microbatches: int = 1
    calls: int = 1
    is_weighted: bool = True


def ways_of_training(count: int) -> dict[str, Way]:
    return {
        "full logits, whole batch": Way("full"),
        f"full logits, {count} microbatches": Way("full", count),
        "jliger, whole batch": Way("jliger"),
        f"jliger, {count} microbatches": Way("jliger", count),
        f"jliger, {count} calls of the optimizer": Way("jliger", calls=count),
        f"jliger, mean of {count} means": Way("jliger", count, is_weighted=False),
    }


def training_of(name: str, way: Way, sizes: Sizes, batches: Batches, args: argparse.Namespace, out: Path) -> Training:
    loss_fn = sizes.loss_fn(way.head)
    highest = args.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(highest / 10, highest, args.steps // 10, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))
    if way.calls > 1:
        optimizer = jliger.weighted_multi_steps(optimizer, way.calls)

    def mean_loss(results: Sequence[AccumulatedLoss], *_: Any) -> Record:
        sums = np.sum([(float(result.loss * result.weight), float(result.weight)) for result in results], axis=0)
        return {"loss": float(sums[0] / max(sums[1], 1))}

    loss_fn = loss_fn if way.is_weighted else mean_of_means(loss_fn)
    batch = jax.ShapeDtypeStruct((sizes.rows // way.calls, sizes.length + 1), jnp.int32)
    return Training(
        name,
        out / name,
        build_program(loss_fn, partial(sizes.parameters, 1), optimizer, batch, microbatches=way.microbatches),
        lambda step, params: batches[step - 1],
        figures=mean_loss,
        parts=lambda batch: [batch[i :: way.calls] for i in range(way.calls)],
    )


def train_in_all_ways(args: argparse.Namespace) -> list[Record]:
    """The same training on real text in each way: a record with its curve."""
    corpus = options.corpus_of(args)
    sizes = Sizes(TRAINED, corpus.vocab_size, args)
    rows, heldout = (rows_of_paragraphs(part, corpus, sizes.length) for part in (corpus.train, corpus.heldout))
    # An even sample, of as many as make whole batches.
    count = min(len(heldout) // sizes.rows, 16)
    heldout = heldout[np.linspace(0, len(heldout), count * sizes.rows, endpoint=False).astype(int)]
    evaluate = evaluation(sizes.config, Head("jliger"), np.split(heldout, count), end_of_text=-1)
    batches = Batches(rows, sizes.rows, seed=2)
    tokens = np.sum(np.stack([batches[step] for step in range(args.steps)])[..., 1:] >= 0, axis=-1)
    tokens_per_row = {"least": int(tokens.min()), "mean": float(tokens.mean()), "most": int(tokens.max())}
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_of_training(args.microbatches).items()
        trainings = [training_of(name, way, sizes, batches, args, Path(folder)) for name, way in ways]
        train(trainings, args, args.steps)
        for training in trainings:
            steps = list(read_metrics(training.folder)["train"].values())
            losses = [step["loss"] for step in steps]
            first = records[0]["losses"] if records else losses
            records.append(
                {
                    "way": training.name,
                    "losses": losses,
                    "last_loss": losses[-1],
                    "largest_difference": max(abs(a - b) / b for a, b in zip(losses, first, strict=True)),
                    "milliseconds": 1e3 * statistics.median(step["seconds"] for step in steps),
                    "memory_bytes": training.compiled.memory,
                    "tokens_per_row": tokens_per_row,
                    "heldout_loss": evaluate(training.state["parameters"])["loss"],
                }
            )
    return records
