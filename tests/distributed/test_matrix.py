"""A pairwise cover of the parity matrix (`make matrix`): every pair of backend, mesh and row in one cell or more."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.matrix.cells import BACKENDS, MESHES, ROWS, cover, installed, refusal
from benchmarks.matrix.run import CELL_S, make_baselines, run_group
from benchmarks.matrix.table import problem, table
from tests.support import forks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the baselines, which all workers share, while cells run in forks."""
    mine = tmp_path_factory.mktemp("matrix")
    with forks.serving():
        yield mine.parents[1] / "matrix-baselines" if "PYTEST_XDIST_WORKER" in os.environ else mine


@pytest.mark.full
@pytest.mark.timeout(2 * CELL_S)
@pytest.mark.parametrize(("backend", "mesh", "row"), cover(), ids=[" | ".join(cell) for cell in cover()])
def test_a_cell(backend: str, mesh: str, row: str, folder: Path) -> None:
    if not installed(backend):
        pytest.skip(f"{backend} is not installed")
    if refusal(backend, mesh, row) is None:
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            make_baselines([(mesh, row)], folder, forks.start_group)
    found = run_group(backend, mesh, [row], folder, forks.start_group)[row]
    print(found)
    assert problem(found) is None, found


def test_the_cover_has_every_pair() -> None:
    cells = cover()
    for a, b in itertools.combinations(range(3), 2):
        names = [list(BACKENDS), list(MESHES), list(ROWS)]
        assert {(c[a], c[b]) for c in cells} == set(itertools.product(names[a], names[b]))


def test_sizes_that_three_does_not_divide_are_refused_everywhere() -> None:
    for backend, row in itertools.product(BACKENDS, ROWS):
        why = refusal(backend, "fsdp=3, sizes as they are", row)
        assert why and "fsdp=3" in why and "nearest sizes that work" in why


def test_what_is_a_problem() -> None:
    def of(**found: object) -> str | None:
        return problem({"bound": 1.5e-6, **found})

    assert of(gradient=1.4e-6, loss=1.4e-6) is None
    assert "gradient off" in (of(gradient=1.6e-6, loss=0.0) or "")
    assert "gradient off" in (of(gradient=float("nan"), loss=0.0) or "")
    assert "loss off" in (of(gradient=0.0, loss=1.6e-6) or "")
    assert "loss off" in (of(gradient=0.0, loss=float("nan")) or "")
    assert "ZeroDivisionError" in (of(failed="Traceback\nZeroDivisionError: no") or "")
    assert of(refused="mesh fsdp=2: expected 2 processes, got one. Start two.") is None
    assert "without saying why" in (of(refused="Killed") or "")


def test_the_table() -> None:
    text = table(
        {
            "torch | fsdp=4 | tiny-lm": {"gradient": 3e-7, "loss": 1e-7, "bound": 1.5e-6, "commit": "abc"},
            "torch | tensor=2 | tiny-lm": {"gradient": 3e-4, "loss": 1e-7, "bound": 1.5e-6, "commit": "abc"},
            "jax | fsdp=3, sizes as they are | tiny-lm": {"refused": "expected a size", "commit": "def"},
        }
    )
    assert "| fsdp=4 | 1.5e-06 |  |  | 3.0e-07, 1.0e-07 |" in text
    assert "**3.0e-04, 1.0e-07**" in text
    assert "[1]" in text and "1. expected a size" in text and "abc, def" in text
