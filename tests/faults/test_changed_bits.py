"""Fingerprints of restored states: one changed bit of any tensor on any process is named, an honest move never is."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.checkpoint.saver import Checkpoints
from portatrain.system.processes import run_processes
from tests.support.fingerprint_worker import Found, look
from tests.support.mesh_cases import CASES

BACKENDS = [name for name in ("jax", "torch") if not missing(name)]
PLAIN = "lm, growing batch, averages"
WIDE = ("lm, bf16 state", "routed", "nested", "lm, Muon", "lm, LoRA", "lm, clipping, averages, frozen", PLAIN)
GROUPS = [
    ("torch", 4, "replica=2,fsdp=2"),
    ("torch", 2, "fsdp=2"),
    ("jax", 2, "replica=2,fsdp=2"),
    ("jax", 2, "fsdp=4"),
    ("deepspeed-1", 2, "fsdp=2"),
    ("deepspeed-2", 2, "replica=2"),
    ("deepspeed-3", 2, "fsdp=2"),
]
"""(backend, processes, mesh). DeepSpeed takes neither Muon nor a state in bfloat16."""
NOT_ZERO = ("lm, bf16 state", "lm, Muon")


def saved_by(name: str, case: str, folder: Path) -> str:
    """A checkpoint of one process after two steps, so that no tensor is zero."""
    backend = backend_class(name)(CASES[case].program(""))
    state = backend.init_state()
    for step, batch in enumerate(CASES[case].batches()[:2], start=1):
        state, _ = backend.step(state, batch, step=step, scale=1.0)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, backend, state, {})
    checkpoints.wait()
    return str(folder / "step-00000001")


@pytest.mark.parametrize("name", BACKENDS)
def test_one_changed_bit_of_a_restored_state_is_named(name: str, tmp_path: Path) -> None:
    folder = saved_by(BACKENDS[-1], PLAIN, tmp_path)
    found = look(backend_class(name)(CASES[PLAIN].program("")), folder, 100, seed=1)
    assert found.honest == [] and found.missed == []
    assert found.flipped.total() >= 100 and {"params", "ema", "opt/m", "opt/v"} <= set(found.flipped)


def run(group: tuple[str, int, str], cells: list[Any], out: Path) -> list[Any]:
    name, processes, _ = group
    out.mkdir()
    given = {"cells": cells, "devices": 4, "out": str(out), "backend": name, "seed": 7}
    assert run_processes(processes, "tests.support.fingerprint_worker:main", given) == 0
    return list(zip(*(pickle.loads((out / str(r)).read_bytes()) for r in range(processes)), strict=True))


def cases_of(name: str) -> list[str]:
    return [c for c in WIDE if not (name.startswith("deepspeed") and c in NOT_ZERO)]


def check(cells: list[Any], found: list[Any]) -> Counter[str]:
    """Every process of every cell saw nothing in an honest restore, and named each changed bit; the bits, by role."""
    flipped: Counter[str] = Counter()
    for cell, processes in zip(cells, found, strict=True):
        for process in processes:
            assert isinstance(process, Found), (cell, process)
            assert process.honest == [], cell
            assert process.missed == [], cell
            flipped += process.flipped
    return flipped


@pytest.mark.meshes
@pytest.mark.timeout(300)
@pytest.mark.parametrize("group", [GROUPS[0], GROUPS[2], GROUPS[5], GROUPS[6]], ids=str)
def test_one_changed_bit_on_one_of_several_processes_is_named(group: Any, tmp_path: Path) -> None:
    if missing(group[0]):
        pytest.skip(f"{group[0]} is not installed")
    cells = [
        (case, group[2], saved_by("torch", case, tmp_path / str(i)), 50, None)
        for i, case in enumerate((PLAIN, "routed"))
    ]
    found = run(group, cells, tmp_path / "out")
    assert check(cells, found).total() >= 100
    copies = sum(process.copies.total() for processes in found for process in processes)
    assert (copies > 5) == group[0].startswith("deepspeed")


@pytest.mark.soak
@pytest.mark.timeout(14_000)
def test_ten_thousand_bits_and_two_hundred_moves(tmp_path: Path) -> None:
    """Every group restores a checkpoint of one process, saves it, and restores the checkpoints of every group."""
    groups = [g for g in GROUPS if not missing(g[0])]
    first = {case: saved_by("torch", case, tmp_path / "first" / str(i)) for i, case in enumerate(WIDE)}
    there: list[tuple[str, str]] = []
    moves, flipped = 0, Counter[str]()
    for i, group in enumerate(groups):
        folders = {case: tmp_path / f"again {i} {j}" for j, case in enumerate(WIDE)}
        cells: list[Any] = [(c, group[2], first[c], 30, str(folders[c])) for c in cases_of(group[0])]
        flipped += check(cells, run(group, cells, tmp_path / f"out {i}"))
        moves += len(cells)
        there += [(c, str(folders[c] / "step-00000001")) for c in cases_of(group[0])]
    for i, group in enumerate(groups):
        cells = [(c, group[2], folder, 30, None) for c, folder in sorted(there) if c in cases_of(group[0])]
        flipped += check(cells, run(group, cells, tmp_path / f"moved {i}"))
        moves += len(cells)
    print(f"{moves} honest moves, none refused; {flipped.total()} bits, all named: {dict(flipped)}")
    assert moves >= 200 and flipped.total() >= 10_000
    assert {"params", "ema", "state", "opt/m", "opt/v", "opt/count"} <= set(flipped)
