"""Operations on arrays on meshes: the same values and gradients as on one device, wherever their arrays lie."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from portatrain.backends.base import missing
from portatrain.model.ops_arrays import ArrayOps
from portatrain.system.processes import run_processes
from tests.support.array_table import TABLE

JAX = """
import json
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from portatrain.backends.base import Context
from portatrain.backends.jax import JaxBackend
from portatrain.testing.tolerance import tolerance
from tests.support.array_table import TABLE, arguments, weight

context = Context(seed=3, step=2, sample=np.array([5, 2**32 + 7]), training=True)
given = arguments()

def all_of(x, kernel, index):
    ops = JaxBackend._standalone(context)
    found = []
    for fn in TABLE.values():
        y, back = jax.vjp(lambda x, k: fn(ops, x, k, index), x, kernel)
        found.append((y, *back(weight(y.shape)) ) if y.dtype == np.float32 else (y,))
    return found

mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
run = jax.jit(all_of)
expected = jax.tree.map(np.asarray, run(*given))
bad = []
for dim in range(3):
    lies = NamedSharding(mesh, PartitionSpec(*(("d",) if i == dim else None for i in range(3))))
    rest = (jax.device_put(a, NamedSharding(mesh, PartitionSpec())) for a in given[1:])
    there = jax.device_put(given[0], lies), *rest
    for name, mine, true in zip(TABLE, run(*there), expected):
        for a, b in zip(mine, true):
            a = np.asarray(a)
            allowed = tolerance(size := float(np.abs(b).max()), size) if b.dtype.kind == "f" else 0.0
            if a.shape != b.shape or not np.abs(a - b).max() <= allowed:
                bad.append(f"{name}, x cut along axis {dim}: {np.abs(a - b).max()}")
print(json.dumps(bad))
"""


def test_every_operation_is_in_the_table() -> None:
    operations = {name for name, _ in inspect.getmembers(ArrayOps, inspect.isfunction) if not name.startswith("_")}
    assert operations == {name.split()[0].strip(",") for name in TABLE}


@pytest.mark.meshes
@pytest.mark.parametrize("mesh", ["context=2", "tensor=2"])
def test_on_torch(mesh: str, tmp_path: Path) -> None:
    out = tmp_path / "bad.json"
    args = {"meshes": [mesh], "out": str(out)}
    assert run_processes(2, "tests.support.array_worker:main", args) == 0
    assert json.loads(out.read_text()) == []


@pytest.mark.skipif(bool(missing("jax")), reason="jax is not installed")
def test_on_jax() -> None:
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", JAX], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == []
