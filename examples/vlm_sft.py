"""Teaches a small vision-language model to read, with full logits and with jliger.

    python examples/vlm_sft.py

Pictures of words of the corpus are the images, the words, letter by letter, are the answers. The loss counts the
answers' tokens and no image's. The words that are read in an evaluation never occur in training. docs/vlm_sft.md
explains what the program prints and what a run leaves behind.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import takewhile

import decoder
import jax
import jax.numpy as jnp
import loading  # noqa: F401
import numpy as np
import optax
import options
import reporting
import runs
import vision
from corpus import read_documents
from decoder import DecoderConfig, Tree
from language_model import CURVE_TOLERANCE, HEADS, Head
from matplotlib.axes import Axes
from options import COUNT, NUMBER
from runs import Events, Record, RunError, say
from training import Program, Training, build_program, train
from vision import VisionConfig

import jliger

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BEGIN, END, IMAGE = (len(LETTERS) + i for i in range(3))
TOKENS = len(LETTERS) + 3
SHORTEST_WORD = 3


@dataclass(frozen=True)
class Reader:
    """The model, its task and its last layer: an image's tokens, the beginning of an answer, its letters, its end."""

    config: DecoderConfig
    vision: VisionConfig
    head: Head

    @property
    def length(self) -> int:
        return self.vision.tokens + self.vision.longest_word + 2

    def initial_parameters(self, seed: int) -> Tree:
        keys = jax.random.split(jax.random.key(seed))
        params = decoder.initial_parameters(self.config, keys[1])
        # Matrices begin with a deviation of 0.02. One over the root of the inputs is more for a model as narrow as this
        # one, which then learns much sooner where to look.
        more = self.config.hidden_size**-0.5 / 0.02
        described = decoder.layer_parameters(self.config)
        params["layers"] = {
            name: leaf * more if described[name].is_matrix else leaf for name, leaf in params["layers"].items()
        }
        return {"vision": vision.initial_encoder(self.vision, self.config.hidden_size, keys[0]), "decoder": params}

    def tokens_of(self, word: str) -> list[int]:
        text = [BEGIN, *map(LETTERS.index, word), END]
        tokens = [IMAGE] * self.vision.tokens + text
        return tokens + [END] * (self.length - len(tokens))

    def batch(self, words: Sequence[str], random: np.random.Generator) -> Tree:
        """Pictures `[B, height, width]` and tokens `[B, T]` of words."""
        return {
            "pixels": np.stack([vision.picture(self.vision, word, random) for word in words]),
            "tokens": np.asarray([self.tokens_of(word) for word in words], np.int32),
        }

    def labels(self, tokens: jax.Array) -> jax.Array:
        """The next token of `[B, T]` where it is a letter of the answer or its first end."""
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=IMAGE)
        return jliger.shift_labels(tokens, (tokens < len(LETTERS)) | ((tokens == END) & (before != END)))

    def positions(self, batch_size: int) -> jax.Array:
        """Column, row and time of each token `[3, B, T]`; a text's token has one number for all three."""
        rows, columns = self.vision.grid
        places = np.indices((1, rows, columns)).reshape(3, -1)[::-1]
        text = max(rows, columns) + np.arange(self.length - self.vision.tokens)
        own = np.concatenate([places, np.broadcast_to(text, (3, len(text)))], axis=1)
        return jnp.broadcast_to(own[:, None], (3, batch_size, self.length))

    def hidden_states(self, params: Tree, image: jax.Array, tokens: jax.Array) -> jax.Array:
        """Those of `[B, T]` tokens, where the first are an image's, `[B, N, H]` as encoded."""
        text = decoder.embeddings(self.config, params, tokens[:, self.vision.tokens :])
        inputs = jnp.concatenate([image.astype(text.dtype), text], axis=1)
        return decoder.hidden_states(self.config, params, inputs, positions=self.positions(len(inputs)))

    def __call__(self, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
        """The sum of the answers' token losses, and how many tokens they are."""
        labels = self.labels(batch["tokens"])
        image = vision.encode(self.vision, params["vision"], batch["pixels"])
        loss = decoder.loss_sum(
            self.head.name,
            self.config,
            params["decoder"],
            self.hidden_states(params["decoder"], image, batch["tokens"]),
            labels,
            implementation=self.head.implementation,
            chunk_size=self.head.chunk_size,
        )
        return loss, jnp.sum(labels >= 0)

    @partial(jax.jit, static_argnums=0)
    def read(self, params: Tree, pixels: jax.Array) -> jax.Array:
        """The likeliest answer to each image, a token at a time: `[B, longest word + 1]`."""

        def one(tokens: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
            # Attention is causal: the tokens after this position do not matter.
            hidden = self.hidden_states(params["decoder"], image, tokens)[:, place]
            logits = decoder.full_logits(self.config, params["decoder"], hidden)
            return tokens.at[:, place + 1].set(logits.argmax(axis=-1)), None

        first, image = self.vision.tokens, vision.encode(self.vision, params["vision"], pixels)
        prompt = jnp.broadcast_to(jnp.asarray(self.tokens_of("")), (len(pixels), self.length)).astype(jnp.int32)
        return jax.lax.scan(one, prompt, first + jnp.arange(self.length - first - 1))[0][:, first + 1 :]

    def program(self, args: argparse.Namespace) -> Program:
        example = jax.eval_shape(partial(jax.tree.map, jnp.asarray), self.batch(["a"], np.random.default_rng(0)))
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((args.batch_size, *leaf.shape[1:]), leaf.dtype), example
        )
        low, high = args.learning_rate / 20, args.learning_rate
        schedule = optax.warmup_cosine_decay_schedule(low, high, args.warmup_steps, args.steps, low)
        # An epsilon that keeps Adam from making whole steps of gradients that are little more than rounding errors.
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.95, eps=1e-6))
        return build_program(self, partial(self.initial_parameters, args.seed), optimizer, shapes)


def text_of(answer: np.ndarray) -> str:
    """An answer up to its end, with `·` for what is no letter."""
    letters = answer[: list(answer).index(END)] if END in answer else answer
    return "".join(LETTERS[token] if token < len(LETTERS) else "·" for token in letters)


@dataclass(frozen=True)
class Exam:
    """Pictures of words that training never shows."""

    words: Sequence[str]
    batch: Tree

    def __call__(self, reader: Reader, params: Tree) -> Record:
        answers = [text_of(answer) for answer in np.asarray(reader.read(params, self.batch["pixels"]))]
        # The answers to other images: what a model would get right that knows words and does not look.
        others = self.words[1:] + self.words[:1]
        return {
            "exact_match": float(np.mean([a == b for a, b in zip(answers, self.words, strict=True)])),
            "exact_match_of_other_images": float(np.mean([a == b for a, b in zip(answers, others, strict=True)])),
            "answers": [f"{word}: {answer}" for word, answer in zip(self.words[:8], answers, strict=False)],
        }


def agreement(events: dict[str, Events], tolerance: float) -> int:
    """For how many steps two runs have the same losses, up to `tolerance` of the loss."""
    full, fused = (events[head]["train"] for head in HEADS)
    return sum(1 for _ in takewhile(lambda i: abs(full[i]["loss"] / fused[i]["loss"] - 1) <= tolerance, sorted(full)))


def report_of(events: dict[str, Events], summary: Record) -> list[str]:
    run = events[list(events)[-1]]
    last = run["eval"][max(run["eval"])]
    exact = {"held-out images read exactly": reporting.number("heldout/exact_match", ".4f")}
    parts = [
        reporting.curve_table(
            events, "Share of held-out images that are read exactly", "eval", "exact_match", digits=4
        ),
        reporting.curve_table(events, "Loss"),
        reporting.summary_table(summary, reporting.LAST_LOSS | exact),
        f"Of {summary['heldout_words']} images of words that are not in training {last['exact_match']:.1%} are read "
        f"exactly. The word of another image is the answer to {last['exact_match_of_other_images']:.1%}.\n"
        f"Words and answers: {', '.join(last['answers'])}",
    ]
    if len(events) == 2:
        tolerance = CURVE_TOLERANCE[summary["dtype"]]
        parts.append(
            f"The losses agree within {tolerance:.0e} of the loss for the first {agreement(events, tolerance)} of "
            f"{summary['steps']} steps. While a model learns where to look, rounding errors grow from step to step."
        )
    return parts


def pictures(exam: Exam, axes: Axes) -> None:
    """The first images of an evaluation."""
    axes.imshow(np.concatenate(exam.batch["pixels"][:8]), cmap="gray")
    axes.set(title="Held-out images", xticks=[], yticks=[])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("vlm_sft", __doc__)
    add = options.add_run_options(parser, "runs/vlm_sft")
    add("--eval-every", type=COUNT, default=300, metavar="N", help="steps between evaluations (%(default)s)")
    add("--eval-words", type=COUNT, default=256, metavar="N", help="held-out words (%(default)s)")
    add = parser.add_argument_group("task").add_argument
    options.add_text_options(add)
    add("--words", type=COUNT, default=8000, metavar="N", help="the corpus's commonest, at most (%(default)s)")
    add("--vocab-size", type=COUNT, default=1024, metavar="N", help="tokens; the task needs few (%(default)s)")
    options.add_model_options(parser)
    add = parser.add_argument_group("training").add_argument
    options.add_head_options(add)
    add("--steps", type=COUNT, default=1200, metavar="N", help="optimizer steps (%(default)s)")
    add("--batch-size", type=COUNT, default=32, metavar="N", help="images per step (%(default)s)")
    add("--learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the highest, after warmup (%(default)s)")
    parser.set_defaults(warmup_steps=None)
    args = parser.parse_args(argv)
    options.check(parser, args)
    if args.vocab_size < TOKENS:
        parser.error(f"--vocab-size {args.vocab_size}: the task needs {TOKENS}")
    return args


def model_of(args: argparse.Namespace) -> DecoderConfig:
    """A small Qwen2-VL. An image has more columns than rows: columns get most pairs of features, and the fastest."""
    sizes = options.model_of(args, args.vocab_size)
    head_size = sizes.hidden_size // sizes.heads
    few = head_size // 16
    return DecoderConfig(
        **{name: getattr(sizes, name) for name in ("vocab_size", "hidden_size", "mlp_size", "layers", "heads")},
        kv_heads=sizes.heads,
        head_size=head_size,
        qkv_bias=True,
        rope_theta=10.0,
        rope_sections=(head_size // 2 - 2 * few, few, few),
        tie_embeddings=sizes.tie_embeddings,
        dtype=sizes.dtype,
    )


def run(args: argparse.Namespace) -> None:
    images, config = VisionConfig(), model_of(args)
    documents = read_documents(args.corpus, args.max_bytes)
    words = vision.words_of(documents, SHORTEST_WORD, images.longest_word, args.words)
    order = np.random.default_rng(args.seed).permutation(len(words))
    heldout, learned = ([words[i] for i in part] for part in (order[: args.eval_words], order[args.eval_words :]))
    if not learned:
        raise RunError(f"the corpus has {len(words)} words, no more than --eval-words {args.eval_words}")
    say(f"corpus: {len(learned)} words to learn from, {len(heldout)} held out")
    names = ("steps", "batch_size", "learning_rate", "warmup_steps", "seed")
    settings = {**asdict(config), **{name: getattr(args, name) for name in names}, "heldout_words": len(heldout)}
    settings |= {"words": len(learned), "vision": asdict(images)}
    readers = [Reader(config, images, head) for head in options.heads_of(args)]
    exam = Exam(heldout, readers[0].batch(heldout, np.random.default_rng([args.seed, 0])))

    # Both trainings ask for the same one.
    @lru_cache(maxsize=1)
    def batch(step: int) -> Tree:
        random = np.random.default_rng([args.seed, step])
        words = [learned[i] for i in random.integers(len(learned), size=args.batch_size)]
        return readers[0].batch(words, random)

    trainings = [
        Training(
            reader.head.name,
            args.out / reader.head.name,
            reader.program(args),
            lambda step, params: batch(step),
            partial(exam, reader),
        )
        for reader in readers
    ]
    runs.open_folder(args, settings, HEADS)
    train(trainings, args, args.steps)
    events = runs.read_heads(args.out)
    summary = reporting.summarize(events, settings)
    exact = reporting.curves_panel(events, "Held-out images read exactly", "exact_match", ("eval",), "share")
    panels = [exact, *reporting.comparison_panels(events, summary), partial(pictures, exam)]
    reporting.report(args.out, summary, panels, report_of(events, summary))


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("vlm_sft", run, parse_args(argv))


if __name__ == "__main__":
    main()
