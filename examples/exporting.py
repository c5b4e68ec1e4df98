"""A decoder's parameters or adapters, to a folder that `transformers` or PEFT loads."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from architectures import CONFIG
from decoder import DecoderConfig, Tree, parameters
from pretrained import INDEX, SINGLE_FILE, Layout, each_layer, leaf_at, read_object, stored_dtype, tensor_names
from runs import write_json
from safetensors.numpy import save_file

# What an exported folder takes over as it is.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# Of the largest file of an exported checkpoint. One file at a time is in memory.
FILE_BYTES = 4 * 2**30


def export_model(
    folder: Path,
    source: Path,
    config: DecoderConfig,
    params: Tree,
    adapters: Tree | None = None,
    scale: float = 1.0,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes a folder that `transformers` loads, in the dtype of the checkpoint in `source`; adapters are merged.

    A merged adapter of a tied last layer ends the tie: the embedding stays as it is, and the folder has both.
    """
    dtype, adapters = stored_dtype(source), adapters or {"layers": {}}
    described, names, is_tied = parameters(config), tensor_names(config), config.tie_embeddings
    if is_tied and "head" in adapters:
        head = parameters(replace(config, tie_embeddings=False))["head"]
        described, params = {**described, "head": head}, {**params, "head": params["embedding"].T}
        names[("head",)], is_tied = "lm_head.weight", False

    def tensor(path: tuple[str, ...], layer: int) -> np.ndarray:
        own = (layer,) if path[0] == "layers" else ()
        value, adapter = leaf_at(params, path)[own], leaf_at(adapters, path[:-1]).get(path[-1])
        if adapter is not None:
            delta = jnp.tensordot(adapter["a"][own], adapter["b"][own], 1)
            value = value.astype(jnp.float32) + scale * delta
        return Layout.of(leaf_at(described, path), bool(own)).to_stored(np.asarray(value.astype(dtype)))

    files: list[dict[str, Callable[[], np.ndarray]]] = [{}]
    room = file_bytes
    for path, name in names.items():
        size = math.prod(Layout.of(leaf_at(described, path), path[0] == "layers").shape) * dtype.itemsize
        for layer, each in enumerate(each_layer(config, path, name)):
            if room < size and files[-1]:
                files.append({})
                room = file_bytes
            room -= size
            files[-1][each] = lambda path=path, layer=layer: tensor(path, layer)

    folder.mkdir(parents=True, exist_ok=True)
    weight_map, total = {}, 0
    for number, content in enumerate(files, 1):
        file = SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        arrays = {name: make() for name, make in content.items()}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / CONFIG, {**read_object(source / CONFIG), "tie_word_embeddings": is_tied})
    copy_tokenizer(folder, source)


def copy_tokenizer(folder: Path, source: Path) -> None:
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def export_adapter(folder: Path, source: Path, config: DecoderConfig, adapters: Tree, rank: int, alpha: float) -> None:
    """Writes the adapters as PEFT does; PEFT loads them on top of the checkpoint in `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {("head",): "lm_head.weight", **tensor_names(config)}
    tensors, modules = {}, set()
    for path, name in names.items():
        adapter = leaf_at(adapters, path[:-1]).get(path[-1])
        if adapter is None:
            continue
        modules.add(name.split(".")[-2])
        for layer, each in enumerate(each_layer(config, path, name)):
            own = (layer,) if path[0] == "layers" else ()
            for letter in "ab":
                value = np.asarray(adapter[letter][own], np.float32)
                value = value.reshape(-1, rank).T if letter == "a" else value.reshape(rank, -1).T
                key = each.removesuffix(".weight")
                tensors[f"base_model.model.{key}.lora_{letter.upper()}.weight"] = np.ascontiguousarray(value)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(folder, source)
