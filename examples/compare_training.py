"""Trains a language model once for each variant of the loss and each seed, and compares the held-out losses.

    python examples/compare_training.py --variants 'plain:{}' 'float32 logits:{"logits_dtype": "float32"}'

A variant is NAME:JSON: keyword options of `jliger.fused_linear_cross_entropy`. The variants of a seed share data and
initial parameters, and alternate, one step each. The held-out loss is that of the operation without options, whatever a
variant trains with. Seeds may also run as processes of their own; `--report` then shows their results files together.
The defaults are for a GPU. docs/train_lm.md says more.
"""

import argparse
import inspect
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import loading  # noqa: F401
import options
import reporting
import runs
from corpus import Corpus, heldout_batches
from language_model import Head, evaluation, inputs_and_labels
from llama import LlamaConfig, Tree
from matplotlib.axes import Axes
from options import COUNT_OR_ZERO
from runs import PLOT, Record, RunError
from sweeps import command_of, read_results
from training import TrainingConfig, text_training, train

import jliger
from jliger.bench.report import environment

Curves = dict[int, dict[int, float]]  # by seed and step
RESULTS, TABLE = "results.json", "table.txt"
# Parameters of fused_linear_cross_entropy that are the same for all variants.
GIVEN = {"hidden", "kernel", "labels", "where", "reduction", "kernel_layout", "return_metrics"}


def variant(text: str) -> tuple[str, Record]:
    """An argparse type: a name and keyword options."""
    name, _, keywords = text.partition(":")
    try:
        chosen = json.loads(keywords or "{}")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:JSON ({error})") from error
    if not isinstance(chosen, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:JSON (JSON must be an object)")
    unknown = set(chosen) - (set(inspect.signature(jliger.fused_linear_cross_entropy).parameters) - GIVEN)
    if not name or "/" in name or unknown:
        wrong = f"there is no option {', '.join(sorted(unknown))} to choose" if unknown else "bad name"
        raise argparse.ArgumentTypeError(f"{text!r}: {wrong}")
    return name, chosen


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("compare_training", __doc__)
    options.add_corpus_options(parser)
    options.add_model_options(parser)
    add = parser.add_argument_group("training").add_argument
    of_variants = """options of the loss, such as 'skip:{"skip_gradients_below": 2.4e-4}'; the first is the baseline"""
    add("--variants", type=variant, nargs="+", default=[("plain", {})], metavar="NAME:JSON", help=of_variants)
    add("--seeds", type=COUNT_OR_ZERO, nargs="+", default=[0, 1, 2], metavar="N", help="of parameters and data (0 1 2)")
    options.add_jliger_options(add)
    options.add_steps_option(add)
    options.add_learning_options(add, "a tenth of the steps, at most 100")
    options.add_eval_options(add, 100, 16)
    add = options.add_run_options(parser, "runs/compare_training")
    add("--report", type=Path, nargs="+", metavar="FILE", help=f"train nothing: show these {RESULTS} together")
    parser.set_defaults(dtype="bfloat16", hidden_size=512, layers=4, heads=8, batch_size=32, length=512, steps=2000)
    parser.set_defaults(learning_rate=1e-3, max_bytes=64_000_000, seed=0)
    args = parser.parse_args(argv)
    options.check(parser, args, most=100)
    if len(dict(args.variants)) < len(args.variants):
        parser.error("--variants: a name occurs twice")
    if len(set(args.seeds)) < len(args.seeds) or max(args.seeds) >= 2**31:
        parser.error("--seeds: each must be below 2**31 and occur once")
    return args


def loss_of(
    head: Head, chosen: Record, config: LlamaConfig, end_of_text: int
) -> Callable[[Tree, jax.Array], tuple[jax.Array, jax.Array]]:
    """The loss function of a variant, for `training.text_training`."""

    def loss_fn(params: Tree, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, labels, where = inputs_and_labels(tokens, end_of_text)
        hidden, kernel, own = head.last_layer(config, params, inputs)
        try:
            loss = jliger.fused_linear_cross_entropy(
                hidden, kernel, labels, where=where, reduction="sum", **{**own, **chosen}
            )
        except TypeError as error:  # of an option that the variant chooses, such as a string in place of a number
            raise RunError(str(error)) from error
        return loss, jnp.sum(where)

    return loss_fn


def train_seed(args: argparse.Namespace, seed: int, corpus: Corpus, evaluate: Callable[[Tree], Record]) -> list[Record]:
    """Trains every variant with one seed; a record for each, with its curve."""
    config, learning = options.model_of(args, corpus.vocab_size), replace(TrainingConfig.of(args), seed=seed)
    trainings = []
    for name, chosen in args.variants:
        loss_fn = loss_of(options.jliger_head(args), chosen, config, corpus.end_of_text)
        folder = args.out / f"seed_{seed}" / name
        trainings.append(text_training(name, folder, loss_fn, config, learning, corpus.train, evaluate=evaluate))
    train(trainings, args, args.steps)
    records = []
    for training in trainings:
        events = runs.read_metrics(training.folder)
        curve = {step: each["loss"] for step, each in sorted(events["eval"].items())}
        milliseconds = 1e3 * statistics.median(each["seconds"] for each in events["train"].values())
        about = {"variant": training.name, "seed": seed, "rows_by": training.compiled.rows_by}
        records.append({**about, "milliseconds": milliseconds, "heldout": curve})
    return records


def train_all(args: argparse.Namespace) -> Record:
    """Trains every variant with every seed; the results are written after each seed."""
    corpus = options.corpus_of(args)
    config, learning = options.model_of(args, corpus.vocab_size), asdict(TrainingConfig.of(args))
    settings = {"corpus": corpus.digest, **asdict(config), **learning, "seed": None}
    heldout = heldout_batches(corpus.heldout, args.batch_size, args.length, args.eval_batches)
    runs.open_folder(args, settings, [f"seed_{seed}" for seed in args.seeds])
    evaluate = evaluation(config, options.jliger_head(args), heldout, corpus.end_of_text)
    about = {"environment": {**environment(), "command": args.command}, "settings": settings}
    results = {**about, "variants": dict(args.variants), "records": []}
    for seed in args.seeds:
        runs.say(f"seed {seed}:")
        results["records"] += train_seed(args, seed, corpus, evaluate)
        runs.write_json(args.out / RESULTS, results)
    return results


def merged(args: argparse.Namespace) -> Record:
    """The results of several files that differ in their seeds alone."""
    results = [
        read_results(path, ("variant", "seed", "heldout"), ("environment", "settings", "variants"))
        for path in args.report
    ]
    for path, each in zip(args.report, results, strict=True):
        if any(each[key] != results[0][key] for key in ("settings", "variants")):
            raise RunError(f"--report: {path} has other settings or variants than {args.report[0]}")
    runs.open_folder(args, results[0]["settings"], [])
    commands = "\n".join(each["environment"]["command"] for each in results)
    records = [record for each in results for record in each["records"]]
    if len({(record["variant"], record["seed"]) for record in records}) < len(records):
        raise RunError("--report: a seed occurs twice")
    return {**results[0], "environment": {**results[0]["environment"], "command": commands}, "records": records}


def curves_of(results: Record) -> dict[str, Curves]:
    """By variant, seed and step, the held-out loss; the first variant's name comes first."""
    curves: dict[str, Curves] = {name: {} for name in results["variants"]}
    for record in results["records"]:
        # JSON makes strings of the steps.
        curves[record["variant"]][record["seed"]] = {int(step): loss for step, loss in record["heldout"].items()}
    return curves


def percent_above(first: Curves, curves: Curves) -> Curves:
    return {seed: {step: 100 * (own[step] / first[seed][step] - 1) for step in own} for seed, own in curves.items()}


def text_of(results: Record) -> str:
    """A table of the last held-out losses, and what they were measured with."""
    curves = curves_of(results)
    baseline, first = next(iter(curves.items()))
    last = max(step for curve in first.values() for step in curve)
    rows = [["", *(f"seed {seed}" for seed in first), "mean", "spread", "difference", "largest", "ms a step"]]
    for name, own in curves.items():
        losses = [curve[last] for curve in own.values()]
        mean, above = statistics.mean(losses), [curve[last] for curve in percent_above(first, own).values()]
        milliseconds = [record["milliseconds"] for record in results["records"] if record["variant"] == name]
        figures = [f"{(max(losses) - min(losses)) / mean:.2%}", f"{statistics.mean(above):+.3f} %"]
        figures += [f"{max(above, key=abs):+.3f} %", f"{statistics.median(milliseconds):.1f}"]
        rows.append([name, *(f"{loss:.4f}" for loss in (*losses, mean)), *figures])
    about, start = results["environment"], statistics.mean(curve[0] for curve in first.values())
    sizes = ", ".join(f"{name} {value}" for name, value in results["settings"].items() if value is not None)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    made_by = f"{about['device']}, Python {about['python']}, {versions}\n{about['command']}"
    return (
        f"Held-out loss after {last} steps, by the operation without options; before the first step {start:.4f}.\n"
        f"Spread: of the seeds. Difference: to {baseline} with the same seed, the mean and the largest.\n\n"
        f"{reporting.table(rows)}\n\n{sizes}\n{made_by}"
    )


def draw(results: Record, is_difference: bool, axes: Axes) -> None:
    """The held-out losses against the step, or how far they are above the first variant's; a line for each seed."""
    curves = curves_of(results)
    baseline, first = next(iter(curves.items()))
    for place, (name, own) in enumerate(curves.items()):
        shown = percent_above(first, own) if is_difference else own
        for number, curve in enumerate(shown.values()):
            axes.plot(*zip(*curve.items(), strict=True), color=f"C{place}", label=None if number else name, linewidth=1)
    title = f"Difference to {baseline}" if is_difference else "Held-out loss"
    axes.set(title=title, xlabel="step", ylabel="%" if is_difference else "nats per token")
    axes.legend()


def run(args: argparse.Namespace) -> None:
    results = merged(args) if args.report else train_all(args)
    runs.write_json(args.out / RESULTS, results)
    text = text_of(results)
    (args.out / TABLE).write_text(text + "\n", encoding="utf-8")
    reporting.plot([partial(draw, results, False), partial(draw, results, True)], args.out / PLOT)
    print(f"\n{text}\n\nwritten: {RESULTS}, {TABLE} and {PLOT} in {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.command = command_of("compare_training", argv)
    runs.run_program("compare_training", run, args)


if __name__ == "__main__":
    main()
