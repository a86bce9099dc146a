"""jax in several processes, as on a pod with a process a host: gradients, curves, all state against one device."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.base import missing
from portatrain.errors import UserError
from portatrain.runs.run_dir import RunDir
from portatrain.system.processes import run_processes
from tests.support.mesh_cases import CASES
from tests.support.mesh_compare import differences
from tests.support.mesh_measure import Measured, measure

pytestmark = [pytest.mark.meshes, pytest.mark.skipif(bool(missing("jax")), reason="jax is not installed")]

PLAIN = ("lm, accumulation, dropout", "vit, accumulation, dropout")
FOUR = [
    ("fsdp=4", PLAIN[0]),
    ("fsdp=2,tensor=2", PLAIN[1]),
    ("replica=2,fsdp=2", "lm, clipping, averages, frozen"),
    ("context=2,tensor=2", "lm, untied, all options"),
    ("expert=4", "routed"),
    ("expert=4", "mixture"),
    ("expert=2,tensor=2", "mixture, LoRA"),
    ("fsdp=2,expert=2", "mixture, bf16"),
    ("fsdp=2,tensor=2", "lm, LoRA"),
    ("context=2,tensor=2", "lm, growing batch, averages"),
    ("fsdp=2,tensor=2", "lm, bf16 state"),
    ("fsdp=2,tensor=2", "lm, Muon"),
    ("fsdp=4", "towers"),
    ("fsdp=2,tensor=2", "latent"),
    ("context=2,tensor=2", "attention by rule"),
]
"""Cells of two processes with two devices each."""
MUTANT = ("every process trains on the first rows", FOUR[0][1])


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """What two processes found, cell by cell."""
    out = tmp_path_factory.mktemp("jax") / "found"
    cells = [(case, mesh, False) for mesh, case in FOUR] + [(FOUR[0][1], FOUR[0][0], True)]
    given = {"cells": cells, "devices": 4, "out": str(out)}
    assert run_processes(2, "tests.support.jax_worker:main", given) == 0
    with out.open("rb") as stream:
        return {cell: pickle.load(stream) for cell in (*FOUR, MUTANT)}


@pytest.fixture(scope="session")
def alone() -> Callable[[str], Measured]:
    from portatrain.backends.jax import JaxBackend

    done: dict[str, Measured] = {}

    def run(case: str) -> Measured:
        if case not in done:
            done[case] = measure(JaxBackend, CASES[case], "")
        return done[case]

    return run


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("mesh", "case"), FOUR)
def test_two_processes_follow_one_device(mesh: str, case: str, two: Any, alone: Any) -> None:
    found = two[mesh, case]
    assert isinstance(found, Measured), found
    failures = differences(alone(case), found, case)
    assert not failures, "\n".join(failures)
    program = CASES[case].program(mesh)
    held = [program.layout.box(t, program.layout.mesh.coordinates(0))[1] for t in program.definition.params.values()]
    width = 2 if case == "lm, bf16 state" else 4
    one_device = width * sum(_product(shape) for shape in held)
    assert found.bytes["params"] == 2 * one_device  # of two devices, and of no others


@pytest.mark.timeout(600)
def test_wrong_rows_are_seen(two: Any, alone: Any) -> None:
    assert differences(alone(MUTANT[1]), two[MUTANT], MUTANT[1])


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


SIZES = ["steps=6", "schedule.warmup=2", "batch=16", "accumulation=2", "model.layers=2", "model.embed=32"]


def _train(run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    sizes = [word for size in SIZES for word in ("--set", size)]
    words = [sys.executable, "-m", "portatrain.cli", "train", "tiny-vit", "--backend", "jax", "--run-dir", str(run)]
    return subprocess.run([*words, *sizes, *more], capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_run_moves_from_one_process_to_two_and_back(tmp_path: Path) -> None:
    alone = _train(tmp_path / "one", "--stop-at", "6")
    assert alone.returncode in (0, 85), alone.stderr
    many = tmp_path / "many"
    moves = [
        ("2", ["--devices", "2"]),
        ("4", ["--mesh", "fsdp=2,tensor=2", "--processes", "2"]),
        ("6", ["--mesh", "fsdp=4", "--devices", "4"]),
    ]
    for stop, how in moves:
        done = _train(many, "--stop-at", stop, *how)
        assert done.returncode in (0, 85), done.stderr
        assert "Traceback" not in done.stderr
    one, two = RunDir(tmp_path / "one").curve(), RunDir(many).curve()
    assert [r["step"] for r in two] == [r["step"] for r in one] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-6 * a["loss"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--devices", "4", "--processes", "3"], "3 processes: expected a number that divides"),
        (["--processes", "0"], "--processes: expected a whole number of at least 1"),
        (["--backend", "torch", "--devices", "4", "--processes", "2"], "Leave --processes out"),
    ],
)
def test_bad_counts_of_processes(more: list[str], said: str, tmp_path: Path) -> None:
    done = _train(tmp_path / "run", *more)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_processes_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from portatrain.backends.jax.mesh import join

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="process 0 of 2: expected MASTER_ADDR and MASTER_PORT"):
        join()
