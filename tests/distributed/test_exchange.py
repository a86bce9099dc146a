"""The exchange of experts: the bytes that travel are those that the routing implies, and values and gradients are those
of the dense oracle in float64, with any load, with experts without tokens, and with all tokens at one."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import missing
from portatrain.model.layout import Mesh
from portatrain.system.processes import run_processes
from portatrain.testing.tolerance import amplification, tolerance
from tests.support.exchange import EMBED, EXPERTS, LOADS, ROWS, SEQ, dense, program

pytestmark = [pytest.mark.meshes, pytest.mark.skipif(bool(missing("torch")), reason="torch is not installed")]

TORCH = {2: ["expert=2"], 4: ["expert=4", "fsdp=2,expert=2", "expert=2,tensor=2"]}
JAX = ["expert=2", "expert=4", "fsdp=2,expert=2", "expert=2,tensor=2"]
ROW = EMBED * 4
"""Bytes of a row in float32."""

Oracle = tuple[float, dict[str, np.ndarray], np.ndarray, dict[str, float]]


@cache
def oracle(load: str) -> Oracle:
    """The loss, the gradients, the load of each sample, and the tolerance of each gradient."""
    from portatrain.backends.torch import TorchBackend

    backend = TorchBackend(program(load, ""))
    boxes = backend.local_boxes(backend.init_state())
    params = {box.name: box.fetch().astype(np.float64) for box in boxes if box.role == "params"}
    loss, gradients, loads_BX = dense(load, params)
    bounds = {}
    for name, gradient in gradients.items():
        change = amplification(
            lambda *p, name=name: dense(load, dict(zip(params, p, strict=True)))[1][name],
            list(params.values()),
            gradient,
            np.random.default_rng(1),
        )
        bounds[name] = tolerance(float(np.abs(gradient).max()), change)
    return loss, gradients, loads_BX, bounds


def _check(load: str, loss: float, gradients: dict[str, np.ndarray]) -> None:
    due, due_gradients, loads_BX, bounds = oracle(load)
    assert ((loads_BX.sum(0) == 0).tolist(), load) in (
        ([False] * 4, LOADS[0]),
        ([True, False, False, True], LOADS[1]),
        ([True, True, False, True], LOADS[2]),
    )
    assert abs(loss / due - 1) <= 1e-6
    assert gradients.keys() == due_gradients.keys()
    for name, gradient in due_gradients.items():
        off = np.abs(gradients[name] - gradient).max()
        assert off <= bounds[name], (name, off, bounds[name])
        if "experts" in name:  # those that get no token
            idle = loads_BX.sum(0) == 0
            assert not np.any(gradients[name][idle]) and np.all(np.any(gradients[name][~idle], axis=(1, 2)))


@pytest.fixture(scope="module")
def in_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    found = {}
    for n, meshes in TORCH.items():
        cells, out = [(load, mesh) for mesh in meshes for load in LOADS], tmp_path_factory.mktemp("torch") / "found"
        assert run_processes(n, "tests.support.exchange:torch_main", {"cells": cells, "out": str(out)}) == 0
        with out.open("rb") as stream:
            found |= {cell: pickle.load(stream) for cell in cells}
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("mesh", [mesh for meshes in TORCH.values() for mesh in meshes])
def test_torch_sends_the_rows_that_the_routing_sends(mesh: str, load: str, in_torch: Any) -> None:
    loss, gradients, sent = in_torch[load, mesh]
    _check(load, loss, gradients)
    parsed = Mesh.parse(mesh)
    groups = parsed.fsdp * parsed.expert
    loads_GX = oracle(load)[2].reshape(groups, ROWS // groups, EXPERTS).sum(1)
    travelled = implied = 0
    for process, exchanges in enumerate(sent):
        at = parsed.coordinates(process)
        mine = at["fsdp"] * parsed.expert + at["expert"]
        first = at["fsdp"] * parsed.expert
        rows_RR = loads_GX[first : first + parsed.expert].reshape(parsed.expert, parsed.expert, -1).sum(2)  # [from, to]
        there, back = rows_RR[at["expert"]].tolist(), rows_RR[:, at["expert"]].tolist()
        # Rows there, results back; gradients of results there, of rows back.
        assert exchanges == [(rows, ROW) for rows in (there, back, there, back)]
        others = [r for r in range(parsed.expert) if r != at["expert"]]
        travelled += sum(rows[r] * size for rows, size in exchanges for r in others)
        implied += 4 * ROW * (loads_GX[mine].sum() - rows_RR[at["expert"], at["expert"]])
    print(f"{mesh}, {load}: {travelled} bytes travel in all")
    assert 0 < travelled == implied  # there and back, all rows that leave their process


@pytest.fixture(scope="module")
def in_jax(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    cells, out = [(load, mesh) for mesh in JAX for load in LOADS], tmp_path_factory.mktemp("jax") / "found"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "tests.support.exchange", json.dumps(cells), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with Path(out).open("rb") as stream:
        return {cell: pickle.load(stream) for cell in cells}


@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(missing("jax")), reason="jax is not installed")
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("mesh", JAX)
def test_jax_on_a_cpu_sends_blocks_for_all_rows_to_each_device(mesh: str, load: str, in_jax: Any) -> None:
    loss, gradients, given = in_jax[load, mesh]
    _check(load, loss, gradients)
    parsed = Mesh.parse(mesh)
    rows = ROWS // (parsed.fsdp * parsed.expert) * SEQ * program(load, "").definition.model.chosen
    # Four exchanges, each with a block for every device, itself included, that has room for all rows of this one: of
    # the rows that travel one in `expert` is a token's, the others pad. Then the number of rows for each expert.
    blocks = 4 * parsed.expert * rows * ROW
    print(f"{mesh}, {load}: {given:.0f} bytes a device, of which {blocks // parsed.expert} are rows of tokens")
    assert given == blocks + 4 * EXPERTS
