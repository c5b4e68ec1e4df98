"""Teaches a small language model to close brackets by reward alone, with GRPO and with either head.

    python examples/grpo.py

The model begins at random. At each step it is given prompts such as `([{(`, and answers each several times; an answer's
reward is the share of brackets that it gets right, its advantage how far that is above its group's mean. The rewards
rise, with full logits and with jliger alike. docs/post_training.md has the options and says what a run leaves behind.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from brackets import OPENING, Brackets
from flax import nnx
from language_model import LanguageModel, ModelConfig
from matplotlib.figure import Figure
from options import (
    COUNT,
    NUMBER,
    NUMBER_OR_ZERO,
    add_head_options,
    add_model_options,
    check_head_options,
    check_size,
)
from post_training import Head, Tree, add_folder_options, finite, initial_state, trace_step
from reporting import (
    LAST_LOSS,
    Events,
    MetricsFile,
    Record,
    curve_table,
    draw_curves,
    draw_memory,
    heldout_row,
    read_metrics,
    save_figure,
    summarize,
    summary_table,
    write_json,
)
from runs import METRICS, SUMMARY, begin_folder, check_folder
from steps import compile_step
from tqdm import tqdm
from train_lm import HEADS, PLOT
from training import run_program

from jliger import LinearLogprobs, losses

# How far apart the two losses of a step may lie, and still be called one. A token's loss is about as large as an
# advantage, of order 1. Rounding grows from step to step, and the more, the surer the policy is of itself: there a
# small change of its parameters is a large one of an unlikely token's log-probability.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


# ---- loss ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyConfig:
    """What shapes the loss of completions."""

    temperature: float = 1.0
    beta: float = 0.0
    entropy_coef: float = 0.0


def group_advantages(rewards: np.ndarray, group: int) -> np.ndarray:
    """How far each reward is above the mean of its group, in standard deviations; a group's rewards are in a row."""
    groups = rewards.reshape(-1, group)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / (groups.std(axis=1, keepdims=True) + 1e-4)).reshape(-1)


def policy_loss(
    config: PolicyConfig, found: LinearLogprobs, where: jax.Array, batch: Tree
) -> tuple[jax.Array, losses.PolicyMetrics]:
    """Loss of completions, from what a head finds of their tokens `[B, T]`.

    The batch has `"advantages"` `[B]`, and log-probabilities `[B, T]`: `"old"`, under the policy that sampled, and, if
    `config.beta` is not 0, `"reference"`.
    """
    # An entropy that is only logged is no business of the backward pass.
    entropy = found.entropy if config.entropy_coef else jax.lax.stop_gradient(found.entropy)
    return losses.grpo(
        found.logprobs,
        batch["advantages"],
        where=where,
        old_logprobs=batch["old"],
        ref_logprobs=batch.get("reference"),
        entropy=entropy,
        loss_type="grpo",
        beta=config.beta,
        entropy_coef=config.entropy_coef,
    )


@dataclass(frozen=True)
class Policy:
    """Log-probabilities of completions and their loss, with one head."""

    head: Head
    config: PolicyConfig
    prompt_length: int

    def logprobs(self, model: LanguageModel, tokens: jax.Array) -> tuple[LinearLogprobs, jax.Array]:
        """Those `[B, T]` of the tokens after the first of `[B, T+1]`, and which of them are a completion's."""
        where = jnp.broadcast_to(jnp.arange(1, tokens.shape[1]) >= self.prompt_length, tokens[:, 1:].shape)
        temperature = self.config.temperature
        return self.head.of_model(model, tokens[:, :-1], tokens[:, 1:], where, temperature=temperature), where

    def __call__(self, model: LanguageModel, batch: Tree) -> tuple[jax.Array, losses.PolicyMetrics]:
        """Loss and metrics."""
        return policy_loss(self.config, *self.logprobs(model, batch["tokens"]), batch)


def complete(
    model: LanguageModel, prompts: jax.Array, length: int, choose: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Prompts `[B, P]` and completions of them, a token at a time: `[B, P + length]`.

    `choose` makes a token of float32 logits `[B, V]` and the number of the place that it is for.
    """

    def one(tokens: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
        # Attention is causal: what stands after the place, zeros as yet, doesn't matter.
        logits = model.logits(model(tokens)[:, place])
        return tokens.at[:, place + 1].set(choose(logits, place)), None

    tokens = jnp.pad(prompts, ((0, 0), (0, length)))
    return jax.lax.scan(one, tokens, prompts.shape[1] - 1 + jnp.arange(length))[0]


# ---- training --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingConfig:
    """What shapes the curve, beside model, task and loss: how much is sampled, and what is made of it."""

    steps: int
    prompts: int
    group: int
    updates: int
    learning_rate: float
    seed: int

    @property
    def batch_size(self) -> int:
        """Completions a step."""
        return self.prompts * self.group

    def optimizer(self) -> optax.GradientTransformation:
        """Adam, after gradients are clipped, with an epsilon that keeps it from making much of rounding errors."""
        schedule = optax.linear_schedule(self.learning_rate, self.learning_rate / 2, self.steps * self.updates)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))


@dataclass(frozen=True)
class Program:
    """One head's update, what makes a batch, and the likeliest answers; nothing of it has been compiled or run."""

    policy: Policy
    update: jax.stages.Traced
    sample: Callable[[nnx.State, np.ndarray, jax.Array], jax.Array]
    answer: Callable[[nnx.State, np.ndarray], jax.Array]
    logprobs: Callable[[nnx.State, jax.Array], jax.Array]


def build_program(
    policy: Policy,
    completion_length: int,
    config: TrainingConfig,
    graphdef: nnx.GraphDef[LanguageModel],
    parameters: nnx.State,
) -> Program:
    """Traces, from the parameters' shapes."""
    length = policy.prompt_length + completion_length
    of_tokens = jax.ShapeDtypeStruct((config.batch_size, length - 1), jnp.float32)
    batch = {
        "tokens": jax.ShapeDtypeStruct((config.batch_size, length), jnp.int32),
        "advantages": jax.ShapeDtypeStruct((config.batch_size,), jnp.float32),
        "old": of_tokens,
        **({"reference": of_tokens} if policy.config.beta else {}),
    }

    def sample(parameters: nnx.State, prompts: jax.Array, key: jax.Array) -> jax.Array:
        def choose(logits: jax.Array, place: jax.Array) -> jax.Array:
            return jax.random.categorical(jax.random.fold_in(key, place), logits / policy.config.temperature)

        return complete(nnx.merge(graphdef, parameters), prompts, completion_length, choose)

    def answer(parameters: nnx.State, prompts: jax.Array) -> jax.Array:
        return complete(
            nnx.merge(graphdef, parameters), prompts, completion_length, lambda logits, _: logits.argmax(axis=-1)
        )

    def logprobs(parameters: nnx.State, tokens: jax.Array) -> jax.Array:
        return policy.logprobs(nnx.merge(graphdef, parameters), tokens)[0].logprobs

    return Program(
        policy=policy,
        update=trace_step(policy, graphdef, config.optimizer(), parameters, batch),
        sample=jax.jit(sample),
        answer=jax.jit(answer),
        logprobs=jax.jit(logprobs),
    )


def batch_of(
    program: Program, tokens: np.ndarray, rewards: np.ndarray, parameters: nnx.State, begun_with: nnx.State, group: int
) -> Tree:
    """What an update needs of sampled tokens `[B, T+1]`."""
    batch = {
        "tokens": tokens,
        "advantages": group_advantages(rewards, group),
        "old": program.logprobs(parameters, tokens),
    }
    return batch | ({"reference": program.logprobs(begun_with, tokens)} if program.policy.config.beta else {})


def figures(loss: float, metrics: losses.PolicyMetrics) -> Record:
    """What is logged of a step's last update."""
    return {
        "loss": loss,
        "entropy": float(metrics.entropy),
        "old_kl": float(metrics.old_kl),
        "clip_fraction": float(metrics.clip_fraction_low + metrics.clip_fraction_high),
        **({} if metrics.kl is None else {"kl": float(metrics.kl)}),
    }


def train(
    program: Program,
    folder: Path,
    begun_with: nnx.State,
    task: Brackets,
    config: TrainingConfig,
    args: argparse.Namespace,
    replayed: Sequence[np.ndarray] = (),
) -> list[np.ndarray]:
    """Trains one head from the given parameters, which are the reference too; gives what it sampled, a batch a step.

    `replayed` is what another head sampled, to learn from that instead.
    """
    name = program.policy.head.name
    random, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    questions = task.prompts(args.eval_prompts, random)
    sampled = []
    compiled = compile_step(program.update.lower())
    state = initial_state(begun_with, config.optimizer())
    with (
        MetricsFile(folder / METRICS) as metrics,
        tqdm(total=config.steps, desc=name, unit="step", disable=args.no_progress) as bar,
    ):

        def evaluate(step: int) -> None:
            tokens = np.asarray(program.answer(state["parameters"], questions))
            rewards = task.rewards(tokens)
            metrics.write(
                "eval",
                step,
                reward=float(rewards.mean()),
                solved=float(np.mean(rewards == 1)),
                answers=[task.text(answer) for answer in tokens[:3]],
            )

        metrics.write("compiled", 0, **compiled.record())
        evaluate(0)
        for step in range(1, config.steps + 1):
            if replayed:
                tokens = replayed[step - 1]
            else:
                prompts = np.repeat(task.prompts(config.prompts, random), config.group, axis=0)
                tokens = np.asarray(program.sample(state["parameters"], prompts, jax.random.fold_in(key, step)))
            sampled.append(tokens)
            rewards = task.rewards(tokens)
            batch = batch_of(program, tokens, rewards, state["parameters"], begun_with, config.group)
            began = time.perf_counter()
            for _ in range(config.updates):
                state, (loss, found) = compiled.step(state, batch)
            record = figures(finite(loss, name, step), found)
            seconds = time.perf_counter() - began
            reward = float(rewards.mean())
            metrics.write("train", step, reward=reward, **record, tokens=tokens.size, seconds=seconds)
            bar.set_postfix(reward=f"{reward:.3f}", refresh=False)
            bar.update()
            if step % args.eval_every == 0 or step == config.steps:
                evaluate(step)
    return sampled


# ---- the run ---------------------------------------------------------------------------------------------------


def compare(full: Events, fused: Events, tolerance: float) -> Record:
    """How far apart two runs are that learnt from the same completions, and for how many steps they are one."""

    def differences(event: str, figure: str) -> dict[int, float]:
        return {step: abs(record[figure] - fused[event][step][figure]) for step, record in full[event].items()}

    of_losses = differences("train", "loss")
    return {
        "largest_difference": max(of_losses.values()),
        "largest_difference_of_entropies": max(differences("train", "entropy").values()),
        "largest_difference_of_evaluations": max(differences("eval", "reward").values()),
        "agreeing_steps": sum(1 for _ in takewhile(lambda difference: difference <= tolerance, of_losses.values())),
    }


def plot(runs: dict[str, Events], summary: Record, path: Path) -> None:
    """Writes rewards, right answers and entropy against the step, and the memory of an update."""
    figure = Figure(figsize=(19, 4.5), layout="constrained")
    reward, solved, entropy, memory = figure.subplots(1, 4)
    for axes, event, name, title in (
        (reward, "train", "reward", "Mean reward of sampled answers"),
        (solved, "eval", "solved", "Share of likeliest answers that are all right"),
        (entropy, "train", "entropy", "Entropy of a token, nats"),
    ):
        draw_curves(axes, runs, event, name)
        axes.set(title=title, xlabel="step")
    reward.legend()
    draw_memory(memory, summary)
    save_figure(figure, path)


def report(runs: dict[str, Events], summary: Record) -> str:
    """What was learnt, and what the head makes of the step's memory."""
    run = next(iter(runs.values()))
    first, last = (run["train"][choose(run["train"])]["reward"] for choose in (min, max))
    before, after = (run["eval"][choose(run["eval"])] for choose in (min, max))
    parts = [
        curve_table(runs, "Mean reward of sampled answers", figure="reward", digits=4),
        curve_table(runs, "Share of likeliest answers that are all right", "eval", "solved", digits=4),
        curve_table(runs, "Loss"),
        summary_table(summary, [LAST_LOSS, heldout_row("likeliest answers, all right", "solved", "{:.4f}")]),
        f"The mean reward went from {first:.4f} to {last:.4f}. Of the likeliest answers {before['solved']:.4f} were "
        f"all right at first ({'  '.join(before['answers'])}), and {after['solved']:.4f} at last "
        f"({'  '.join(after['answers'])}).",
    ]
    if "comparison" in summary:
        found, tolerance = summary["comparison"], LOSS_TOLERANCE[summary["dtype"]]
        agreeing, steps = found["agreeing_steps"], found["steps"]
        how_long = f"all {steps} steps" if agreeing == steps else f"the first {agreeing} of {steps} steps"
        parts.append(
            f"From the same completions the losses agree within {tolerance:.0e} for {how_long}. Rounding grows in "
            f"training by reward: at most they differ by {found['largest_difference']:.1e}, the entropies by "
            f"{found['largest_difference_of_entropies']:.1e}, the rewards of the likeliest answers by "
            f"{found['largest_difference_of_evaluations']:.1e}."
        )
    return "\n\n".join(["", *parts])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line; a bad argument ends the program with a message."""
    parser = argparse.ArgumentParser(prog="grpo", description=(__doc__ or "").partition("\n")[0])
    group = parser.add_argument_group("task")
    add = group.add_argument
    add("--depth", type=COUNT, default=3, metavar="N", help="brackets to close (%(default)s)")
    add("--kinds", type=COUNT, default=3, metavar="N", help="kinds of brackets (%(default)s)")
    add("--vocab-size", type=COUNT, default=2048, metavar="N", help="tokens; the task needs few (%(default)s)")

    add_model_options(parser)

    group = parser.add_argument_group("training")
    add_head_options(group, HEADS)
    add = group.add_argument
    add("--steps", type=COUNT, default=80, metavar="N", help="times to sample (%(default)s)")
    add("--prompts", type=COUNT, default=32, metavar="N", help="prompts each time (%(default)s)")
    add("--group", type=COUNT, default=16, metavar="N", help="completions of a prompt (%(default)s)")
    add("--updates", type=COUNT, default=2, metavar="N", help="optimizer steps on what was sampled (%(default)s)")
    add("--temperature", type=NUMBER, default=1.0, metavar="X", help="of sampling and loss (%(default)s)")
    add("--beta", type=NUMBER_OR_ZERO, default=0.0, metavar="X", help="of the divergence from the start (%(default)s)")
    add("--entropy-coef", type=NUMBER_OR_ZERO, default=0.02, metavar="X", help="of an entropy bonus (%(default)s)")
    add("--learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the first, of Adam (%(default)s)")

    add = add_folder_options(parser, Path("runs/grpo")).add_argument
    add("--eval-every", type=COUNT, default=10, metavar="N", help="steps between evaluations (%(default)s)")
    add("--eval-prompts", type=COUNT, default=128, metavar="N", help="prompts of an evaluation (%(default)s)")
    parser.set_defaults(hidden_size=64)
    args = parser.parse_args(argv)
    check_size(parser, args.hidden_size, args.heads)
    check_head_options(parser, args)
    if args.kinds > len(OPENING):
        parser.error(f"--kinds {args.kinds}: there are {len(OPENING)}")
    if args.vocab_size < (needed := Brackets(args.depth, args.kinds).tokens):
        parser.error(f"--vocab-size {args.vocab_size}: the task needs {needed}")
    if args.group < 2:
        parser.error(f"--group {args.group}: an advantage is over others of its group, of 2 or more")
    return args


def run(args: argparse.Namespace) -> None:
    """Training with each head, report."""
    began = time.perf_counter()
    task = Brackets(args.depth, args.kinds)
    model_config = ModelConfig(
        args.vocab_size, args.hidden_size, args.layers, args.heads, args.tie_embeddings, args.dtype
    )
    policy_config = PolicyConfig(args.temperature, args.beta, args.entropy_coef)
    config = TrainingConfig(args.steps, args.prompts, args.group, args.updates, args.learning_rate, args.seed)
    settings = {**asdict(task), **asdict(model_config), **asdict(policy_config), **asdict(config)}
    # Everything that can be refused is refused before the folder is touched.
    graphdef, parameters = nnx.split(LanguageModel(model_config, nnx.Rngs(config.seed)))
    heads = HEADS if args.head == "both" else (args.head,)
    policies = [
        Policy(Head(head, args.implementation, args.chunk_size), policy_config, args.depth + 1) for head in heads
    ]
    programs = {
        policy.head.name: build_program(policy, args.depth, config, graphdef, parameters) for policy in policies
    }
    check_folder(args.out, settings, resume=None, overwrite=args.overwrite)
    begin_folder(args.out, settings, (*HEADS, SUMMARY, PLOT))
    device = jax.devices()[0]
    print(f"device: {device.platform} ({device.device_kind}), JAX {jax.__version__}")
    sampled: list[np.ndarray] = []
    for head, program in programs.items():
        # Of two heads the second learns from what the first sampled. A sampled token is a decision: if each sampled for
        # itself, they would part where rounding turns one, and from then on only resemble each other.
        sampled = train(program, args.out / head, parameters, task, config, args, replayed=sampled)
    runs = {head: read_metrics(args.out / head / METRICS) for head in programs}
    found = summarize(runs)
    if len(runs) == 2:
        found["comparison"] |= compare(runs["full"], runs["jliger"], LOSS_TOLERANCE[args.dtype])
    summary = {"device": device.device_kind, "jax": jax.__version__, **settings, **found}
    write_json(args.out / SUMMARY, summary)
    plot(runs, summary, args.out / PLOT)
    print(report(runs, summary))
    print(f"{time.perf_counter() - began:.0f} s in all; metrics, {SUMMARY} and {PLOT} are in {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run_program("grpo", run, parse_args(argv), "--overwrite begins anew")


if __name__ == "__main__":
    main()
