"""What README.md and the short recipes of docs/ show, runs; a recipe beside full logits has their results."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jliger

ROOT = Path(__file__).parent.parent
SIZE, TEACHER_SIZE, VOCAB, SHAPE = 8, 12, 11, (8, 6)


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def names():
    """What the recipes take for granted; rows have 1 to 6 tokens that count."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    tokens = random.integers(0, VOCAB, SHAPE)
    mask = np.arange(SHAPE[1]) < random.integers(1, SHAPE[1] + 1, (SHAPE[0], 1))
    student, kernel, teacher, teacher_kernel = (
        normal(*SHAPE, SIZE), normal(SIZE, VOCAB), normal(*SHAPE, TEACHER_SIZE), normal(TEACHER_SIZE, VOCAB),
    )  # fmt: skip
    params = {"embedding": normal(VOCAB, SIZE), "head": kernel, "lm_head": {"kernel": kernel}}
    return {
        "jax": jax, "jnp": jnp, "optax": optax, "jliger": jliger, "params": params,
        "hidden": student, "kernel": kernel, "teacher_hidden": teacher, "teacher_kernel": teacher_kernel,
        "student_hidden": student, "student_kernel": kernel,
        "student_logits": student @ kernel, "teacher_logits": teacher @ teacher_kernel,
        "tokens": jnp.asarray(tokens), "labels": jnp.asarray(tokens), "token_weights": jnp.ones(SHAPE),
        "mask": jnp.asarray(mask), "where": jnp.asarray(mask), "count": float(mask.sum()),
        "old": -jnp.ones(SHAPE), "old_logprobs": -jnp.ones(SHAPE), "advantages": normal(SHAPE[0]), "temperature": 0.7,
        "a": normal(SIZE, 2), "b": normal(2, VOCAB), "scale": 0.5, "schedule": 1e-3,
        "batch": {"tokens": jnp.asarray(tokens), "labels": jnp.where(mask, tokens, -100)},
        "hidden_size": SIZE, "vocab_size": VOCAB, "token_loss": lambda result: -result.logprobs,
        "model": lambda params, tokens: jnp.tanh(params["embedding"][tokens]),
    }  # fmt: skip


def run(code, known, *results):
    """What lines leave under these names, compiled as one."""

    def compiled():
        found = dict(known)
        exec(code, found)
        return {name: found[name] for name in results}

    return jax.jit(compiled)()


def trace(block):
    """Traces a block of README or docs, which shows whether it fits. One that sets a mesh has to run."""

    def run_block():
        rngs = nnx.Rngs(0)
        model = nnx.Dict(lm_head=nnx.Linear(SIZE, VOCAB, rngs=rngs))
        exec(block, {**names(), "nnx": nnx, "rngs": rngs, "model": model, "loss_fn": lambda *_: (0.0, 1)})

    if "set_mesh" in block:
        run_block()
    else:
        jax.eval_shape(run_block)


def test_readme_prints_what_it_says(capsys):
    program, _ = blocks_of("README.md")
    (said,) = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(program, {})
    for line, expected in zip(capsys.readouterr().out.splitlines(), said.splitlines(), strict=True):
        (loss, memory, _), (said_loss, said_memory, _) = line.split(), expected.split()
        np.testing.assert_allclose(float(loss), float(said_loss), rtol=1e-5)
        if jax.default_backend() == "cpu":
            np.testing.assert_allclose(float(memory), float(said_memory), rtol=0.1)


def test_readme():
    _, uses = blocks_of("README.md")
    trace(uses)


@pytest.mark.parametrize("page", ["install", "first_steps", "mesh", "lora", "coming_from", "nan"])
def test_short_guides(page):
    blocks = [block for block in blocks_of(f"docs/{page}.md") if "vocab_axis_name" not in block]
    assert blocks
    for block in blocks:
        trace(block)


def test_options_that_cost_accuracy():
    first, microbatches = blocks_of("docs/skip_gradients.md")
    (float8,) = blocks_of("docs/float8.md")
    for block in (first, float8):
        trace(block)
    jax.eval_shape(lambda: exec(microbatches, names()))


def test_gradient_accumulation():
    within, across = blocks_of("docs/gradient_accumulation.md")[:2]
    known = names()
    found = run(within, known, "loss", "weight", "gradients")

    def mean(params):
        logits = known["model"](params, known["tokens"]) @ params["head"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, known["labels"])
        return losses.mean(where=known["mask"])

    loss, gradients = jax.jit(jax.value_and_grad(mean))(known["params"])
    expected = {"loss": loss, "weight": known["mask"].sum(), "gradients": gradients}
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), found, expected)

    def traced():
        state = jliger.weighted_multi_steps(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 4)
        exec(across, {**known, **found, "state": state.init(known["params"])})

    jax.eval_shape(traced)


# A page's first block has both.
@pytest.mark.parametrize("page", ["docs/train_lm.md", "docs/train_distill.md", "docs/post_training.md"])
def test_full_logits_and_jliger(page):
    full, ours = blocks_of(page)[0].split("# jliger:")
    one = run(full, names(), "loss")["loss"]
    np.testing.assert_allclose(run("#" + ours, names(), "loss")["loss"], one, rtol=1e-5, atol=1e-6)


def test_all_log_probabilities_are_a_whole_teacher():
    whole, top_k = blocks_of("docs/train_distill.md")[:2]
    known = names()
    found = run(top_k.replace("64", str(VOCAB)), known, "loss")["loss"]
    np.testing.assert_allclose(found, run(whole, known, "loss")["loss"], rtol=1e-5)


def test_a_mean_over_the_whole_batch_of_a_mesh():
    (code,) = (block for block in blocks_of("docs/train_sharded.md") if 'reduction="sum"' in block)
    known = names()

    @jax.jit
    def parts_and_whole():
        losses = []
        for start in range(2):
            part = {**known, **{name: known[name][start::2] for name in ("hidden", "labels", "where")}}
            exec(code, part)
            losses.append(part["loss"])
        arrays = (known[name] for name in ("hidden", "kernel", "labels"))
        return sum(losses) / known["count"], jliger.fused_linear_cross_entropy(*arrays, where=known["where"])

    np.testing.assert_allclose(*parts_and_whole(), rtol=1e-5)
