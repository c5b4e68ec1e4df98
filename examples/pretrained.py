"""Checkpoint folders as Hugging Face has them: config.json and safetensors, to a decoder's parameters and back.

Parameters are read straight into their sharding: a device's part of them and nothing else, one parameter (of all
layers) at a time. Every tensor of the folder must be used, and have the shape that config.json implies.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decoder import DecoderConfig, Llama3Rope, Parameter, Tree, layer_parameters, parameters
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding, SingleDeviceSharding
from runs import Record, RunError, read_json, write_json
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
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


class PretrainedError(RunError):
    """The checkpoint cannot be read or written; the message says which part of it and why."""


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def _rope(values: Record, name: str) -> Record:
    """Theta and scaling of the rotary embeddings, from the keys of transformers 5 or of earlier versions."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta", values.get("rope_theta", 10_000.0))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise PretrainedError(
            f"{name}: rotary embeddings of type {kind!r} are not supported; 'default' and 'llama3' are"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"rope_theta": theta, "rope_scaling": Llama3Rope(*(given[key] for key in keys))}


def _windows(values: Record, layers: int, is_sliding: Callable[[int], bool]) -> Record:
    """How far back each layer's attention reaches."""
    default = ["sliding_attention" if is_sliding(layer) else "full_attention" for layer in range(layers)]
    kinds = values.get("layer_types") or default
    window = values.get("sliding_window") or 0
    return {"windows": tuple(window if kind == "sliding_attention" else 0 for kind in kinds)}


def _check(name: str, values: Record, allowed: dict[str, tuple[Any, ...]]) -> None:
    for key, choices in allowed.items():
        if values.get(key) not in choices:
            raise PretrainedError(f"{name}: {key} = {values[key]!r} is not supported; {choices[-1]!r} is")


def _llama(name: str, values: Record, layers: int) -> Record:
    _check(name, values, {"hidden_act": ("silu",), "attention_bias": (None, False), "mlp_bias": (None, False)})
    return {}


def _qwen2(name: str, values: Record, layers: int) -> Record:
    _check(name, values, {"hidden_act": ("silu",)})
    first = values.get("max_window_layers") or 0
    is_used = bool(values.get("use_sliding_window"))
    return {"qkv_bias": True, **_windows(values, layers, lambda layer: is_used and layer >= first)}


def _qwen3(name: str, values: Record, layers: int) -> Record:
    _check(name, values, {"attention_bias": (None, False)})
    return {**_qwen2(name, values, layers), "qkv_bias": False, "qk_norms": True}


def _gemma(name: str, values: Record, layers: int) -> Record:
    # Gemma's first configurations say "gelu" and mean its approximation by tanh.
    tanh = (None, "gelu", "gelu_pytorch_tanh")
    allowed = {"hidden_activation": tanh, "attention_bias": (None, False), "use_bidirectional_attention": (None, False)}
    _check(name, values, {"hidden_act": tanh, **allowed})
    return {"activation": "gelu_tanh", "norm_offset": 1.0, "embedding_scale": values["hidden_size"] ** 0.5}


def _gemma2(name: str, values: Record, layers: int) -> Record:
    own = {
        "output_norms": True,
        "query_scale": values["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": values["attn_logit_softcapping"],
        "logit_softcap": values["final_logit_softcapping"],
    }
    return {**_gemma(name, values, layers), **own, **_windows(values, layers, lambda layer: layer % 2 == 0)}


# What each architecture adds to the sizes, and whether its last layer is the embedding if config.json doesn't say.
ARCHITECTURES: dict[str, tuple[Callable[[str, Record, int], Record], bool]] = {
    "llama": (_llama, False),
    "qwen2": (_qwen2, False),
    "qwen3": (_qwen3, False),
    "gemma": (_gemma, True),
    "gemma2": (_gemma2, True),
}


def decoder_config(values: Record, name: str = CONFIG, dtype: str = "float32") -> DecoderConfig:
    """The decoder that the contents of a config.json describe; `name` is for errors."""
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise PretrainedError(f"{name}: model_type {kind!r} is not supported; {', '.join(ARCHITECTURES)} are")
    own, is_tied = ARCHITECTURES[kind]
    try:
        heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
        return DecoderConfig(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            mlp_size=values["intermediate_size"],
            layers=layers,
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_size=values.get("head_dim") or values["hidden_size"] // heads,
            tie_embeddings=values.get("tie_word_embeddings", is_tied),
            norm_epsilon=values["rms_norm_eps"],
            dtype=dtype,
            **_rope(values, name),
            **own(name, values, layers),
        )
    except KeyError as error:
        raise PretrainedError(f"{name}: {error.args[0]} is missing") from None


def read_config(folder: Path, dtype: str = "float32") -> DecoderConfig:
    return decoder_config(_read_json(folder / CONFIG), str(folder / CONFIG), dtype)


def _read_json(path: Path) -> Record:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise PretrainedError(f"there is no {path}") from None
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} cannot be read: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Names and layouts


def tensor_names(config: DecoderConfig) -> dict[tuple[str, ...], str]:
    """The tensor of each parameter; `{layer}` stands for the number of a layer."""
    mlp_norm = "pre_feedforward_layernorm" if config.output_norms else "post_attention_layernorm"
    in_layer = {
        "attention_norm": "input_layernorm.weight",
        "mlp_norm": f"{mlp_norm}.weight",
        "attention_out_norm": "post_attention_layernorm.weight",
        "mlp_out_norm": "post_feedforward_layernorm.weight",
        "query_norm": "self_attn.q_norm.weight",
        "key_norm": "self_attn.k_norm.weight",
        "attention_out": "self_attn.o_proj.weight",
    }
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        in_layer |= {name: f"self_attn.{letter}_proj.weight", f"{name}_bias": f"self_attn.{letter}_proj.bias"}
    in_layer |= {name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    names = {("layers", name): f"model.layers.{{layer}}.{in_layer[name]}" for name in layer_parameters(config)}
    names |= {("embedding",): "model.embed_tokens.weight", ("norm",): "model.norm.weight"}
    return names if config.tie_embeddings else {**names, ("head",): "lm_head.weight"}


@dataclass(frozen=True)
class Layout:
    """How a matrix `[*inputs, *outputs]` lies in a file: as `[outputs, inputs]`. Embeddings and vectors lie as is."""

    shape: tuple[int, ...]
    inputs: int | None

    @classmethod
    def of(cls, described: Parameter, is_stacked: bool) -> "Layout":
        return cls(described.shape[1:] if is_stacked else described.shape, described.inputs)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if self.inputs is None:
            return self.shape
        sizes = (math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :]))
        return sizes[::-1] if self.inputs else sizes[1:]

    def stored_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where a part of the matrix lies. Only the first of several input or output dimensions may be cut."""
        if self.inputs is None:
            return index

        def merged(dims: range) -> slice:
            start, stop, _ = index[dims[0]].indices(self.shape[dims[0]])
            rest = math.prod(self.shape[dim] for dim in dims[1:])
            return slice(start * rest, stop * rest)

        outputs = merged(range(self.inputs, len(self.shape)))
        return (outputs, merged(range(self.inputs))) if self.inputs else (outputs,)

    def from_stored(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return (stored.T if self.inputs else stored).reshape(shape)

    def to_stored(self, value: np.ndarray) -> np.ndarray:
        shape = self.stored_shape
        return np.ascontiguousarray(value.reshape(shape[::-1]).T if self.inputs else value.reshape(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Tensors:
    """The tensors of a checkpoint folder, by name; nothing is read before it is asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        if (folder / INDEX).exists():
            wanted: dict[str, str] = _read_json(folder / INDEX).get("weight_map", {})
            files = sorted(set(wanted.values()))
        else:
            wanted, files = {}, [SINGLE_FILE]
        self._files: dict[str, Any] = {}
        for file in files:
            if not (folder / file).exists():
                raise PretrainedError(f"there is no {folder / file}" + (f", which {INDEX} names" if wanted else ""))
            try:
                opened = stack.enter_context(safe_open(folder / file, "numpy"))
            except SafetensorError as error:
                raise PretrainedError(f"{folder / file} cannot be read: {error}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)
        if absent := wanted.keys() - self._files.keys():
            raise PretrainedError(f"{folder / INDEX} names tensors that no file has: {_some(absent)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def part(self, name: str) -> Any:
        """What `[index]` reads a part of."""
        return self._files[name].get_slice(name)


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_tensors(config: DecoderConfig, tensors: Tensors) -> None:
    """Compares names and shapes of all tensors with those that the configuration implies."""
    described, wanted = parameters(config), {}
    for path, name in tensor_names(config).items():
        layout = Layout.of(_at(described, path), path[0] == "layers")
        wanted |= {each: layout.stored_shape for each in _each_layer(config, path, name)}
    # Rotary frequencies that old versions of transformers stored; they follow from config.json.
    present = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    if missing := wanted.keys() - present:
        raise PretrainedError(f"{tensors.folder} lacks tensors: {_some(missing)}")
    surplus = present - wanted.keys()
    if config.tie_embeddings and "lm_head.weight" in surplus:
        if not np.array_equal(tensors.part("lm_head.weight")[:], tensors.part("model.embed_tokens.weight")[:]):
            raise PretrainedError(
                f"{tensors.folder}: config.json ties the last layer to the embedding, but lm_head.weight and "
                "model.embed_tokens.weight differ; set tie_word_embeddings to false if both are meant"
            )
        surplus.remove("lm_head.weight")
    if surplus:
        raise PretrainedError(f"{tensors.folder} has tensors that the architecture does not: {_some(surplus)}")
    for name, shape in wanted.items():
        found = tuple(tensors.part(name).get_shape())
        if found != shape:
            raise PretrainedError(f"{tensors.folder}: {name} has shape {found}; config.json implies {shape}")


def _at(tree: Tree, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _each_layer(config: DecoderConfig, path: tuple[str, ...], name: str) -> list[str]:
    return [name.format(layer=layer) for layer in range(config.layers if path[0] == "layers" else 1)]


def on_one_device(spec: P) -> Sharding:
    del spec
    return SingleDeviceSharding(jax.devices()[0])


def load(
    folder: Path,
    config: DecoderConfig,
    dtype: jax.typing.DTypeLike,
    sharding: Callable[[P], Sharding] = on_one_device,
) -> Tree:
    """The parameters of a checkpoint in `dtype`; `sharding` makes theirs of the specs of `decoder.parameters`.

    A device's part of one parameter, of all layers, is in the host's memory at a time.
    """
    described, dtype = parameters(config), jnp.dtype(dtype)
    loaded: Tree = {"layers": {}}
    with ExitStack() as stack:
        tensors = Tensors(folder, stack)
        _check_tensors(config, tensors)
        for path, name in tensor_names(config).items():
            leaf, is_stacked = _at(described, path), path[0] == "layers"
            names, layout = _each_layer(config, path, name), Layout.of(leaf, is_stacked)

            def read(
                index: tuple[slice, ...], leaf: Any = leaf, names: Any = names, layout: Any = layout
            ) -> np.ndarray:
                shape = tuple(len(range(*each.indices(size))) for each, size in zip(index, leaf.shape, strict=True))
                own = index[len(leaf.shape) - len(layout.shape) :]
                layers = names[index[0]] if len(own) < len(index) else names
                part = np.empty((len(layers), *shape[len(shape) - len(own) :]), dtype)
                for layer, each in enumerate(layers):
                    part[layer] = layout.from_stored(tensors.part(each)[layout.stored_index(own)], part.shape[1:])
                return part.reshape(shape)

            value = jax.make_array_from_callback(leaf.shape, sharding(leaf.spec), read)
            _at(loaded, path[:-1])[path[-1]] = value
    return loaded


def stored_dtype(folder: Path) -> np.dtype:
    """The dtype of the embedding in a checkpoint."""
    with ExitStack() as stack:
        return Tensors(folder, stack).part("model.embed_tokens.weight")[:1].dtype


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def export(
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
        value, adapter = _at(params, path)[own], _at(adapters, path[:-1]).get(path[-1])
        if adapter is not None:
            delta = jnp.tensordot(adapter["a"][own], adapter["b"][own], 1)
            value = value.astype(jnp.float32) + scale * delta
        return Layout.of(_at(described, path), bool(own)).to_stored(np.asarray(value.astype(dtype)))

    files: list[dict[str, Callable[[], np.ndarray]]] = [{}]
    room = file_bytes
    for path, name in names.items():
        size = math.prod(Layout.of(_at(described, path), path[0] == "layers").shape) * dtype.itemsize
        for layer, each in enumerate(_each_layer(config, path, name)):
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
    write_json(folder / CONFIG, {**_read_json(source / CONFIG), "tie_word_embeddings": is_tied})
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
        adapter = _at(adapters, path[:-1]).get(path[-1])
        if adapter is None:
            continue
        modules.add(name.split(".")[-2])
        for layer, each in enumerate(_each_layer(config, path, name)):
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
