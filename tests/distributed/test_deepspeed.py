"""ZeRO 1, 2 and 3 against one process of the torch backend: gradients, curves, all state, evaluation; what is held."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.backends.state import full_name, inventory
from portatrain.errors import UserError
from portatrain.runs.run_dir import RunDir
from portatrain.system.processes import run_processes
from tests.support.mesh_cases import CASES
from tests.support.mesh_compare import alone, differences
from tests.support.mesh_measure import Measured
from tests.support.mesh_mutants import ZERO
from tests.support.train_command import train

__all__ = ["alone"]  # a fixture

pytestmark = [pytest.mark.meshes, pytest.mark.skipif(bool(missing("deepspeed-3")), reason="deepspeed is not installed")]

STAGES = ("deepspeed-1", "deepspeed-2", "deepspeed-3")
CELLS = [
    ("fsdp=2", "lm, accumulation, dropout"),
    ("fsdp=2", "vit, accumulation, dropout"),
    ("fsdp=2", "lm, clipping, averages, frozen"),
    ("fsdp=2", "lm, a step that is not finite"),
    ("replica=2", "lm, a step that is not finite, odd sizes"),
    ("replica=2", "routed"),
    ("fsdp=2", "nested"),
    ("fsdp=2", "lm, LoRA"),
    ("fsdp=2", "lm, muP"),
    ("fsdp=2", "lm, growing batch, averages"),
    ("fsdp=2", "towers"),
    ("fsdp=2", "lm, remat"),
]
PROBED = [
    ("replica=2", "lm, a step that is not finite, odd sizes"),
    ("fsdp=2", "lm, clipping, averages, frozen"),
    ("replica=2", "routed"),
    ("fsdp=2", "nested"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[str, dict[str, Any]] = {}

    def run(backend: str) -> dict[str, Any]:
        if backend not in done:
            out = tmp_path_factory.mktemp("zero") / "found"
            cells = [(f"{mesh}: {case}", "case", (case, mesh, "")) for mesh, case in CELLS]
            cells += [(mutant, "case", (CELLS[0][1], "fsdp=2", mutant)) for mutant in ZERO if backend == STAGES[1]]
            cells += [(f"probe: {case}", "probed", (case, mesh)) for mesh, case in PROBED]
            given = {"cells": cells, "out": str(out), "backend": backend}
            assert run_processes(2, "tests.support.torch_worker:main", given) == 0
            with out.open("rb") as stream:
                done[backend] = dict(pickle.load(stream)[:2] for _ in cells)
        return done[backend]

    return run


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("mesh", "case"), CELLS)
@pytest.mark.parametrize("backend", STAGES)
def test_zero_follows_one_process(backend: str, mesh: str, case: str, found: Any, alone: Any) -> None:
    mine = found(backend)[f"{mesh}: {case}"]
    if backend == "deepspeed-3" and "remat" in case:
        assert "remat 'block' on the deepspeed-3 backend: expected none" in mine
        return
    assert isinstance(mine, Measured), mine
    failures = differences(alone(case), mine, case)
    assert not failures, "\n".join(failures)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for _, case in PROBED])
@pytest.mark.parametrize("backend", STAGES)
def test_a_probe_is_the_step_that_comes_and_changes_nothing(backend: str, case: str, found: Any) -> None:
    """A moment that is zeroed, say, shows in the norm of its tensor."""
    got = found(backend)[f"probe: {case}"]
    assert isinstance(got, dict), got
    probe, before, after, stepped = (got[k] for k in ("probe", "before", "after", "stepped"))
    assert all(np.array_equal(before[k], after[k]) for k in before)
    program = CASES[case].program("")
    total = 0.0
    for tensor in inventory(program):
        key, dims = full_name(*tensor.key), tensor.info.stack_dims
        np.testing.assert_allclose(probe[key], _norms(before[tensor.key], dims), rtol=1e-6, atol=1e-30)
        if tensor.role == "params" and tensor.info.name in program.trainable and "finite" not in case:
            change = stepped[tensor.key].astype(np.float64) - before[tensor.key]
            lost = np.abs(before[tensor.key]).max() * np.sqrt(change.size) * 2.0**-23  # by adding to a float32
            np.testing.assert_allclose(probe[f"update/{tensor.info.name}"], _norms(change, dims), rtol=1e-4, atol=lost)
            total += float(np.square(probe[f"grad/{tensor.info.name}"]).sum())
    assert set(probe) == {full_name(*t.key) for t in inventory(program)} | {
        f"{what}/{name}" for what in ("grad", "update") for name in program.trainable
    }
    if "finite" not in case:
        assert np.sqrt(total) == pytest.approx(got["norm"], rel=1e-5)


def _norms(array: np.ndarray, dims: int) -> np.ndarray:
    return np.linalg.norm(array.astype(np.float64).reshape(*array.shape[:dims], -1), axis=-1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", ZERO)
def test_a_wrong_reduction_is_seen(mutant: str, found: Any, alone: Any) -> None:
    mine = found(STAGES[1])[mutant]
    if isinstance(mine, Measured):
        assert differences(alone(CELLS[0][1]), mine, CELLS[0][1])
    else:
        assert "disagree" in mine or "different values" in mine, mine


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", STAGES)
def test_what_a_process_holds(backend: str, found: Any) -> None:
    """Slots and master copies in halves; parameters whole in stages 1 and 2, in halves in stage 3; all but padding."""
    held = found(backend)["fsdp=2: lm, accumulation, dropout"].bytes
    params = 4 * CASES["lm"].program("").definition.parameters
    tensors = sum(math.prod(t.shape[: t.stack_dims]) for t in CASES["lm"].program("").definition.params.values())
    padding = 64 * tensors
    halves = params / 2
    assert abs(held["params"] - (halves if backend == "deepspeed-3" else params)) <= padding
    assert abs(held["opt"] - 3 * halves) <= 3 * padding  # two slots of AdamW and the float32 copy


@pytest.mark.parametrize(
    ("mesh", "case", "said"),
    [
        ("tensor=2", "lm", "mesh tensor=2 on the deepspeed-2 backend: expected fsdp or replica alone"),
        ("fsdp=2,context=2", "lm", "got fsdp and context"),
        ("replica=2,fsdp=2", "lm", "Use fsdp=4"),
        ("fsdp=2", "lm, Muon", "optimizer Muon on the deepspeed-2 backend: expected one of AdamW, Lion, SGD"),
        ("fsdp=2", "lm, compiled", "Leave compile out"),
        ("fsdp=2", "lm, bf16 state", "precision bf16-state on the deepspeed-2 backend: expected fp32 or bf16"),
    ],
)
def test_what_zero_cannot_do(mesh: str, case: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        backend_class("deepspeed-2")(CASES[case].program(mesh))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_run_moves_onto_zero_and_off_it(tmp_path: Path) -> None:
    """Flat ranges are written as they are, read as boxes by another mesh, and read back as flat ranges."""
    alone = train(tmp_path / "one", "--stop-at", "8")
    assert alone.returncode in (0, 85), alone.stderr
    many = tmp_path / "many"
    legs = [
        ("2", "deepspeed-3", ["--devices", "2"]),
        ("4", "torch", ["--mesh", "replica=2"]),
        ("6", "deepspeed-1", ["--devices", "2"]),
        ("8", "deepspeed-3", ["--devices", "1"]),
    ]
    for stop, backend, how in legs:
        done = train(many, "--stop-at", stop, "--backend", backend, *how)
        assert done.returncode in (0, 85), done.stderr
        assert "Traceback" not in done.stderr
    one, two = RunDir(tmp_path / "one").curve(), RunDir(many).curve()
    assert [r["step"] for r in two] == list(range(1, 9))
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-6 * a["loss"]
    assert [e["verdict"] for e in RunDir(many).events("resumed")] == ["continuous"] * 3
