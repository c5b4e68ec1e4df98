"""Distills a larger language model into a smaller one, and trains the same small one without a teacher beside it.

    python examples/distill.py

The teacher learns from the whole text, the students from the beginning of it: one from the labels alone, one from
labels and teacher, under the same seed on the same batches. The latter is trained with full logits of both models and
with jliger, whose curves agree to rounding. docs/train_distill.md has the options and says what a run leaves behind.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import CheckpointError, Checkpoints
from corpus import Batches, Corpus, heldout_batches
from flax import nnx
from language_model import LanguageModel, ModelConfig
from matplotlib.figure import Figure
from options import (
    COUNT,
    NUMBER,
    NUMBER_OR_ZERO,
    add_corpus_options,
    add_model_options,
    add_run_options,
    add_training_options,
    check_options,
    check_size,
    corpus_of,
)
from reporting import (
    Events,
    Record,
    curve_table,
    draw_difference,
    draw_memory,
    read_metrics,
    save_figure,
    summarize,
    summary_table,
    table,
    verdict,
    write_json,
)
from runs import METRICS, SUMMARY, TOKENIZER, begin_folder, check_folder, inputs_and_labels
from train_lm import CURVE_TOLERANCE, HEADS, PLOT, jliger_loss
from training import Program, TrainingConfig, build_program, evaluate, run_program, train

from jliger import losses

# Folders in a run's own; that of the distilled student has one for each head.
TEACHER, ALONE, DISTILLED = "teacher", "alone", "distilled"
STUDENTS = {ALONE: "labels alone", DISTILLED: "with teacher"}
# Part of the cached teacher's key: to be raised when the same settings would give another teacher.
CACHE_VERSION = 1


# ---- loss ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillationConfig:
    """A token's loss: `hard_weight` of the cross entropy, the rest of the divergence times `temperature ** 2`."""

    divergence: str
    beta: float
    temperature: float
    hard_weight: float

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """As the command line has it."""
        return cls(args.divergence, args.beta, args.temperature, args.hard_weight)

    @property
    def soft_weight(self) -> float:
        """The divergence's gradients get smaller with the temperature's square, which this makes up for."""
        return (1 - self.hard_weight) * self.temperature**2


def full_loss(
    student: LanguageModel,
    tokens: jax.Array,
    teacher: nnx.State,
    *,
    graphdef: Any,
    config: DistillationConfig,
    end_of_text: int,
) -> jax.Array:
    """Mean loss the usual way: `[B, T, V]` logits of both models in memory."""
    inputs, labels, where = inputs_and_labels(tokens, end_of_text)
    z = student.full_logits(inputs)
    u = jax.lax.stop_gradient(nnx.merge(graphdef, teacher).full_logits(inputs))
    p, r = (jax.nn.log_softmax(logits / config.temperature) for logits in (z, u))
    if config.divergence == "forward":
        divergence = jnp.sum(jnp.exp(r) * (r - p), axis=-1)
    elif config.divergence == "reverse":
        divergence = jnp.sum(jnp.exp(p) * (p - r), axis=-1)
    else:
        m = jnp.logaddexp(jnp.log(config.beta) + r, jnp.log1p(-config.beta) + p)
        of_teacher, of_student = (jnp.sum(jnp.exp(q) * (q - m), axis=-1) for q in (r, p))
        divergence = config.beta * of_teacher + (1 - config.beta) * of_student
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(z, labels)
    loss = config.soft_weight * divergence + config.hard_weight * cross_entropy
    return jnp.sum(loss, where=where) / jnp.maximum(jnp.sum(where), 1)


def fused_loss(
    student: LanguageModel,
    tokens: jax.Array,
    teacher: nnx.State,
    *,
    graphdef: Any,
    config: DistillationConfig,
    end_of_text: int,
    **options: Any,
) -> jax.Array:
    """The same mean through jliger: the logits of both models exist a chunk at a time."""
    inputs, labels, where = inputs_and_labels(tokens, end_of_text)
    frozen = nnx.merge(graphdef, teacher)
    kernel, layout = student.last_layer()
    teacher_kernel, teacher_layout = frozen.last_layer()
    if config.divergence == "jsd":
        divergence = partial(losses.fused_linear_jsd, beta=config.beta)
    else:
        divergence = partial(losses.fused_linear_kl, direction=config.divergence)
    return divergence(
        student(inputs),
        kernel,
        frozen(inputs),
        teacher_kernel,
        temperature=config.temperature,
        labels=labels,
        hard_weight=config.hard_weight,
        soft_weight=config.soft_weight,
        where=where,
        student_kernel_layout=layout,
        teacher_kernel_layout=teacher_layout,
        **options,
    )


# ---- the steps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Programs:
    """The teacher's step, the student's without it, and the student's with it, by head."""

    teacher: Program
    alone: Program
    distilled: dict[str, Program]


def build_programs(args: argparse.Namespace, vocab_size: int, end_of_text: int) -> Programs:
    """Traces every step; the teacher's parameters are among the arguments of the student's with it."""
    student = ModelConfig(vocab_size, args.hidden_size, args.layers, args.heads, args.tie_embeddings, args.dtype)
    teacher = replace(
        student, hidden_size=args.teacher_hidden_size, layers=args.teacher_layers, heads=args.teacher_heads
    )
    learning = TrainingConfig.of(args)
    teaching = replace(learning, steps=args.teacher_steps, learning_rate=args.teacher_learning_rate)
    options = {"implementation": args.implementation, "chunk_size": args.chunk_size}
    labels_alone = partial(jliger_loss, end_of_text=end_of_text, **options)
    of_teacher = build_program(labels_alone, teacher, teaching, end_of_text, **options)
    shared = {"graphdef": of_teacher.graphdef, "config": DistillationConfig.of(args), "end_of_text": end_of_text}
    with_teacher = {"full": partial(full_loss, **shared), "jliger": partial(fused_loss, **shared, **options)}
    parameters = of_teacher.parameters_of(of_teacher.abstract_state)
    return Programs(
        teacher=of_teacher,
        alone=build_program(labels_alone, student, learning, end_of_text, **options),
        distilled={
            head: build_program(with_teacher[head], student, learning, end_of_text, parameters, **options)
            for head in (HEADS if args.head == "both" else (args.head,))
        },
    )


# ---- the teacher -----------------------------------------------------------------------------------------------


def trained_teacher(
    program: Program, corpus: Corpus, heldout: Sequence[np.ndarray], args: argparse.Namespace
) -> nnx.State:
    """The teacher's parameters: from the cache, under a hash of all that shapes them, or trained and put there."""
    key = [CACHE_VERSION, corpus.digest, asdict(program.model_config), asdict(program.config)]
    folder = args.cache_dir / f"teacher-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    parameters = read_teacher(folder, program.parameters_of(program.abstract_state))
    if parameters is not None:
        print(f"teacher: from {folder}")
        return parameters
    parameters = train("teacher", args.out / TEACHER, program, corpus.train, heldout, args)
    # Beside its place first: a killed run leaves no half teacher there.
    beside = folder.with_name(f".{os.getpid()}-{folder.name}")
    with Checkpoints(beside, keep=1) as checkpoints:
        checkpoints.save(program.config.steps, nnx.to_pure_dict(parameters), position=0)
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
    return parameters


def read_teacher(folder: Path, abstract: nnx.State) -> nnx.State | None:
    """The parameters in a folder of the cache, or None where there are none that can be read."""
    if not folder.is_dir():
        return None
    try:
        with Checkpoints(folder, keep=1) as checkpoints:
            restored = checkpoints.restore_latest(nnx.to_pure_dict(abstract))
    # A cache holds nothing that can't be made again.
    except CheckpointError:
        return None
    if restored is None:
        return None
    _, tree, _ = restored
    parameters = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(parameters, tree)
    return parameters


# ---- the report ------------------------------------------------------------------------------------------------


def heldout_table(students: Mapping[str, Events], lines: int = 11) -> str:
    """Held-out loss of each student at some ten steps."""
    curves = [events["eval"] for events in students.values()]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    shown = sorted({common[round(i * (len(common) - 1) / (lines - 1))] for i in range(lines)})
    rows = [["step", *(STUDENTS[name] for name in students), "difference"]]
    for step in shown:
        alone, distilled = (curve[step]["loss"] for curve in curves)
        rows.append([str(step), f"{alone:.4f}", f"{distilled:.4f}", f"{distilled - alone:+.4f}"])
    return "The student's held-out loss, nats per token\n" + table(rows)


def gain_of(students: Mapping[str, Events]) -> Record:
    """How much lower the distilled student's held-out loss is: after the last step, and each one's lowest."""
    alone, distilled = (
        [record["loss"] for _, record in sorted(students[name]["eval"].items())] for name in (ALONE, DISTILLED)
    )
    return {"last": alone[-1] - distilled[-1], "lowest": min(alone) - min(distilled)}


def model_summary(program: Program, tokens: np.ndarray, heldout: Record) -> Record:
    """How large a model is, what it learned from, and what came of it."""
    parameters = program.parameters_of(program.abstract_state)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        "steps": program.config.steps,
        "tokens_per_step": program.config.batch_size * program.config.length,
        "tokens": len(tokens),
        "heldout": heldout,
    }


def report(students: Mapping[str, Events], runs: Mapping[str, Events], summary: Record) -> str:
    """Who learned from what, what the student has of its teacher, and what the head makes of the step's memory."""
    gain = summary["gain"]
    rows = [["", "parameters", "steps", "tokens a step", "of", "held-out loss", "accuracy"]]
    for name, model in summary["models"].items():
        title = f"student, {STUDENTS[name]}" if name in STUDENTS else name
        sizes = [model[key] for key in ("parameters", "steps", "tokens_per_step", "tokens")]
        loss, accuracy = model["heldout"]["loss"], model["heldout"]["accuracy"]
        rows.append([title, *(f"{size:,}" for size in sizes), f"{loss:.4f}", f"{accuracy:.4f}"])
    better = "lower" if gain["last"] > 0 else "NOT lower"
    parts = [
        table(rows),
        heldout_table(students),
        f"With the teacher the student's held-out loss is {better}: {-gain['last']:+.4f} nats after the last step, "
        f"{-gain['lowest']:+.4f} at the lowest of each.",
        f"The training with the teacher, by last layer. {curve_table(runs)}",
        summary_table(summary),
    ]
    if "comparison" in summary:
        dtype = summary["settings"]["dtype"]
        parts.append(verdict(summary["comparison"], dtype, CURVE_TOLERANCE[dtype]))
    return "\n\n".join(["", *parts])


def plot(students: Mapping[str, Events], runs: Mapping[str, Events], summary: Record, path: Path) -> None:
    """Writes the held-out curves, the difference that the head makes, and the memory of the step."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    curves, difference, memory = figure.subplots(1, 3)
    for (name, events), color in zip(students.items(), ("tab:gray", "tab:green"), strict=True):
        steps = sorted(events["eval"])
        curves.plot(steps, [events["eval"][step]["loss"] for step in steps], ".-", color=color, label=STUDENTS[name])
    teacher = summary["models"][TEACHER]
    label = f"the teacher, after its {teacher['steps']} steps"
    curves.axhline(teacher["heldout"]["loss"], color="black", linestyle=":", label=label)
    curves.set(title="Held-out loss", xlabel="step", ylabel="cross entropy (nats per token)")
    # Room for the legend below the teacher's line.
    curves.margins(y=0.4)
    curves.legend(loc="lower left")
    draw_difference(difference, runs)
    draw_memory(memory, summary)
    save_figure(figure, path)


# ---- the run ---------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line; a bad argument ends the program with a message."""
    parser = argparse.ArgumentParser(prog="distill", description=(__doc__ or "").partition("\n")[0])
    add_corpus_options(parser)
    add_model_options(parser).description = "The student's; kind of last layer and dtype are the teacher's, too."

    group = parser.add_argument_group("teacher", "Data, batches, warmup, weight decay and seed are as the student's.")
    add = group.add_argument
    add("--teacher-hidden-size", type=COUNT, default=128, metavar="N", help="size of a hidden state (%(default)s)")
    add("--teacher-layers", type=COUNT, default=2, metavar="N", help="transformer blocks (%(default)s)")
    add("--teacher-heads", type=COUNT, default=4, metavar="N", help="attention heads per block (%(default)s)")
    add("--teacher-steps", type=COUNT, default=200, metavar="N", help="optimizer steps (%(default)s)")
    add("--teacher-learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the highest (%(default)s)")

    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add("--divergence", choices=["forward", "reverse", "jsd"], default="forward", help="from the teacher (%(default)s)")
    add("--beta", type=NUMBER, default=0.5, metavar="X", help="the teacher's share in jsd's mixture (%(default)s)")
    add("--temperature", type=NUMBER, default=1.0, metavar="X", help="of both models' logits (%(default)s)")
    add("--hard-weight", type=NUMBER_OR_ZERO, default=0.5, metavar="X", help="share of the labels (%(default)s)")
    add("--student-tokens", type=COUNT, default=49152, metavar="N", help="of the text, for the students (%(default)s)")

    # At this vocabulary what fits the device would be the whole batch.
    add_training_options(parser, HEADS, chunk_size=128)
    add_run_options(parser, Path("runs/distill"))
    # About two minutes of two CPU cores.
    parser.set_defaults(max_bytes=2_000_000, vocab_size=8192, hidden_size=32, heads=2)
    parser.set_defaults(steps=100, learning_rate=1e-2, eval_every=20, eval_batches=4)
    args = parser.parse_args(argv)
    check_options(parser, args, "teacher_steps")
    check_size(parser, args.teacher_hidden_size, args.teacher_heads, "teacher-")
    if args.beta >= 1:
        parser.error(f"--beta {args.beta}: must be below 1; --divergence reverse is what it nears there")
    if args.hard_weight > 1:
        parser.error(f"--hard-weight {args.hard_weight}: must be at most 1, which is labels alone")
    return args


def run(args: argparse.Namespace) -> None:
    """Corpus, teacher, students, report."""
    began = time.perf_counter()
    corpus = corpus_of(args)
    # Everything that can be refused is refused before the folder is touched.
    student_tokens = corpus.train[: args.student_tokens]
    Batches(student_tokens, args.batch_size, args.length, args.seed)
    programs = build_programs(args, corpus.vocab_size, corpus.end_of_text)
    # What shapes the curves: a run is only ever resumed under the same values.
    settings = {
        "corpus": corpus.digest,
        "student_tokens": args.student_tokens,
        **asdict(programs.alone.model_config),
        **asdict(programs.alone.config),
        **asdict(DistillationConfig.of(args)),
        **{name: value for name, value in vars(args).items() if name.startswith("teacher_")},
    }
    check_folder(args.out, settings, resume=args.resume, overwrite=args.overwrite)
    if not args.resume:
        begin_folder(args.out, settings, (TEACHER, ALONE, DISTILLED, TOKENIZER, SUMMARY, PLOT))
    corpus.tokenizer.save(str(args.out / TOKENIZER))
    device = jax.devices()[0]
    print(f"device: {device.platform} ({device.device_kind}), JAX {jax.__version__}")
    heldout = heldout_batches(corpus.heldout, args.batch_size, args.length, args.eval_batches)

    teacher = trained_teacher(programs.teacher, corpus, heldout, args)
    train(STUDENTS[ALONE], args.out / ALONE, programs.alone, student_tokens, heldout, args)
    for head, program in programs.distilled.items():
        name = f"{STUDENTS[DISTILLED]}, {head}"
        train(name, args.out / DISTILLED / head, program, student_tokens, heldout, args, teacher)

    # A head that an earlier call trained in this folder is part of the report.
    found = {head: read_metrics(args.out / DISTILLED / head / METRICS) for head in HEADS}
    runs = {head: events for head, events in found.items() if "compiled" in events}
    # Of two heads the last one's student stands for both.
    *_, head = programs.distilled
    students = {ALONE: read_metrics(args.out / ALONE / METRICS), DISTILLED: runs[head]}
    summary = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "settings": settings,
        "models": {
            TEACHER: model_summary(programs.teacher, corpus.train, evaluate(programs.teacher, teacher, heldout)),
            **{
                name: model_summary(programs.alone, student_tokens, events["eval"][args.steps])
                for name, events in students.items()
            },
        },
        "gain": gain_of(students),
        **summarize(runs),
    }
    write_json(args.out / SUMMARY, summary)
    plot(students, runs, summary, args.out / PLOT)
    print(report(students, runs, summary))
    elapsed = time.perf_counter() - began
    print(f"{elapsed:.0f} s in all; metrics, checkpoints, {SUMMARY} and {PLOT} are in {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run_program("distill", run, parse_args(argv))


if __name__ == "__main__":
    main()
