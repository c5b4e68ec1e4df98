"""Distills a larger language model into a smaller one, and trains the same small one without a teacher.

    python examples/distill.py

The teacher learns from the whole text, the students from the beginning of it: one from the labels alone, one from
labels and teacher, with the same seed on the same batches. The latter is trained with full logits of both models and
with jliger, whose curves agree to rounding. With `--teacher-top-k K` one more student learns from the teacher's K
largest log-probabilities, which are kept on disk. docs/train_distill.md has the options and what a run leaves behind.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import options
import reporting
import runs
import teacher_top_k
from checkpoints import CheckpointError
from corpus import Batches, Corpus, heldout_batches, windows
from language_model import CURVE_TOLERANCE, Head, evaluation, inputs_and_labels, language_model_loss
from llama import LlamaConfig, Tree, hidden_states, last_layer, parameter_count
from matplotlib.axes import Axes
from options import COUNT, NUMBER, NUMBER_OR_ZERO
from runs import Events, Record, RunError
from training import Training, TrainingConfig, build_program, text_training, train

import jliger

# Folders in the run's own; the distilled student's has one for each head.
TEACHER, ALONE, DISTILLED, TOP_K = "teacher", "alone", "distilled", "top_k"
STUDENTS = {ALONE: "labels alone", DISTILLED: "with teacher", TOP_K: "with its top k"}
# Part of the cached teacher's key: raise it if the same settings would give another teacher.
CACHE_VERSION = 2


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class DistillationConfig:
    """A token's loss: `hard_weight · cross entropy + (1 − hard_weight) · temperature² · divergence`."""

    divergence: str
    beta: float
    temperature: float
    hard_weight: float

    def options(self) -> Record:
        """Those that all of jliger's losses take."""
        # The square makes up for gradients that shrink with the temperature.
        soft_weight = (1 - self.hard_weight) * self.temperature**2
        weights = {"hard_weight": self.hard_weight, "soft_weight": soft_weight}
        return {"temperature": self.temperature, "reduction": "sum", **weights}


@dataclass(frozen=True)
class Distillation:
    """The loss of a student beside a teacher, with one head."""

    head: Head
    student: LlamaConfig
    teacher: LlamaConfig
    config: DistillationConfig
    end_of_text: int

    def __call__(self, params: Tree, tokens: jax.Array, teacher_params: Tree) -> tuple[jax.Array, jax.Array]:
        """The sum of the token losses, and the number of tokens."""
        inputs, labels, where = inputs_and_labels(tokens, self.end_of_text)
        kernel, layout = last_layer(self.student, params)
        teacher_kernel, teacher_layout = last_layer(self.teacher, teacher_params)
        # The reference has `[B, T, V]` logits of both models in memory.
        library = jliger.reference if self.head.name == "full" else jliger.losses
        if self.config.divergence == "jsd":
            divergence = partial(library.fused_linear_jsd, beta=self.config.beta)
        else:
            divergence = partial(library.fused_linear_kl, direction=self.config.divergence)
        loss = divergence(
            hidden_states(self.student, params, inputs),
            kernel,
            hidden_states(self.teacher, teacher_params, inputs),
            teacher_kernel,
            labels=labels,
            where=where,
            student_kernel_layout=layout,
            teacher_kernel_layout=teacher_layout,
            **self.config.options(),
            **self.head.options(self.student),
        )
        return loss, jnp.sum(where)


@dataclass(frozen=True)
class TopKDistillation:
    """The loss of a student beside a teacher's largest log-probabilities, with everything else as one more column."""

    head: Head
    student: LlamaConfig
    config: DistillationConfig
    end_of_text: int

    def __call__(self, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
        """The sum of the token losses, and the number of tokens."""
        inputs, labels, where = inputs_and_labels(batch["tokens"], self.end_of_text)
        hidden, kernel, own = self.head.last_layer(self.student, params, inputs)
        given = {"labels": labels, "where": where, "remainder": True, **self.config.options(), **own}
        loss = jliger.losses.fused_linear_top_k_kl(hidden, kernel, batch["ids"], batch["logprobs"], **given)
        return loss, jnp.sum(where)


def build_trainings(args: argparse.Namespace, corpus: Corpus) -> tuple[Training, dict[str, Training]]:
    """Traces the teacher's training, and those of the students by their folder in the run's."""
    student, teacher = (options.model_of(args, corpus.vocab_size, prefix) for prefix in ("", "teacher_"))
    learning, end, jliger_head = TrainingConfig.of(args), corpus.end_of_text, options.jliger_head(args)
    teaching = replace(learning, steps=args.teacher_steps, learning_rate=args.teacher_learning_rate)
    heldout = heldout_batches(corpus.heldout, learning.batch_size, learning.length, args.eval_batches)
    # The cached teacher lies under a hash of everything that shapes it.
    key = hash_of(json.dumps([CACHE_VERSION, corpus.digest, asdict(teacher), asdict(teaching)]).encode())
    loss_fn, evaluate = language_model_loss(jliger_head, teacher, end), evaluation(teacher, jliger_head, heldout, end)
    folder = args.cache_dir / f"teacher-{key}"
    of_teacher = text_training(TEACHER, folder, loss_fn, teacher, teaching, corpus.train, evaluate=evaluate)

    evaluate, students = evaluation(student, jliger_head, heldout, end), {}
    text = corpus.train[: args.student_tokens]

    def add(name: str, folder: str, loss_fn: Callable[..., Any], *given: Tree) -> None:
        out = args.out / folder
        students[folder] = text_training(name, out, loss_fn, student, learning, text, *given, evaluate=evaluate)

    add(STUDENTS[ALONE], ALONE, language_model_loss(jliger_head, student, end))
    config = DistillationConfig(args.divergence, args.beta, args.temperature, args.hard_weight)
    for head in options.heads_of(args):
        loss_fn = Distillation(head, student, teacher, config, end)
        params = of_teacher.program.abstract_state["parameters"]
        add(f"{STUDENTS[DISTILLED]}, {head.name}", f"{DISTILLED}/{head.name}", loss_fn, params)
    if args.teacher_top_k is not None:
        shape = (learning.batch_size, learning.length, args.teacher_top_k)
        batch = {"ids": jax.ShapeDtypeStruct(shape, np.int32), "logprobs": jax.ShapeDtypeStruct(shape, np.float32)}
        loss_fn = TopKDistillation(jliger_head, student, config, end)
        create, optimizer = partial(learning.initial_parameters, student), learning.optimizer(student)
        program = build_program(loss_fn, create, optimizer, {"tokens": learning.tokens(), **batch})
        students[TOP_K] = Training(STUDENTS[TOP_K], args.out / TOP_K, program, evaluate=evaluate)
    return of_teacher, students


def train_teacher(teacher: Training, args: argparse.Namespace) -> Tree:
    """The teacher's parameters, from the cache if it is there."""
    try:
        train([teacher], args, args.teacher_steps)
    except CheckpointError:
        shutil.rmtree(teacher.folder)
        train([teacher], args, args.teacher_steps)
    if teacher.start == args.teacher_steps:
        runs.say(f"teacher: from {teacher.folder}")
    return teacher.state["parameters"]


def use_top_k(training: Training, args: argparse.Namespace, corpus: Corpus, teacher: Training, params: Tree) -> Record:
    """Gives a student's training its batches, from files that are written first if they are not there.

    Returns how many bytes they have, and how many seconds the teacher took.
    """
    config, head = options.model_of(args, corpus.vocab_size, "teacher_"), options.jliger_head(args)
    rows = windows(corpus.train[: args.student_tokens], args.length)

    @jax.jit
    def top_k(params: Tree, tokens: jax.Array) -> jliger.LinearTopK:
        inputs, _, where = inputs_and_labels(tokens, corpus.end_of_text)
        hidden, kernel, own = head.last_layer(config, params, inputs)
        return jliger.linear_top_k(hidden, kernel, args.teacher_top_k, where=where, temperature=args.temperature, **own)

    header = {"model": f"{teacher.folder.name}, {parameter_count(config):,} parameters", "k": args.teacher_top_k}
    header |= {"tokenizer": hash_of(corpus.tokenizer.to_str().encode()), "text": hash_of(rows.tobytes())}
    header |= {"length": args.length, "temperature": args.temperature}
    folder = args.top_k_dir or args.cache_dir / f"top-k-{hash_of(json.dumps(header).encode())}"
    if teacher_top_k.read(folder, header) is None:
        teacher_top_k.write(folder, header, rows, partial(top_k, params), args.batch_size, quiet=args.no_progress)
    stored, arrays = teacher_top_k.read(folder, header)
    runs.say(f"teacher's top {args.teacher_top_k}: from {folder}")
    # Rows by number, in the order of the other students.
    order = Batches(np.arange(len(rows)), args.batch_size, args.seed)

    def next_batch(step: int, params: Tree) -> Tree:
        places = order[step - 1]
        return {"tokens": rows[places], **{name: array[places] for name, array in arrays.items()}}

    training.next_batch = next_batch
    return {"bytes": sum(array.nbytes for array in arrays.values()), "seconds": stored["seconds"]}


def report_of(students: Mapping[str, Events], heads: Mapping[str, Events], summary: Record) -> list[str]:
    """Who learned from what, what the student has of its teacher, and how much memory the step takes."""
    models = summary["models"]
    titles = {TEACHER: TEACHER} | {name: f"student, {title}" for name, title in STUDENTS.items()}
    columns = {"": lambda model: titles[model["name"]]}
    names = ("parameters", "steps", "tokens_per_step", "tokens")
    columns |= {name.replace("_", " "): reporting.number(name, ",") for name in names}
    columns |= {f"held-out {name}": reporting.number(f"heldout/{name}", ".4f") for name in ("loss", "accuracy")}
    columns |= {"ms a step": reporting.number("step_seconds", ".0f", 1e-3)}
    title, form = "The student's held-out loss, nats per token", {"digits": 4, "difference": "+.4f"}
    change = models[DISTILLED]["heldout"]["loss"] - models[ALONE]["heldout"]["loss"]
    parts = [
        reporting.table_of([{"name": name, **model} for name, model in models.items()], columns),
        reporting.curve_table(students, title, "eval", titles=STUDENTS, lines=11, **form),
        f"With the teacher the student's held-out loss is {'lower' if change < 0 else 'NOT lower'}: {change:+.4f} nats "
        "after the last step.",
        f"The training with the teacher, by last layer. {reporting.curve_table(heads)}",
        *reporting.summary_parts(summary, CURVE_TOLERANCE[summary["dtype"]]),
    ]
    if TOP_K in models:
        (own, whole), stored = (models[name] for name in (TOP_K, DISTILLED)), summary["top_k"]
        change, time = (
            own["heldout"]["loss"] / whole["heldout"]["loss"] - 1,
            own["step_seconds"] / whole["step_seconds"],
        )
        memory, temporary = (own["memory_bytes"][kind] / whole["memory_bytes"][kind] for kind in ("total", "temporary"))
        parts.append(
            f"The {stored['k']} largest log-probabilities of each token are {stored['bytes'] / 1e6:.1f} MB on disk and "
            f"took {stored['seconds']:.1f} s. With them the held-out loss is {abs(change):.2%} "
            f"{'above' if change >= 0 else 'below'} that with the whole teacher, and a step takes {time:.0%} of the "
            f"time, {memory:.0%} of the memory ({temporary:.0%} of the temporary memory)."
        )
    return parts


def students_panel(students: Mapping[str, Events], teacher: Record, axes: Axes) -> None:
    """The held-out curves of both students, and the teacher's last loss."""
    for (name, events), color in zip(students.items(), ("tab:gray", "tab:green", "tab:purple"), strict=False):
        steps = sorted(events["eval"])
        axes.plot(steps, [events["eval"][step]["loss"] for step in steps], ".-", color=color, label=STUDENTS[name])
    label = f"the teacher, after its {teacher['steps']} steps"
    axes.axhline(teacher["heldout"]["loss"], color="black", linestyle=":", label=label)
    axes.set(title="Held-out loss", xlabel="step", ylabel="cross entropy (nats per token)")
    # Room for the legend below the teacher's line.
    axes.margins(y=0.4)
    axes.legend(loc="lower left")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("distill", __doc__)
    options.add_corpus_options(parser)
    options.add_model_options(parser, "The student's. The teacher has the same kind of last layer and the same dtype.")

    text = "Data, batches, warmup, weight decay and seed are the student's."
    add = parser.add_argument_group("teacher", text).add_argument
    add("--teacher-hidden-size", type=COUNT, default=128, metavar="N", help="size of a hidden state (%(default)s)")
    add("--teacher-layers", type=COUNT, default=2, metavar="N", help="layers (%(default)s)")
    add("--teacher-heads", type=COUNT, default=4, metavar="N", help="attention heads per layer (%(default)s)")
    add("--teacher-steps", type=COUNT, default=200, metavar="N", help="optimizer steps (%(default)s)")
    add("--teacher-learning-rate", type=NUMBER, default=2e-3, metavar="X", help="the highest (%(default)s)")

    add = parser.add_argument_group("distillation").add_argument
    add("--divergence", choices=["forward", "reverse", "jsd"], default="forward", help="from the teacher (%(default)s)")
    add("--beta", type=NUMBER, default=0.5, metavar="X", help="the teacher's share in jsd's mixture (%(default)s)")
    add("--temperature", type=NUMBER, default=1.0, metavar="X", help="of both models' logits (%(default)s)")
    add("--hard-weight", type=NUMBER_OR_ZERO, default=0.5, metavar="X", help="share of the labels (%(default)s)")
    add(
        "--teacher-top-k",
        type=COUNT,
        metavar="K",
        help="also distill from the K largest log-probabilities (at most 256)",
    )
    add("--top-k-dir", type=Path, metavar="DIR", help="keeps them (default: a folder in --cache-dir)")
    add("--student-tokens", type=COUNT, default=49152, metavar="N", help="of the text, for the students (%(default)s)")

    # At this vocabulary, what fits the device would be the whole batch.
    options.add_training_options(parser, chunk_size=128)
    options.add_eval_options(options.add_run_options(parser, "runs/distill", checkpoint_every=50), 20, 4)
    # About three minutes on two CPU cores.
    parser.set_defaults(max_bytes=2_000_000, vocab_size=8192, hidden_size=32, heads=2, steps=100, learning_rate=4e-3)
    args = parser.parse_args(argv)
    options.check(parser, args, "teacher_steps")
    options.check_size(parser, args, "teacher-")
    if args.beta >= 1:
        parser.error(f"--beta {args.beta}: must be below 1; its limit there is --divergence reverse")
    if args.teacher_top_k is not None and (args.teacher_top_k > 256 or args.divergence != "forward"):
        parser.error(f"--teacher-top-k {args.teacher_top_k}: must be at most 256, with --divergence forward")
    if args.hard_weight > 1:
        parser.error(f"--hard-weight {args.hard_weight}: must be at most 1, which is labels alone")
    return args


def run(args: argparse.Namespace) -> None:
    corpus = options.corpus_of(args)
    if (args.teacher_top_k or 1) > corpus.vocab_size:
        raise RunError(f"--teacher-top-k {args.teacher_top_k}: the vocabulary has {corpus.vocab_size} tokens")
    # Whatever can be refused is refused before the folder is changed.
    teacher, trainings = build_trainings(args, corpus)
    student = options.model_of(args, corpus.vocab_size)
    # What shapes the curves: a run is only resumed with the same values.
    names = ("student_tokens", "divergence", "beta", "temperature", "hard_weight")
    own = {name: value for name, value in vars(args).items() if name in names or name.startswith("teacher_")}
    settings = {"corpus": corpus.digest, **asdict(student), **asdict(TrainingConfig.of(args)), **own}
    runs.open_folder(args, settings, (ALONE, DISTILLED, TOP_K), corpus.tokenizer)
    params, top_k = train_teacher(teacher, args), {}
    for folder, training in trainings.items():
        if folder == TOP_K:
            top_k = {"top_k": {"k": args.teacher_top_k, **use_top_k(training, args, corpus, teacher, params)}}
        elif folder != ALONE:
            training.given = (params,)
    train(list(trainings.values()), args, args.steps)

    heads = runs.read_heads(args.out / DISTILLED)
    # Of two heads, the last one's student stands for both.
    students = {folder.partition("/")[0]: runs.read_metrics(each.folder) for folder, each in trainings.items()}
    about = {"parameters": parameter_count(student), "tokens_per_step": args.batch_size * args.length}
    about["tokens"] = min(args.student_tokens, len(corpus.train))
    models = {name: {**about, **reporting.figures_of(events)} for name, events in students.items()}
    about |= {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), "tokens": len(corpus.train)}
    about |= reporting.figures_of(runs.read_metrics(teacher.folder))
    models = {TEACHER: {**about, "heldout": teacher.evaluate(params)}, **models}
    summary = {**reporting.summarize(heads, settings), "models": models, **top_k}
    panels = [partial(students_panel, students, models[TEACHER]), *reporting.comparison_panels(heads, summary)]
    reporting.report(args.out, summary, panels, report_of(students, heads, summary))


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("distill", run, parse_args(argv), "--resume continues from the latest checkpoint")


if __name__ == "__main__":
    main()
