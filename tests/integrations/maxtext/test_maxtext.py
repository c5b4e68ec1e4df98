"""MaxText: loss, gradients and ten training steps are those of its own trainer."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import maxtext
import numpy as np
import pytest
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.layers import multi_token_prediction, nnx_decoders
from maxtext.trainers.pre_train import train
from maxtext.utils import model_creation_utils

from jliger.integrations import maxtext as integration

BATCH, LENGTH, VOCAB = 4, 16, 96
SIZES = [
    "run_name=test", "dataset_type=synthetic", "enable_checkpointing=False", "skip_jax_distributed_system=True",
    "log_config=False", "attention=dot_product", "base_emb_dim=32", "base_num_query_heads=2", "base_num_kv_heads=2",
    "head_dim=16", "base_mlp_dim=64", "base_num_decoder_layers=2", f"vocab_size={VOCAB}",
    f"max_target_length={LENGTH}", "z_loss_multiplier=1e-3", "steps=10", "learning_rate=1e-2",
    "warmup_steps_fraction=0.0", "sharding_tolerance=0.1",
]  # fmt: skip
BASE = str(pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml")
UNTIED, TIED = "logits_via_embedding=False", "logits_via_embedding=True"
MODELS = {
    "untied": ["dtype=float32", UNTIED, "mtp_num_layers=2"],
    "untied bfloat16": ["dtype=bfloat16", UNTIED],
    "tied": ["dtype=float32", TIED, "final_logits_soft_cap=5.0", "mtp_num_layers=1"],
    "tied bfloat16": ["dtype=bfloat16", TIED, "logits_dot_in_fp32=True"],
}


@pytest.fixture
def installed():
    """Installs, and takes it back afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "vocab_tiling_nnx_loss", train.vocab_tiling_nnx_loss)
        patch.setattr(nnx_decoders.NNXDecoder, "apply_output_head", nnx_decoders.NNXDecoder.apply_output_head)
        name = "_cross_entropy_with_integer_labels"
        patch.setattr(multi_token_prediction, name, getattr(multi_token_prediction, name))
        yield integration.install


def loss_and_gradients(options):
    """Of MaxText's loss for a batch with padding; also the program, where the shape of full logits would be seen."""
    config = pyconfig.initialize(["", BASE, *SIZES, f"per_device_batch_size={BATCH}", *options])
    model = model_creation_utils.from_config(config, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    random = np.random.default_rng(0)
    segments = (np.arange(LENGTH) < np.array([[16], [9], [12], [3]])).astype(np.int32)
    data = {
        "inputs": random.integers(0, VOCAB, (BATCH, LENGTH)),
        "targets": random.integers(0, VOCAB, (BATCH, LENGTH)),
        "inputs_position": np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH)),
        "inputs_segmentation": segments,
        "targets_segmentation": segments,
    }

    def loss(params, data):
        return train.loss_fn(nnx.merge(graph, params, rest), config, dict(data), None, None, is_train=True)[0]

    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, data)
    return *lowered.compile()(params, data), lowered.as_text()


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(installed, name):
    options = MODELS[name]
    in_float32 = "dtype=float32" in options
    expected, expected_gradients, _ = loss_and_gradients(options)
    installed()
    loss, gradients, program = loss_and_gradients([*options, "num_vocab_tiling=2"])

    np.testing.assert_allclose(loss, expected, rtol=1e-6 if in_float32 else 2e-3)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        scale = float(np.max(np.abs(other.astype(np.float32))))
        np.testing.assert_allclose(
            one.astype(np.float32), other.astype(np.float32), rtol=0, atol=scale * (1e-5 if in_float32 else 3e-2)
        )
    assert f"{BATCH}x{LENGTH}x{VOCAB}x" not in program


def test_acceptance_rate_needs_logits(installed):
    installed()
    with pytest.raises(NotImplementedError, match="mtp_eval_target_module got 1; pass 0"):
        loss_and_gradients([*MODELS["untied"], "mtp_eval_target_module=1"])


def test_main_installs_and_stores_hidden_states(installed, monkeypatch):
    called = []
    monkeypatch.setattr(train, "main", called.append)
    integration.main(["maxtext.py", BASE, "steps=3"])
    integration.main(["maxtext.py", BASE, "num_vocab_tiling=4"])
    assert called == [["maxtext.py", BASE, "steps=3", "num_vocab_tiling=2"], ["maxtext.py", BASE, "num_vocab_tiling=4"]]
    assert train.vocab_tiling_nnx_loss is integration.vocab_tiling_nnx_loss


RUNS = {
    "accumulation": (1, ["gradient_accumulation_steps=2", "mtp_num_layers=1", "per_device_batch_size=4"]),
    "mesh": (8, ["ici_fsdp_parallelism=4", "ici_tensor_parallelism=2", "mtp_num_layers=2", "per_device_batch_size=1"]),
    "explicit mesh": (
        8,
        ["ici_fsdp_parallelism=8", "shard_mode=explicit", "mtp_num_layers=1", "per_device_batch_size=1"],
    ),
}


def losses_of(module, devices, options, folder):
    """What the trainer writes for each step."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    arguments = [BASE, *SIZES, "dtype=float32", *options, f"base_output_directory={folder}"]
    subprocess.run(
        [sys.executable, "-m", module, *arguments, f"metrics_file={folder}/metrics.jsonl"],
        check=True,
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"},
    )
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("learning/loss", "learning/raw_grad_norm", "learning/mtp_loss", "learning/z_loss")
    return np.array([[step[name] for name in names] for step in steps])


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_of_its_trainer(tmp_path, name):
    (tmp_path / "own").mkdir()
    (tmp_path / "jliger").mkdir()
    expected = losses_of("maxtext.trainers.pre_train.train", *RUNS[name], tmp_path / "own")
    found = losses_of("jliger.integrations.maxtext", *RUNS[name], tmp_path / "jliger")
    assert len(expected) == 10
    assert expected[-1, 0] < expected[0, 0] / 2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
