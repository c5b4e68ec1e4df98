"""Data and checkpoint folders of examples/finetune.py: what counts, and what is refused by name."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from example_runs import refusal
from tiny_checkpoint import RECORDS, TEMPLATE, write_tokenizer

pytest.importorskip("safetensors")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

GOLDEN = Path(__file__).parent / "golden" / "finetune"


@pytest.fixture(scope="module")
def instructions(import_example):
    return import_example("instructions")


@pytest.fixture
def read(instructions, tmp_path):
    """The examples of records as text, with what counts in brackets."""

    def of(records, chat_template=None, length=99):
        shutil.copyfile(GOLDEN / "qwen3" / "config.json", tmp_path / "config.json")
        write_tokenizer(tmp_path, chat_template)
        tokenizer = instructions.ModelTokenizer(tmp_path)
        data = tmp_path / "data.json"
        data.write_text(records if isinstance(records, str) else json.dumps(records))
        dataset = instructions.read_dataset(data, tokenizer, length)
        texts = []
        for inputs, labels in dataset.examples:
            first = tokenizer.tokenizer.id_to_token(inputs[0])
            names = [tokenizer.tokenizer.id_to_token(max(label, 0)) for label in labels]
            texts.append(" ".join([first, *(f"[{n}]" if y >= 0 else "." for n, y in zip(names, labels, strict=True))]))
        return texts, dataset

    return of


def messages(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": each} for i, each in enumerate(contents)]}


def test_what_the_model_writes_counts(read):
    texts, _ = read([{"text": "a b"}, {"instruction": "say a", "output": "a </s> b"}])
    assert texts[0] == "<s> [a] [b] [</s>]"
    # Text that spells a special token out is text, which this tokenizer does not know.
    assert texts[1].endswith(". [a] [<unk>] [b] [</s>]")
    assert texts[1].startswith("<s> . . .")


def test_the_messages_of_an_assistant_count(read):
    texts, _ = read([messages("a", "b", "c", "d")], TEMPLATE)
    assert texts == ["<|user|> . . . [b] [</s>] . . . . [d] [</s>]"]
    texts, _ = read([{"instruction": "a", "input": "b", "output": "c"}], TEMPLATE)
    assert texts == ["<|user|> . . . . [c] [</s>]"]


def test_a_template_that_rewrites_earlier_messages_gives_an_example_per_answer(read):
    template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'] | upper }}")
    template = template.replace("upper", "replace('b', 'blue')")
    texts, _ = read([messages("a", "b", "c", "d")], template)
    assert texts == ["<|user|> . . . [b] [</s>]", "<|user|> . . . . . . . . . [d] [</s>]"]


def test_problems_are_counted_and_named(read, instructions):
    lines = [json.dumps(RECORDS[0]), '{"text": 3}', "[1]", '{"x": 1}', json.dumps(messages("a", "b")), '{"text": ']
    _, dataset = read("\n".join(lines))
    assert len(dataset.examples) == 1
    assert [problem.partition(":")[0] for problem in dataset.problems] == [f"line {i}" for i in (2, 3, 4, 5, 6)]
    words = dataset.in_words()
    assert "5 records were left out: line 2: 'text' is no string but int; line 3: it is no object but list" in words
    assert "line 5: it has messages, and the checkpoint has no chat template" in words
    _, dataset = read([{"text": "a b c d e"}], length=3)
    assert dataset.truncated == 1
    with pytest.raises(instructions.DataError, match=r"no example that can be used: record 1: no token that counts"):
        read([RECORDS[0]], length=5)
    with pytest.raises(instructions.DataError, match=r"begins like a JSON list"):
        read("[{]")


@pytest.fixture(scope="module")
def pretrained(import_example):
    return import_example("pretrained")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "phi3"}, "model_type 'phi3' is not supported; llama, qwen2"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported; 'silu' is"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "type 'yarn' are not supported"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not supported"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "heads 5 is no multiple of num_key_value_heads 2"),
        ({"intermediate_size": 25}, r"mlp.gate_proj.weight has shape \(24, 16\); config.json implies \(25, 16\)"),
        ({"num_hidden_layers": 4}, "lacks tensors: model.layers.3.input_layernorm.weight, .* and 4 more"),
        ({"num_hidden_layers": 2}, "tensors that the architecture does not: model.layers.2.input_layernorm.weight"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_by_name(pretrained, tmp_path, change, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llama", folder)
    values = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(pretrained.PretrainedError, match=message):
        pretrained.load(folder, pretrained.read_config(folder), "float32")


def test_a_tensor_of_integers_is_refused(pretrained, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llama", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(pretrained.PretrainedError, match=r"model.norm.weight is I8; pass one of F64, F32"):
        pretrained.load(folder, pretrained.read_config(folder), "float32")


def test_an_id_beyond_the_vocabulary_is_refused(import_example, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llama", folder)
    write_tokenizer(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 12}))
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    arguments = ["--model", str(folder), "--data", str(tmp_path / "data.json"), "--out", str(tmp_path / "out")]
    said = refusal(import_example("finetune"), [*arguments, "--length", "32"])
    assert re.search(r"the tokenizer gives the id \d+, and config.json has vocab_size 12", said)


def test_files_in_pieces(import_example, pretrained, tmp_path):
    """A checkpoint is exported in several files with an index, and read again; a lost file or tensor is named."""
    config = pretrained.read_config(GOLDEN / "gemma2")
    params = pretrained.load(GOLDEN / "gemma2", config, "float32")
    import_example("exporting").export_model(tmp_path, GOLDEN / "gemma2", config, params, file_bytes=15_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == "model-00001-of-00003.safetensors"
    again = pretrained.load(tmp_path, config, "float32")
    for name, value in params["layers"].items():
        np.testing.assert_array_equal(again["layers"][name], value)
    np.testing.assert_array_equal(again["embedding"], params["embedding"])
    (tmp_path / files[1]).unlink()
    with pytest.raises(
        pretrained.PretrainedError, match=r"there is no .*model-00002-of-00003.safetensors, which model"
    ):
        pretrained.load(tmp_path, config, "float32")


def test_options_that_do_not_fit(import_example, tmp_path, capsys):
    program = import_example("finetune")
    arguments = ["--model", str(tmp_path), "--data", str(tmp_path / "data.json"), "--out", str(tmp_path / "out")]
    assert "needed is a checkpoint's folder" in refusal(program, arguments)
    for more, message in (
        (["--accumulate", "3"], "--batch-size 8 must be a multiple of --accumulate 3"),
        (["--lora-alpha", "3"], "--lora-alpha goes with --lora-rank"),
        (["--lora-targets", "mlp"], "--lora-targets goes with --lora-rank"),
    ):
        with pytest.raises(SystemExit):
            program.main([*arguments, *more])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
