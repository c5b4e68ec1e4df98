"""Two processes of one device each, under `jax.distributed`: what one process with both would find."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jliger

address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if count > 1:
    jax.distributed.initialize(address, count, index)
random = np.random.default_rng(0)
hidden = random.normal(size=(8, 16)).astype(np.float32)
kernel = random.normal(size=(16, 32)).astype(np.float32)
labels = random.integers(0, 32, 8).astype(np.int32)
labels[:3] = -100  # another number of tokens on each device
loss_and_grads = jax.value_and_grad(jliger.fused_linear_cross_entropy, (0, 1))
found = {}
for axis_type in (AxisType.Auto, AxisType.Explicit):
    for parallel, specs in {"tokens": (P("x"), P(), P("x")), "vocabulary": (P(), P(None, "x"), P())}.items():
        mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            arrays = [
                jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), array.__getitem__)
                for array, spec in zip((hidden, kernel, labels), specs)
            ]
            loss, grads = jax.jit(loss_and_grads)(*arrays)
            gathered = [multihost_utils.process_allgather(array, tiled=True) for array in (loss, *grads)]
        found[f"{axis_type.name} {parallel}"] = [np.asarray(array).ravel().tolist() for array in gathered]
print("found", json.dumps(found))
"""


def results(count):
    """What each of `count` processes prints, which have two devices together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    devices = f"--xla_force_host_platform_device_count={2 // count} --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(count), str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    found = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            (line,) = (line for line in output.splitlines() if line.startswith("found "))
            found.append(json.loads(line.removeprefix("found ")))
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.mark.exhaustive
def test_two_processes_find_what_one_does():
    (whole,) = results(1)
    each = results(2)
    assert len(whole) == 4
    for found in each:
        for case, arrays in whole.items():
            for one, other in zip(found[case], arrays, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=case)
    assert each[0] == each[1]
