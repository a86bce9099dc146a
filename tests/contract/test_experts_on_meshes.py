"""Mixtures of experts on meshes of the jax backend: the gradients of one device, rows that travel and weights that do
not. `tests/distributed/test_meshes.py` has the same for torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.running import BACKENDS

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed")

CODE = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from portatrain.backends.jax import JaxBackend, experts
from tests.support.mesh_cases import CASES, ROWS, SEQ

def gathering(x, out, starts, sizes, there, gets, *, axis_name):
    # What jax.lax.ragged_all_to_all does, which XLA does not compile for a CPU: every device gathers everything.
    me = jax.lax.axis_index(axis_name)
    xs, starts, sizes, there = (jax.lax.all_gather(v, axis_name) for v in (x, starts, sizes, there))
    for r in range(len(xs)):
        at = jnp.arange(len(out)) - there[r, me]
        mine = (at >= 0) & (at < sizes[r, me])
        out = jnp.where(mine[:, None], xs[r, jnp.clip(at + starts[r, me], 0, len(x) - 1)], out)
    return out

jax.lax.ragged_all_to_all = gathering
found = {}
for case, mesh, ragged in json.loads(sys.argv[1]):
    experts.RAGGED = ("cpu",) if ragged else ()
    backend = JaxBackend(CASES[case].program(mesh))
    state = backend.init_state()
    batch = CASES[case].batches()[0]
    placed = backend._put(batch, 1)
    compiled = backend._gradients_of.lower(state, placed, np.int32(1)).compile()
    grads, loss, _, auxes, _ = compiled(state, placed, np.int32(1))
    loads = np.asarray(auxes["router_loads"]["layers"])
    grads = {n: np.array(g) for n, g in grads.items()}
    gathered = [line for line in compiled.as_text().splitlines() if re.search(r"= \\S+ all-gather(-start)?\\(", line)]
    one_loss, one, due = found.setdefault((case), (float(loss), grads, loads))
    worst = max(float(np.abs(g - one[n]).max() / np.abs(one[n]).max()) for n, g in grads.items())
    # The weights of all four experts of a layer, which no device may have.
    of_all = re.compile(r"f32\\[4,(16,(24|12)|(24|12),16)\\]")
    whole = [line for line in gathered if of_all.search(line.split(" all-gather")[0])]
    same_loads = bool((loads == due).all() and loads.sum())
    print(json.dumps([case, mesh, abs(float(loss) / one_loss - 1), worst, len(whole), same_loads]))
"""


def _run(cells: list[tuple[str, str, bool]]) -> None:
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    flags += " --xla_llvm_disable_expensive_passes=true"  # the operation is on trial, not the compiler
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(cells)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [list(cell[:2]) for cell in cells]
    for case, mesh, loss, gradient, whole, same_loads in rows:
        print(case, mesh, loss, gradient)
        assert loss < 1e-6 and gradient < 1.5e-6, (case, mesh, loss, gradient)
        assert same_loads, (case, mesh)
        assert whole == 0 or "expert" not in mesh, (case, mesh, whole)


@pytest.mark.timeout(300)
def test_gradients_are_those_of_one_device() -> None:
    _run([("mixture, one layer", mesh, False) for mesh in ("", "expert=2,tensor=2")])


@pytest.mark.full
@pytest.mark.timeout(600)
def test_other_meshes_and_the_exchange_of_accelerators() -> None:
    cells = [("mixture, one layer", mesh, True) for mesh in ("", "expert=4", "expert=2,context=2")]
    cells += [("mixture, one layer", "fsdp=2,expert=2", False)]
    cells += [("mixture, clamped with biases", mesh, False) for mesh in ("", "expert=2,tensor=2")]
    cells += [("mixture, LoRA", mesh, False) for mesh in ("", "expert=2,tensor=2")]
    cells += [("routed, further tokens", mesh, False) for mesh in ("", "fsdp=2,expert=2")]
    _run(cells)
