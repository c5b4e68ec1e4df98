"""The examples' decoders beside transformers': the same logits, gradients and steps, and folders that it loads."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from pytorch_agreement import NAMES, check_a_batch, check_fifty_steps, losses_and_gradients
from tiny_checkpoint import RECORDS, TEMPLATE, write_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore"),  # theirs
]

SCRIPT = Path(__file__).parents[2] / "golden" / "write_finetune.py"


@pytest.fixture(scope="module")
def golden():
    """The script that writes the golden files."""
    spec = importlib.util.spec_from_file_location("write_finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def function(import_example):
    return losses_and_gradients(import_example("decoder"))


@pytest.fixture(scope="module", params=NAMES)
def folder(golden, tmp_path_factory, request) -> Path:
    """A checkpoint that this version of transformers wrote, and what this version of PyTorch computes of it."""
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    golden.write(request.param, folder)
    write_tokenizer(folder, TEMPLATE)
    return folder


def their_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits.numpy()


def load_theirs(folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def test_logits_loss_and_gradients(import_example, function, folder):
    check_a_batch(import_example("pretrained"), function, folder)


def test_fifty_steps(import_example, function, folder):
    check_fifty_steps(import_example("pretrained"), function, folder)


def test_golden_files_are_what_this_version_writes(golden, folder):
    """The committed files have not been changed, and need not be written again."""
    ours, theirs = (np.load(each / "expected.npz") for each in (golden.FOLDER / folder.name, folder))
    for name in ("logits", "losses"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5)


@pytest.fixture(scope="module")
def trained(import_example, folder, tmp_path_factory):
    """Runs the program with some options; returns the folder that it exported."""
    data = tmp_path_factory.mktemp("data") / "data.json"
    data.write_text(json.dumps(RECORDS))

    def run(*options: str) -> Path:
        out = tmp_path_factory.mktemp("out") / "run"
        arguments = ["--model", str(folder), "--data", str(data), "--out", str(out), "--length", "32", "--no-progress"]
        arguments += ["--steps", "3", "--learning-rate", "0.01", "--batch-size", "2", "--eval-fraction", "0"]
        import_example("finetune").main([*arguments, *options])
        return out / "model"

    return run


def our_logits(import_example, folder: Path, tokens) -> np.ndarray:
    decoder, pretrained = import_example("decoder"), import_example("pretrained")
    config = pretrained.read_config(folder)
    params = pretrained.load(folder, config, "float32")
    return np.asarray(decoder.full_logits(config, params, decoder.hidden_states(config, params, jnp.asarray(tokens))))


def test_an_exported_folder_loads(import_example, folder, trained):
    tokens = np.load(folder / "expected.npz")["tokens"]
    exported = trained()
    ours = our_logits(import_example, exported, tokens)
    np.testing.assert_allclose(their_logits(load_theirs(exported), tokens), ours, atol=3e-6)
    assert np.abs(ours - our_logits(import_example, folder, tokens)).max() > 0.01


def test_adapters_load_merged_and_in_peft(import_example, folder, trained):
    """The last layer's adapter, too, also where the last layer is the embedding."""
    tokens = np.load(folder / "expected.npz")["tokens"]
    options = ("--lora-rank", "2", "--lora-targets", "attention", "mlp", "head")
    merged = trained(*options)
    adapter = trained(*options, "--export", "adapter")
    ours = our_logits(import_example, merged, tokens)
    np.testing.assert_allclose(their_logits(load_theirs(merged), tokens), ours, atol=3e-6)
    adapted = peft.PeftModel.from_pretrained(load_theirs(folder), adapter).eval()
    np.testing.assert_allclose(their_logits(adapted, tokens), ours, atol=1e-5)
    assert np.abs(ours - our_logits(import_example, folder, tokens)).max() > 0.01


def test_chats_are_rendered_and_encoded_alike(import_example, folder):
    ours = import_example("instructions").ModelTokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a and b"}]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert ours.render(messages) == text
    ids, _ = ours.encode([(text, True)], is_chat=True)
    assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.end == theirs.eos_token_id
