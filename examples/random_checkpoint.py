"""Writes a small random checkpoint and instructions to train it on, to try finetune.py without a download.

    python examples/random_checkpoint.py
    python examples/finetune.py --model runs/tiny --data runs/tiny/data.jsonl --length 128

The instructions ask what functions of Python's library do; the answers are the first lines of their documentation.
"""

import argparse
import builtins
import inspect
import itertools
import json
import math
import os
import shutil
import statistics
import string
from collections.abc import Sequence
from pathlib import Path

import decoder
import jax
import numpy as np
import options
from architectures import CONFIG, decoder_config
from corpus import END_OF_TEXT, train_tokenizer
from instructions import WITHOUT_INPUT
from pretrained import SINGLE_FILE, Layout, each_layer, leaf_at, tensor_names
from runs import Record, RunError, run_program, say, write_json
from safetensors.numpy import save_file

VOCABULARY = 1024
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
OWNERS = (builtins, str, bytes, list, dict, set, int, float, itertools, math, os, os.path, shutil, statistics, string)


def records() -> list[Record]:
    """An instruction for each public function that has documentation."""
    found = {}
    for owner in OWNERS:
        for name, member in inspect.getmembers(owner, callable):
            lines = (inspect.getdoc(member) or "").splitlines()
            if lines and not name.startswith("_"):
                found[f"What does {owner.__name__}.{name} do?"] = lines[0]
    return [{"instruction": asked, "output": answer} for asked, answer in found.items()]


def write_checkpoint(folder: Path, texts: Sequence[str], seed: int) -> None:
    """A folder as Hugging Face has it: a tokenizer of these texts, and a decoder with random parameters."""
    tokenizer = train_tokenizer(texts, VOCABULARY)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    write_json(folder / "tokenizer_config.json", about)
    values = {**SHAPE, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": tokenizer.token_to_id(END_OF_TEXT)}
    write_json(folder / CONFIG, values)
    config = decoder_config(values)
    described, params = decoder.parameters(config), decoder.initial_parameters(config, jax.random.key(seed))
    tensors = {}
    for path, name in tensor_names(config).items():
        is_stacked = path[0] == "layers"
        layout = Layout.of(leaf_at(described, path), is_stacked)
        for layer, each in enumerate(each_layer(config, path, name)):
            value = leaf_at(params, path)[layer] if is_stacked else leaf_at(params, path)
            tensors[each] = layout.to_stored(np.asarray(value))
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    say(f"{decoder.parameter_count(config):,} random parameters, {config.vocab_size} tokens: {folder}")


def run(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.overwrite:
        raise RunError(f"{args.out} exists: --overwrite writes into it, --out names another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    asked = records()
    write_checkpoint(args.out, [WITHOUT_INPUT.format(**each) + each["output"] for each in asked], args.seed)
    data = args.out / "data.jsonl"
    data.write_text("".join(f"{json.dumps(each)}\n" for each in asked), encoding="utf-8")
    say(f"{len(asked)} instructions: {data}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = options.parser_of("random_checkpoint", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="the checkpoint's folder (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="write into --out if it exists")
    options.add_seed_option(parser.add_argument)
    run_program("random_checkpoint", run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
