"""Copies of a box read in parts and exchanged: the same state, bit for bit, and every byte asked of storage once."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from checkpoints_format import LocalStore, Reader, Want
from portatrain.backends.base import missing
from portatrain.backends.state import full_name, inventory
from portatrain.backends.torch import TorchBackend
from portatrain.checkpoint import shared_reads
from portatrain.checkpoint.format_layout import format_layout
from portatrain.checkpoint.locations import step_name
from portatrain.checkpoint.restore import boxes_of
from portatrain.checkpoint.saver import Checkpoints
from portatrain.system.environment import READ_ONCE
from portatrain.system.processes import run_processes
from tests.support.mesh_cases import CASES

pytestmark = pytest.mark.meshes

CELLS = [
    ("lm, clipping, averages, frozen", "replica=4"),
    ("lm, accumulation, dropout", "replica=2,fsdp=2"),
    ("lm, untied, all options", "context=2,tensor=2"),
    ("lm, bf16 state", "replica=2,tensor=2"),
    ("lm, Muon", "replica=2,context=2"),
    ("routed", "replica=2,expert=2"),
    ("nested", "replica=4"),
]
WRONG = (CELLS[0][0], CELLS[0][1])
CROSSED = [CELLS[1], CELLS[2], CELLS[5]]
"""Of jax, on devices in an order in which a process does not hold neighbours."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By case a checkpoint of one process, after a step, so that slots are not zero."""
    found = {}
    for case in dict.fromkeys(case for case, _ in CELLS):
        backend = TorchBackend(CASES[case].program(""))
        state, _ = backend.step(backend.init_state(), CASES[case].batches()[0], step=1, scale=1.0)
        checkpoints = Checkpoints(tmp_path_factory.mktemp("saved"))
        checkpoints.save(1, backend, state, {})
        checkpoints.wait()
        found[case] = str(checkpoints.location.open(1).path)
    return found


@pytest.fixture(scope="module", params=["torch", "jax"])
def found(request: pytest.FixtureRequest, saved: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By case, mesh and way what every process found: torch in four processes, jax in two with two devices each."""
    if missing(request.param):
        pytest.skip(f"{request.param} is not installed")
    out = tmp_path_factory.mktemp("found")
    ways = [(*cell, how) for cell in CELLS for how in ("each", "parts")] + [(*WRONG, "wrong")]
    if request.param == "jax":
        ways += [(*cell, "crossed") for cell in CROSSED]
    cells = [(case, mesh, saved[case], how) for case, mesh, how in ways]
    given = {"cells": cells, "devices": 4, "out": str(out), "backend": request.param}
    processes = 4 if request.param == "torch" else 2
    assert run_processes(processes, "tests.support.restore_worker:main", given) == 0
    each = [pickle.loads((out / str(r)).read_bytes()) for r in range(processes)]
    return {**dict(zip(ways, zip(*each, strict=True), strict=True)), "out": out}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("case", "mesh"), CELLS, ids=lambda word: word.replace(" ", "-"))
def test_the_state_is_the_same_and_read_once(
    case: str, mesh: str, found: Any, saved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reads, "LEAST_BYTES", 1)
    each, parts = found[case, mesh, "each"], found[case, mesh, "parts"]
    for process in (*each, *parts):
        assert not isinstance(process, str), process
        _, wrong, boxes = process
        assert boxes
        assert wrong == []
    program, processes = CASES[case].program(mesh), len(parts)
    shares = shared_reads.shares_of(program, processes)
    with LocalStore(Path(saved[case])) as store:
        reader = Reader(store)
        wants = [
            [
                [Want(name, box) for name, boxes in asked.items() for box in dict.fromkeys(boxes)]
                for asked in (boxes_of(program, r, processes, given) for r in range(processes))
            ]
            for given in ({}, shares)
        ]
        planned = [[reader.plan(of_process) for of_process in way] for way in wants]
        sizes = {t.name: t.nbytes for t in reader.layout.tensors}
    wanted = [sum(plan.wanted_bytes for plan in way) for way in planned]
    shared = sum(sizes[full_name(*key)] for key in shares)
    assert shared > 0.5 * sum(sizes.values())
    assert wanted[0] - wanted[1] >= shared  # at least one copy less of each
    # What is asked of storage is that and no more, tiles that a part's end cuts read whole; and a model's States, which
    # torch has whole on every process where the layout cuts them.
    states = sum(size for name, size in sizes.items() if name.startswith("state/"))
    for way, read in zip(planned, (each, parts), strict=True):
        for plan, (nbytes, *_) in zip(way, read, strict=True):
            assert plan.read_bytes <= nbytes <= plan.read_bytes + states


@pytest.mark.parametrize(("case", "mesh"), CROSSED, ids=lambda word: word.replace(" ", "-"))
def test_devices_in_another_order(
    case: str, mesh: str, found: Any, saved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they hold is restored, by requests that were foreseen, and saved again as it was."""
    if (case, mesh, "crossed") not in found:
        pytest.skip("torch numbers its processes as the mesh wants them")
    monkeypatch.setattr(shared_reads, "LEAST_BYTES", 1)
    program, owners = CASES[case].program(mesh), (0, 1, 0, 1)
    shares = shared_reads.shares_of(program, 2, owners=owners)
    with (
        LocalStore(Path(saved[case])) as store,
        LocalStore(found["out"] / f"again {case} {mesh}" / step_name(1)) as again,
    ):
        reader, other = Reader(store), Reader(again)
        states = sum(t.nbytes for t in reader.layout.tensors if t.role == "state")
        for process, read in enumerate(found[case, mesh, "crossed"]):
            assert not isinstance(read, str), read
            nbytes, wrong, boxes = read
            assert boxes
            assert wrong == []
            asked = boxes_of(program, process, 2, shares, owners)
            plan = reader.plan([Want(n, box) for n, boxes in asked.items() for box in dict.fromkeys(boxes)])
            assert plan.read_bytes <= nbytes <= plan.read_bytes + states
        assert set(other.names) == set(reader.names)
        for name in reader.names:
            assert other.read(name).tobytes() == reader.read(name).tobytes()


def test_gaps_that_a_store_reads_over_are_not_shared() -> None:
    program = CASES["lm"].program("replica=4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_reads, "LEAST_BYTES", 1)
        exact, over = (shared_reads.shares_of(program, 4, gap_bytes=gap) for gap in (0, 1 << 20))
    assert len(over) < len(exact)
    infos = {tensor.key: tensor.info for tensor in inventory(program)}
    assert all(not infos[key].stack_dims for key in over)  # one part a process, and no gap


def test_a_part_of_another_process_is_seen(found: Any) -> None:
    if len(found[(*WRONG, "wrong")]) == 2:
        pytest.skip("jax cuts by its own shardings, which the mutant leaves as they are")
    for process in found[(*WRONG, "wrong")]:
        assert not isinstance(process, str), process
        assert process[1]


@pytest.mark.parametrize("mesh", ["replica=4", "replica=2,fsdp=2", "context=2,tensor=2", "replica=2,expert=2,tensor=2"])
def test_the_parts_of_all_processes_are_each_box_once(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reads, "LEAST_BYTES", 1)
    program = CASES["routed"].program(mesh)
    devices = program.layout.mesh.devices
    shares = shared_reads.shares_of(program, devices)
    sizes = {t.name: t for t in format_layout(program).tensors}
    assert shares
    for role, name in shares:
        full = f"{role}/{name}"
        boxes = [b for r in range(devices) for b in boxes_of(program, r, devices, shares)[full]]
        assert len(set(boxes)) == len(boxes) == devices
        assert sum(box.size for box in boxes) * sizes[full].item_bytes == sizes[full].nbytes


def test_within_a_process_there_is_nothing_to_share() -> None:
    assert not shared_reads.shares_of(CASES["lm"].program("replica=4"), 1)
    assert not shared_reads.pays(1, remote=True)


@pytest.mark.parametrize(
    ("processes", "here", "remote", "said", "expected"),
    [
        (4, "4", False, None, False),
        (4, "4", True, None, True),
        (4, "2", False, None, True),
        (4, "4", True, "0", False),
        (4, "4", False, "1", True),
    ],
)
def test_where_it_pays(
    processes: int, here: str, remote: bool, said: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.delenv(READ_ONCE.name, raising=False)
    if said is not None:
        monkeypatch.setenv(READ_ONCE.name, said)
    assert shared_reads.pays(processes, remote=remote) is expected
