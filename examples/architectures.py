"""The contents of a published checkpoint's config.json, to a `DecoderConfig`: an architecture is a function here."""

from collections.abc import Callable
from typing import Any

from decoder import DecoderConfig, Llama3Rope
from runs import Record, RunError

CONFIG = "config.json"


class PretrainedError(RunError):
    """The checkpoint cannot be read or written; the message says which part of it and why."""


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
    if values.get("quantization_config"):
        raise PretrainedError(f"{name}: quantization_config is not supported; pass a checkpoint that is not quantized")
    own, is_tied = ARCHITECTURES[kind]
    try:
        heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
        kv_heads = values.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise PretrainedError(
                f"{name}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        return DecoderConfig(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            mlp_size=values["intermediate_size"],
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_size=values.get("head_dim") or values["hidden_size"] // heads,
            tie_embeddings=values.get("tie_word_embeddings", is_tied),
            norm_epsilon=values["rms_norm_eps"],
            dtype=dtype,
            **_rope(values, name),
            **own(name, values, layers),
        )
    except KeyError as error:
        raise PretrainedError(f"{name}: {error.args[0]} is missing") from None
