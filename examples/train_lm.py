"""Trains a small language model twice, with full logits and with jliger, and shows both side by side.

    python examples/train_lm.py

The text is the running Python's own library and documentation, through a byte-level BPE trained on the spot. The two
trainings share model, seed and data, and advance in turn, a step each. Their loss curves agree to rounding; their steps
take different time and memory. docs/train_lm.md has the options and says what a run leaves behind.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from corpus import Batches, Corpus, heldout_batches, windows
from language_model import CURVE_TOLERANCE, HEADS, Evaluation, Head, language_model_loss
from llama import LlamaConfig
from options import (
    COUNT,
    add_corpus_options,
    add_eval_options,
    add_model_options,
    add_run_options,
    add_training_options,
    check_corpus,
    check_head,
    check_size,
    check_warmup,
    corpus_of,
    heads_of,
    model_of,
    parser_of,
)
from reporting import (
    curve_table,
    curves_panel,
    difference_panel,
    memory_panel,
    report,
    summarize,
    summary_table,
    verdict,
)
from runs import PLOT, SUMMARY, TOKENIZER, begin_folder, check_folder, read_metrics, run_program
from training import Program, Training, TrainingConfig, build_program, next_of, train


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line; a bad argument ends the program with a message."""
    parser = parser_of("train_lm", __doc__)
    add_corpus_options(parser)
    add_model_options(parser)
    add_training_options(parser)
    add = add_run_options(parser, "runs/train_lm", checkpoint_every=50)
    add_eval_options(add, 25, 8)
    add("--stop-at", type=COUNT, metavar="STEP", help="stop here, with the schedule of all --steps")
    args = parser.parse_args(argv)
    check_corpus(parser, args)
    check_size(parser, args)
    check_head(parser, args)
    check_warmup(parser, args)
    return args


def program_of(head: Head, config: LlamaConfig, training: TrainingConfig, end_of_text: int) -> Program:
    """The training step with one head."""
    loss_fn = language_model_loss(head, config, end_of_text)
    return build_program(
        loss_fn, partial(training.initial_parameters, config), training.optimizer(config), training.tokens()
    )


def training_of(
    head: Head, config: LlamaConfig, training: TrainingConfig, corpus: Corpus, args: argparse.Namespace
) -> Training:
    """The training with one head on the corpus."""
    batches = Batches(windows(corpus.train, training.length), training.batch_size, training.seed)
    heldout = heldout_batches(corpus.heldout, training.batch_size, training.length, args.eval_batches)
    return Training(
        head.name,
        args.out / head.name,
        program_of(head, config, training, corpus.end_of_text),
        next_of(batches),
        Evaluation(config, head, heldout, corpus.end_of_text),
    )


def run(args: argparse.Namespace) -> None:
    """Corpus, training with both heads, report."""
    corpus = corpus_of(args)
    config, training = model_of(args, corpus.vocab_size), TrainingConfig.of(args)
    # What shapes the curve: a run is only resumed with the same values.
    settings = {"corpus": corpus.digest, **asdict(config), **asdict(training)}
    # Whatever can be refused is refused before the folder is changed.
    trainings = [training_of(head, config, training, corpus, args) for head in heads_of(args)]
    check_folder(args.out, settings, resume=args.resume, overwrite=args.overwrite)
    if not args.resume:
        begin_folder(args.out, settings, (*HEADS, TOKENIZER, SUMMARY, PLOT))
    corpus.tokenizer.save(str(args.out / TOKENIZER))
    last = args.steps if args.stop_at is None else args.stop_at
    train(trainings, args, last)
    # A head that an earlier call trained in this folder is part of the report.
    metrics = {head: read_metrics(args.out / head) for head in HEADS}
    runs = {head: events for head, events in metrics.items() if "compiled" in events}
    summary = summarize(runs, settings)
    parts = [curve_table(runs), summary_table(summary)]
    if "comparison" in summary:
        parts.append(verdict(summary["comparison"], args.dtype, CURVE_TOLERANCE[args.dtype]))
    if last < args.steps:
        parts.append(f"Stopped at step {last} of {args.steps}; --resume continues.")
    loss = curves_panel(runs, "Loss", "loss", ("train", "eval"), "cross entropy (nats per token)")
    report(args.out, summary, [loss, difference_panel(runs), memory_panel(summary)], parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run_program("train_lm", run, parse_args(argv), "--resume continues from the latest checkpoint")


if __name__ == "__main__":
    main()
