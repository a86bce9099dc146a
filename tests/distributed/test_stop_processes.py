"""Every signal in every phase to one or both of two processes, on every backend: they stop together, and save.

`make test-meshes` runs a few rows of the table, and `make soak` all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pairwise import Row, diagonal, rows
from tests.support.stop_cases import TWO, check, command, prepare, tell, wait_for

pytestmark = pytest.mark.meshes

QUICK = diagonal(TWO)
TABLE = [
    pytest.param(row, id=" ".join(row.values()), marks=() if row in QUICK else pytest.mark.soak) for row in rows(TWO)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on one device."""
    folder = tmp_path_factory.mktemp("trained")
    words = [sys.executable, "-m", "portatrain.cli", *command(folder / "run", "torch", 4000), "--stop-at=2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 85, done.stderr
    return folder / "run"


def ranks(parent: int) -> dict[int, int]:
    """The processes that `parent` has started: rank -> pid."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            env = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(fields[1]) == parent:
            found |= {int(entry[5:]): int(folder.name) for entry in env if entry.startswith(b"RANK=")}
    return found


@pytest.mark.parametrize("row", TABLE)
def test_two_processes(row: Row, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    trained = request.getfixturevalue("trained") if row["phase"] == "restore" else tmp_path
    words = [*prepare(tmp_path, row, trained), "--mesh=fsdp=2", *(["--processes=2"] if row["backend"] == "jax" else [])]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.stop_worker", row["phase"], str(tmp_path), *words],
            stdout=log,
            stderr=log,
            env={**os.environ, "PORTATRAIN_LOGS": str(tmp_path)},
        )
    read = (tmp_path / "log").read_text
    there: dict[int, int] = {}
    try:
        awaited = [0, 1] if row["told"] == "all" else [int(row["told"])]
        wait_for(lambda: all((tmp_path / f"at-{r}").exists() for r in awaited) or process.poll() is not None, read)
        there = ranks(process.pid)
        tell(tmp_path, row, [process.pid] if row["told"] == "all" else [there[int(row["told"])]])
        process.wait(60)
    finally:
        for pid in [process.pid, *there.values()] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    said = "".join(path.read_text() for path in [tmp_path / "log", *tmp_path.glob("rank-*.log")])
    check(tmp_path, row, process.returncode, said)
