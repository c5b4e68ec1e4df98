"""Checkpoint folders as Hugging Face has them: config.json and safetensors, to a decoder's parameters.

Parameters are read straight into their sharding, one of them (of all layers) at a time. Every tensor of the folder must
be used, and have the shape that config.json implies.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from architectures import CONFIG, PretrainedError, decoder_config
from decoder import DecoderConfig, Parameter, Tree, layer_parameters, parameters
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding, SingleDeviceSharding
from runs import Record, read_json
from safetensors import SafetensorError, safe_open

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONVERSION = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def read_config(folder: Path, dtype: str = "float32") -> DecoderConfig:
    if not (folder / CONFIG).exists():
        raise PretrainedError(
            f"there is no {folder / CONFIG}; needed is a checkpoint's folder. `hf download NAME --local-dir FOLDER` "
            "writes one, and so does examples/random_checkpoint.py"
        )
    return decoder_config(read_object(folder / CONFIG), str(folder / CONFIG), dtype)


def read_object(path: Path) -> Record:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise PretrainedError(f"there is no {path}") from None
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} cannot be read: {error}") from error


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


class Tensors:
    """The tensors of a checkpoint folder, by name; nothing is read before it is asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        if (folder / INDEX).exists():
            wanted: dict[str, str] = read_object(folder / INDEX).get("weight_map", {})
            files = sorted(set(wanted.values()))
        else:
            wanted, files = {}, [SINGLE_FILE]
        self._files: dict[str, Any] = {}
        for file in files:
            if not (folder / file).exists():
                about = f", which {INDEX} names" if wanted else "; transformers writes one: " + CONVERSION
                raise PretrainedError(f"there is no {folder / file}{about}")
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
        layout = Layout.of(leaf_at(described, path), path[0] == "layers")
        wanted |= {each: layout.stored_shape for each in each_layer(config, path, name)}
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
        if (dtype := tensors.part(name).get_dtype()) not in FLOATING:
            raise PretrainedError(f"{tensors.folder}: {name} is {dtype}; pass one of {', '.join(FLOATING)}")


def check(folder: Path, config: DecoderConfig) -> None:
    """Raises PretrainedError if `load` would; reads names and shapes only."""
    with ExitStack() as stack:
        _check_tensors(config, Tensors(folder, stack))


def leaf_at(tree: Tree, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def each_layer(config: DecoderConfig, path: tuple[str, ...], name: str) -> list[str]:
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

    At most one parameter, of all layers, is in the host's memory at a time.
    """
    described, dtype = parameters(config), jnp.dtype(dtype)
    loaded: Tree = {"layers": {}}
    with ExitStack() as stack:
        tensors = Tensors(folder, stack)
        _check_tensors(config, tensors)
        for path, name in tensor_names(config).items():
            leaf, is_stacked = leaf_at(described, path), path[0] == "layers"
            names, layout = each_layer(config, path, name), Layout.of(leaf, is_stacked)

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
            leaf_at(loaded, path[:-1])[path[-1]] = value
    return loaded


def stored_dtype(folder: Path) -> np.dtype:
    """The dtype of the embedding in a checkpoint."""
    with ExitStack() as stack:
        return Tensors(folder, stack).part("model.embed_tokens.weight")[:1].dtype
