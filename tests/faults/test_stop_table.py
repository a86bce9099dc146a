"""Every signal in every phase of a run in one process, on every backend: the run saves what it has, and leaves.

`make test` runs a few rows of the table, the long tests every pair of values, and `make soak` all rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pairwise import Row, cover, diagonal, rows
from tests.support.stop_cases import ONE, alive, check, command, prepare, tell, wait_for

QUICK, PAIRS = diagonal(ONE), cover(ONE)
TABLE = [
    pytest.param(
        row,
        id=" ".join(row.values()),
        marks=() if row in QUICK else pytest.mark.full if row in PAIRS else pytest.mark.soak,
    )
    for row in rows(ONE)
]


class Server:
    """Runs cases in forks of one process that has imported the frameworks."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.stop_worker", "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def ask(self, *words: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.process.stdin.close()  # type: ignore[union-attr]
    one.process.wait(30)
    one.process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def trained(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on one device."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "go").touch()
    server.ask("start", str(folder), str(folder / "log"), *command(folder / "run", "torch", 4000), "--stop-at=2")
    assert server.answer() == 85, (folder / "log").read_text()
    return folder / "run"


@pytest.mark.parametrize("row", TABLE)
def test_one_process(row: Row, server: Server, trained: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid = server.ask(row["phase"], str(tmp_path), str(log), *prepare(tmp_path, row, trained))
    # One that ended too soon is judged by `check`, and its exit code is read before that of the next.
    wait_for(lambda: (tmp_path / "at-0").exists() or not alive(pid), log.read_text)
    tell(tmp_path, row, [pid])
    code = server.answer()
    check(tmp_path, row, code, log.read_text())
