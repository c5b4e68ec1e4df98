"""examples/finetune.py, and what it stands on against golden files of PyTorch (tests/golden/write_finetune.py)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

GOLDEN = Path(__file__).parent / "golden" / "finetune"
NAMES = ("llama", "qwen2", "qwen3", "gemma", "gemma2")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """LLVM's optimizations are most of the compile time of these small programs."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def decoder(import_example) -> ModuleType:
    return import_example("decoder")


@pytest.fixture(scope="module")
def pretrained(import_example) -> ModuleType:
    return import_example("pretrained")


@pytest.fixture(scope="module")
def function(decoder):
    """Loss, logits and gradients of a batch."""

    def loss_and_logits(config, params, tokens, labels):
        hidden = decoder.hidden_states(config, params, tokens)
        loss = decoder.loss_sum("jliger", config, params, hidden, labels) / jnp.sum(labels >= 0)
        return loss, decoder.full_logits(config, params, hidden)

    return jax.jit(jax.value_and_grad(loss_and_logits, argnums=1, has_aux=True), static_argnums=0)


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients_are_those_of_pytorch(pretrained, function, name):
    config, expected = pretrained.read_config(GOLDEN / name), np.load(GOLDEN / name / "expected.npz")
    params, gradients = (pretrained.load(GOLDEN / name / part, config, "float32") for part in (".", "gradients"))
    (loss, logits), found = function(config, params, expected["tokens"], expected["labels"])
    # Both are in float32, with values of some units: a few units in the last place.
    np.testing.assert_allclose(logits, expected["logits"], atol=3e-6)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["gemma2", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in NAMES[:-1])])
def test_fifty_steps_track_pytorch(pretrained, function, name):
    config, expected = pretrained.read_config(GOLDEN / name), np.load(GOLDEN / name / "expected.npz")
    params = pretrained.load(GOLDEN / name, config, "float32")
    optimizer = optax.adamw(1e-3, b2=0.95, eps=1e-6, weight_decay=0.1)

    @jax.jit
    def apply(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, generator, losses = optimizer.init(params), np.random.default_rng(1), []
    shape = expected["tokens"].shape
    for _ in expected["losses"]:
        # As `random_batch` of the script that wrote the file.
        tokens = generator.integers(1, config.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
        labels = np.where(generator.random(shape) < 0.7, tokens[:, 1:], np.int32(-100))
        (loss, _), gradients = function(config, params, tokens[:, :-1], labels)
        params, state = apply(params, state, gradients)
        losses.append(loss)
    np.testing.assert_allclose(losses, expected["losses"], atol=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

WORDS = (
    "a b c d e f g h red blue green one two three sum of and is the color number say name ### Instruction Input".split()
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
RECORDS = [
    {"instruction": f"say {one}", "input": two if two != "a" else "", "output": f"{one} and {two} is {one}"}
    for one in WORDS[:8]
    for two in WORDS[:5]
]


def write_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """A tokenizer of words, as small as the models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
    vocab = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "qwen3", folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def finetune(import_example, checkpoint, tmp_path, capsys):
    """Runs the program; returns what it printed, and its metrics."""
    program, runs = import_example("finetune"), import_example("runs")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([json.dumps(RECORDS[0]), "{", '{"instruction": "say"}', *map(json.dumps, RECORDS[1:])]))
    text = f"--model {checkpoint} --data {data} --length 64 --batch-size 2 --learning-rate 0.01 --no-progress"

    def run(name: str, *more: str):
        out = tmp_path / name
        program.main([*text.split(), "--out", str(out), *more])
        return capsys.readouterr().out, runs.read_metrics(out)

    run.folder = tmp_path
    return run


def test_a_run_learns_resumes_and_is_exported(finetune, pretrained, decoder, checkpoint):
    options = ("--steps", "8", "--eval-every", "4", "--checkpoint-every", "4")
    printed, whole = finetune("whole", *options)
    assert "2 records were left out: line 2: it is no JSON" in printed
    assert "line 3: 'output' is missing" in printed
    losses = [whole["train"][step]["loss"] for step in range(1, 9)]
    assert losses[-1] < 0.8 * losses[0]
    assert whole["eval"][8]["loss"] < 0.8 * whole["eval"][0]["loss"]

    finetune("resumed", *options, "--stop-at", "4")
    _, resumed = finetune("resumed", *options, "--resume")
    assert [resumed["train"][step]["loss"] for step in range(1, 9)] == losses

    config = pretrained.read_config(checkpoint)
    exported = [finetune.folder / name / "model" for name in ("whole", "resumed")]
    first, second = (pretrained.load(folder, config, "float32") for folder in exported)
    before = pretrained.load(checkpoint, config, "float32")
    for one, other, old in zip(*map(jax.tree.leaves, (first, second, before)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.array_equal(one, old)
    assert (exported[0] / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_adapters_merged_and_as_peft_has_them(finetune, import_example, pretrained, decoder, checkpoint):
    """The merged folder, with a head of its own, gives the logits of base and adapters."""
    options = ("--steps", "3", "--lora-rank", "2", "--lora-targets", "attention", "mlp", "head", "--eval-fraction", "0")
    finetune("merged", *options, "--accumulate", "2")
    finetune("adapter", *options, "--export", "adapter")
    config = pretrained.read_config(checkpoint)
    untied = pretrained.read_config(finetune.folder / "merged" / "model")
    assert (config.tie_embeddings, untied.tie_embeddings) == (True, False)
    base = pretrained.load(checkpoint, config, "float32")
    merged = pretrained.load(finetune.folder / "merged" / "model", untied, "float32")

    import safetensors.numpy

    folder = finetune.folder / "adapter" / "model"
    about = json.loads((folder / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (2, 4.0)
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * (7 * config.layers + 1)

    def product(name: str) -> np.ndarray:
        a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        return 2.0 * b @ a

    for layer in range(config.layers):
        name = f"model.layers.{layer}.self_attn.o_proj"
        delta = (merged["layers"]["attention_out"] - base["layers"]["attention_out"])[layer].reshape(-1, 16).T
        np.testing.assert_allclose(delta, product(name), atol=1e-6)
        assert np.abs(delta).max() > 1e-4
    np.testing.assert_allclose(merged["head"] - base["embedding"].T, product("lm_head").T, atol=1e-6)
    np.testing.assert_array_equal(merged["embedding"], base["embedding"])


def test_a_row_of_several_examples_is_the_examples(import_example, pretrained, decoder, finetune):
    """Segments and positions keep packed examples apart, also where attention has a window and a softcap."""
    instructions = import_example("instructions")
    generator = np.random.default_rng(0)
    examples = []
    for size in (9, 7, 12, 3):
        ids = generator.integers(1, 61, size + 1).astype(np.int32)
        examples.append((ids[:-1], ids[1:]))
    packed, single = (instructions.pack(examples, 16, is_packed) for is_packed in (True, False))
    assert (len(packed), len(single)) == (2, 4)
    tuning = import_example("tuning")
    config = pretrained.read_config(GOLDEN / "gemma2")
    params = pretrained.load(GOLDEN / "gemma2", config, "float32")
    of = dict(config=config, head="full", rank=0, alpha=0, groups=(), dtype="float32", mesh=None, head_options={})
    loss, count = jax.jit(tuning.Tuning(is_packed=True, **of).loss)(params, packed)
    expected, same_count = jax.jit(tuning.Tuning(is_packed=False, **of).loss)(params, single)
    assert count == same_count == 31
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
