"""Teaches a small language model to close brackets by reward alone, with GRPO and with either head.

    python examples/grpo.py

The model begins at random. At each step it gets prompts such as `([{(` and answers each several times. The reward of an
answer is the share of brackets that are right, its advantage the distance from its group's mean. The rewards rise, with
full logits and with jliger alike. docs/post_training.md says what a run leaves behind.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import reporting
import runs
from language_model import HEADS, Head
from llama import LlamaConfig, Tree, full_logits, hidden_states, initial_parameters
from options import COUNT, NUMBER, NUMBER_OR_ZERO
from runs import Events, Record
from training import Program, Training, build_program, train

from jliger import LinearLogprobs, losses
from jliger.accumulation import AccumulatedLoss

OPENING, CLOSING, END = "([{<", ")]}>", "="
# How far apart the two losses of a step may be, to be called the same. A token's loss is about as large as an
# advantage, of order 1. Rounding errors grow from step to step, faster as the policy gets more certain: then a small
# change of its parameters is a large one of an unlikely token's log-probability.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Brackets:
    """Prompts of `depth` opening brackets and `=`; an answer closes them, the last one first.

    Tokens are the opening brackets, the closing ones, `=`, and any others that a vocabulary has.
    """

    depth: int
    kinds: int

    @property
    def tokens(self) -> int:
        return 2 * self.kinds + 1

    def prompts(self, count: int, random: np.random.Generator) -> np.ndarray:
        """`[count, depth + 1]` tokens."""
        brackets = random.integers(0, self.kinds, (count, self.depth))
        return np.pad(brackets, ((0, 0), (0, 1)), constant_values=2 * self.kinds).astype(np.int32)

    def rewards(self, tokens: np.ndarray) -> np.ndarray:
        """The share of brackets that are right, `[count]`, in prompts with completions `[count, 2 * depth + 1]`."""
        opening, completions = tokens[:, : self.depth], tokens[:, self.depth + 1 :]
        return np.mean(opening[:, ::-1] + self.kinds == completions, axis=1, dtype=np.float32)

    def text(self, tokens: np.ndarray) -> str:
        """Tokens as text, with `·` for those that are not the task's."""
        names = OPENING[: self.kinds] + CLOSING[: self.kinds] + END
        return "".join(names[token] if token < len(names) else "·" for token in tokens)


@dataclass(frozen=True)
class GrpoConfig:
    """What shapes the curve, apart from model and task: the loss, and how much is sampled and learned from."""

    temperature: float = 1.0
    beta: float = 0.0
    entropy_coef: float = 0.0
    steps: int = 1
    prompts: int = 1
    group: int = 2
    updates: int = 1
    learning_rate: float = 1e-3
    seed: int = 0

    def optimizer(self) -> optax.GradientTransformation:
        """Adam after clipping, with an epsilon that keeps it from amplifying rounding errors."""
        schedule = optax.linear_schedule(self.learning_rate, self.learning_rate / 2, self.steps * self.updates)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))


def group_advantages(rewards: np.ndarray, group: int) -> np.ndarray:
    """Each reward's distance from the mean of its group, in standard deviations; a group's rewards are consecutive."""
    groups = rewards.reshape(-1, group)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / (groups.std(axis=1, keepdims=True) + 1e-4)).reshape(-1)


@dataclass(frozen=True)
class Policy:
    """Log-probabilities of completions and their loss, with one head."""

    head: Head
    model: LlamaConfig
    config: GrpoConfig
    prompt_length: int

    @partial(jax.jit, static_argnums=0)
    def logprobs(self, params: Tree, tokens: jax.Array) -> LinearLogprobs:
        """Those `[B, T]` of the tokens after the first of `[B, T+1]`; 0 for the prompt's."""
        options = {"where": self.where(tokens), "temperature": self.config.temperature}
        return self.head.logprobs(self.model, params, tokens[:, :-1], tokens[:, 1:], **options)

    def where(self, tokens: jax.Array) -> jax.Array:
        """Which of the tokens after the first belong to a completion."""
        return jnp.broadcast_to(jnp.arange(1, tokens.shape[1]) >= self.prompt_length, tokens[:, 1:].shape)

    def program(self, completion_length: int) -> Program:
        count, length = self.config.prompts * self.config.group, self.prompt_length + completion_length
        logprobs = jax.ShapeDtypeStruct((count, length - 1), jnp.float32)
        batch = {"tokens": jax.ShapeDtypeStruct((count, length), jnp.int32), "old": logprobs}
        batch |= {"advantages": jax.ShapeDtypeStruct((count,), jnp.float32)}
        batch |= {"reference": logprobs} if self.config.beta else {}
        create = partial(initial_parameters, self.model, jax.random.key(self.config.seed))
        return build_program(self, create, self.config.optimizer(), batch)

    def __call__(self, params: Tree, batch: Tree) -> tuple[jax.Array, float, losses.PolicyMetrics]:
        """The loss of completions, its weight, and metrics.

        The batch has `"tokens"` `[B, T+1]`, `"advantages"` `[B]`, and log-probabilities `[B, T]`: `"old"`, of the
        policy that sampled, and, if `config.beta` is not 0, `"reference"`.
        """
        tokens, advantages, config = batch["tokens"], batch["advantages"], self.config
        given = {"old_logprobs": batch["old"], "ref_logprobs": batch.get("reference"), "where": self.where(tokens)}
        given |= {"beta": config.beta, "entropy_coef": config.entropy_coef, "loss_type": "grpo"}
        if self.head.name == "jliger":
            hidden, kernel, how = self.head.last_layer(self.model, params, tokens[:, :-1])
            given |= {"entropy_metric": True, "temperature": config.temperature}
            loss, metrics = losses.fused_linear_grpo(hidden, kernel, tokens[:, 1:], advantages, **given, **how)
        else:
            result = self.logprobs(params, tokens)
            # If the entropy is only logged, the backward pass need not compute it.
            entropy = result.entropy if config.entropy_coef else jax.lax.stop_gradient(result.entropy)
            loss, metrics = losses.grpo(result.logprobs, advantages, entropy=entropy, **given)
        return loss, 1.0, metrics


@partial(jax.jit, static_argnums=(0, 3))
def sample(policy: Policy, params: Tree, prompts: jax.Array, length: int, key: jax.Array | None = None) -> jax.Array:
    """Prompts `[B, P]` with random completions, or the likeliest ones without a key: `[B, P + length]`."""

    def add_token(tokens: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
        # Attention is causal: the zeros after this position do not matter.
        hidden = hidden_states(policy.model, params, tokens)[:, place]
        logits = full_logits(policy.model, params, hidden) / policy.config.temperature
        chosen = logits.argmax(-1) if key is None else jax.random.categorical(jax.random.fold_in(key, place), logits)
        return tokens.at[:, place + 1].set(chosen), None

    tokens = jnp.pad(prompts, ((0, 0), (0, length)))
    return jax.lax.scan(add_token, tokens, prompts.shape[1] - 1 + jnp.arange(length))[0]


class Sampler:
    """Makes batches: prompts, completions, rewards, and the log-probabilities that the loss needs.

    Both heads learn from the completions of the first. A sampled token is a decision: if each head sampled for itself,
    rounding would change a token sooner or later, and from then on the two would only resemble each other.
    """

    def __init__(self, task: Brackets, config: GrpoConfig, begun_with: Tree) -> None:
        self.task, self.config, self.begun_with = task, config, begun_with
        self.last: tuple[int, np.ndarray] = (0, np.empty(0))

    def batch(self, policy: Policy, step: int, params: Tree) -> Tree:
        if self.last[0] != step:
            random = np.random.default_rng([self.config.seed, step])
            prompts = np.repeat(self.task.prompts(self.config.prompts, random), self.config.group, axis=0)
            key = jax.random.fold_in(jax.random.key(self.config.seed), step)
            self.last = step, np.asarray(sample(policy, params, prompts, self.task.depth, key))
        tokens = self.last[1]
        advantages = group_advantages(self.task.rewards(tokens), self.config.group)
        batch = {"tokens": tokens, "advantages": advantages, "old": policy.logprobs(params, tokens).logprobs}
        if policy.config.beta:
            batch["reference"] = policy.logprobs(self.begun_with, tokens).logprobs
        return batch

    def figures(self, results: Sequence[AccumulatedLoss], batch: Tree, seconds: float) -> Record:
        """What is logged of a step's last update."""
        del seconds
        metrics = results[-1].aux
        figures = {"reward": self.task.rewards(batch["tokens"]).mean(), "entropy": metrics.entropy}
        figures |= {"old_kl": metrics.old_kl, "clip_fraction": metrics.clip_fraction_low + metrics.clip_fraction_high}
        figures |= {} if metrics.kl is None else {"kl": metrics.kl}
        return {name: float(figure) for name, figure in figures.items()}


def evaluate(policy: Policy, task: Brackets, questions: np.ndarray, params: Tree) -> Record:
    tokens = np.asarray(sample(policy, params, questions, task.depth))
    rewards = task.rewards(tokens)
    answers = [task.text(each) for each in tokens[:3]]
    return {"reward": float(rewards.mean()), "solved": float(np.mean(rewards == 1)), "answers": answers}


def compare(full: Events, fused: Events, tolerance: float) -> Record:
    """How far apart two runs are that learned from the same completions, and for how many steps they are the same."""

    def apart(event: str, figure: str) -> list[float]:
        return [abs(record[figure] - fused[event][step][figure]) for step, record in full[event].items()]

    return {
        "agreeing_steps": sum(1 for _ in takewhile(lambda difference: difference <= tolerance, apart("train", "loss"))),
        "largest_difference_of_entropies": max(apart("train", "entropy")),
        "largest_difference_of_evaluations": max(apart("eval", "reward")),
    }


def report_of(events: dict[str, Events], summary: Record) -> list[str]:
    run = next(iter(events.values()))
    first, last = (run["train"][choose(run["train"])]["reward"] for choose in (min, max))
    before, after = (run["eval"][choose(run["eval"])] for choose in (min, max))
    solved = {"likeliest answers, all right": reporting.number("heldout/solved", ".4f")}
    parts = [
        reporting.curve_table(events, "Mean reward of sampled answers", figure="reward", digits=4),
        reporting.curve_table(events, "Share of likeliest answers that are all right", "eval", "solved", digits=4),
        reporting.curve_table(events, "Loss"),
        reporting.summary_table(summary, reporting.LAST_LOSS | solved),
        f"The mean reward went from {first:.4f} to {last:.4f}. Of the likeliest answers {before['solved']:.4f} were "
        f"all right at first ({'  '.join(before['answers'])}), and {after['solved']:.4f} at the end "
        f"({'  '.join(after['answers'])}).",
    ]
    if "comparison" in summary:
        result, tolerance = summary["comparison"], LOSS_TOLERANCE[summary["dtype"]]
        parts.append(
            f"From the same completions the losses agree within {tolerance:.0e} for the first "
            f"{result['agreeing_steps']} of {result['steps']} steps. Rounding errors grow in training by reward: at "
            f"most the losses differ by {result['largest_difference']:.1e}, the entropies by "
            f"{result['largest_difference_of_entropies']:.1e}, the rewards of the likeliest answers by "
            f"{result['largest_difference_of_evaluations']:.1e}."
        )
    return parts


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("grpo", __doc__)
    add = parser.add_argument_group("task").add_argument
    add("--depth", type=COUNT, default=3, metavar="N", help="brackets to close (%(default)s)")
    add("--kinds", type=COUNT, default=3, metavar="N", help="kinds of brackets (%(default)s)")
    add("--vocab-size", type=COUNT, default=2048, metavar="N", help="tokens; the task needs few (%(default)s)")
    options.add_model_options(parser)
    add = parser.add_argument_group("training").add_argument
    options.add_head_options(add)
    add("--steps", type=COUNT, default=80, metavar="N", help="times to sample (%(default)s)")
    add("--prompts", type=COUNT, default=32, metavar="N", help="prompts each time (%(default)s)")
    add("--group", type=COUNT, default=16, metavar="N", help="completions of a prompt (%(default)s)")
    add("--updates", type=COUNT, default=2, metavar="N", help="optimizer steps on each sample (%(default)s)")
    add("--temperature", type=NUMBER, default=1.0, metavar="X", help="of sampling and loss (%(default)s)")
    add("--beta", type=NUMBER_OR_ZERO, default=0.0, metavar="X", help="of the divergence from the start (%(default)s)")
    add("--entropy-coef", type=NUMBER_OR_ZERO, default=0.02, metavar="X", help="of an entropy bonus (%(default)s)")
    add("--learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the first, of Adam (%(default)s)")
    add = options.add_run_options(parser, "runs/grpo")
    add("--eval-every", type=COUNT, default=10, metavar="N", help="steps between evaluations (%(default)s)")
    add("--eval-prompts", type=COUNT, default=128, metavar="N", help="prompts of an evaluation (%(default)s)")
    parser.set_defaults(hidden_size=64)
    args = parser.parse_args(argv)
    options.check(parser, args)
    if args.kinds > len(OPENING):
        parser.error(f"--kinds {args.kinds}: there are {len(OPENING)}")
    if args.vocab_size < (needed := Brackets(args.depth, args.kinds).tokens):
        parser.error(f"--vocab-size {args.vocab_size}: the task needs {needed}")
    if args.group < 2:
        parser.error(f"--group {args.group}: an advantage compares the answers of a group, of 2 or more")
    return args


def run(args: argparse.Namespace) -> None:
    task, model = Brackets(args.depth, args.kinds), options.model_of(args, args.vocab_size)
    config = GrpoConfig(**{field.name: getattr(args, field.name) for field in fields(GrpoConfig)})
    settings = {**asdict(task), **asdict(model), **asdict(config)}
    sampler = Sampler(task, config, initial_parameters(model, jax.random.key(config.seed)))
    questions = task.prompts(args.eval_prompts, np.random.default_rng(config.seed))
    trainings = []
    for head in options.heads_of(args):
        policy = Policy(head, model, config, args.depth + 1)
        evaluation = partial(evaluate, policy, task, questions)
        batch, program = partial(sampler.batch, policy), policy.program(args.depth)
        training = Training(head.name, args.out / head.name, program, batch, evaluation, sampler.figures)
        trainings.append(replace(training, parts=lambda batch: [batch] * config.updates))
    runs.open_folder(args, settings, HEADS)
    train(trainings, args, config.steps)
    events = runs.read_heads(args.out)
    summary = reporting.summarize(events, settings)
    if len(events) == 2:
        summary["comparison"] |= compare(events["full"], events["jliger"], LOSS_TOLERANCE[args.dtype])
    panels = [
        reporting.curves_panel(events, "Mean reward of sampled answers", "reward"),
        reporting.curves_panel(events, "Share of likeliest answers that are all right", "solved", ("eval",)),
        reporting.curves_panel(events, "Entropy of a token, nats", "entropy"),
        partial(reporting.memory, summary),
    ]
    reporting.report(args.out, summary, panels, report_of(events, summary))


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("grpo", run, parse_args(argv))


if __name__ == "__main__":
    main()
