"""Writes the golden files of tests/test_finetune.py: tiny random models by `transformers`, and what PyTorch computes.

    pip install torch transformers safetensors
    python tests/golden/write_finetune.py

A folder per architecture: the checkpoint as `transformers` saves it; `gradients`, in the same format; `expected.npz`.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "finetune"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Small enough to change these tiny models' scores and logits.
SOFTCAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
# What differs from the sizes above. Windows are shorter than the rows, so that they count.
ARCHITECTURES = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 6, **SOFTCAPS}),
}
BATCH, LENGTH, STEPS = 2, 12, 50
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def tiny_model(name: str) -> transformers.PreTrainedModel:
    """A random model in float32; norms and biases, too, are random, so that none of them can be left out unnoticed."""
    kind, own = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **own))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.float().eval()


def random_batch(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels `[B, T]`; -100 is a label that does not count. Gemma's embedding takes 0 for padding."""
    tokens = generator.integers(1, SIZES["vocab_size"], (BATCH, LENGTH + 1))
    counts = generator.random((BATCH, LENGTH)) < 0.7
    return tokens[:, :-1], np.where(counts, tokens[:, 1:], -100)


def loss_of(model: transformers.PreTrainedModel, tokens: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    logits = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten())


def fine_tune(model: transformers.PreTrainedModel) -> list[float]:
    """The losses of AdamW's steps."""
    generator, losses = np.random.default_rng(1), []
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    for _ in range(STEPS):
        loss = loss_of(model, *random_batch(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def write(name: str, folder: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens, labels = random_batch(np.random.default_rng(0))
    loss = loss_of(model, tokens, labels)
    loss.backward()
    logits = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.detach().numpy()
    (folder / "gradients").mkdir()
    shutil.copyfile(folder / "config.json", folder / "gradients" / "config.json")
    gradients = {key: value.grad.contiguous() for key, value in model.named_parameters()}
    save_file(gradients, folder / "gradients" / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.astype(np.int32),
        labels=labels.astype(np.int32),
        logits=logits,
        loss=loss.item(),
        losses=np.asarray(fine_tune(model)),
    )


def main() -> None:
    torch.set_num_threads(1)  # more are slower for models this small
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in ARCHITECTURES:
        write(name, FOLDER / name)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
