"""A model that a recipe file defines is exported from its run, in a process that has not loaded the file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import forks
from tests.support.running import BACKENDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    with forks.serving():
        yield


def portatrain(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), forks.QUICK: "1"}
    return forks.run([sys.executable, "-m", "portatrain", *words], cwd=folder, env=env, timeout=200)


@pytest.mark.parametrize("to", ["torch", "nnx"])
def test_from_the_run_and_by_naming_the_file(to: str, tmp_path: Path) -> None:
    pytest.importorskip({"torch": "torch", "nnx": "flax"}[to])
    assert portatrain(tmp_path, "init", "mine.py", "--model", "own", "--data", "images").returncode == 0
    sets = ["--set", "steps=2", "--set", "schedule.warmup=1", "--set", "hooks=()", "--backend", BACKENDS[-1]]
    trained = portatrain(tmp_path, "train", "mine.py", "--run-dir", "run", *sets)
    assert trained.returncode == 0, trained.stderr
    made = portatrain(tmp_path, "ckpt", "export", "run", "out", "--to", to)
    assert made.returncode == 0 and any((tmp_path / "out").iterdir()), made.stderr

    (tmp_path / "mine.py").rename(tmp_path / "moved.py")  # the file that the run recorded is gone
    lost = portatrain(tmp_path, "ckpt", "export", "run", "lost", "--to", to)
    assert lost.returncode == 2 and "Traceback" not in lost.stderr
    (tmp_path / "there").mkdir()
    (tmp_path / "moved.py").rename(tmp_path / "there" / "mine.py")
    found = portatrain(tmp_path, "ckpt", "export", "run", "found", "--to", to, "--recipe", "there/mine.py")
    assert found.returncode == 0, found.stderr
