"""Real processes and real signals: a run that is asked to stop, or killed, loses nothing that was saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from portatrain.run_dir import RunDir

OPTIONS = [
    f"--set={o}"
    for o in (
        "model.layers=1", "model.embed=32", "model.mlp=64", "data.seq_len=64", "batch=4", "steps=4000",
        "eval_every=none", "hooks=()", "checkpoint_every=20",
    )
]  # fmt: skip


def start(run: Path, *more: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "portatrain.cli",
        "train",
        "tiny-lm",
        "--run-dir",
        str(run),
        *OPTIONS,
        *more,
    ]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def steps(run: Path) -> int:
    return len(RunDir(run).curve()) if (run / "run.json").exists() else 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85), (signal.SIGUSR1, 85)]
)
def test_a_signal_ends_the_step_saves_and_leaves(number: int, code: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_until(lambda: steps(run) > 5, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    reached = steps(run)
    committed = sorted(p.parent.name for p in (run / "checkpoints").glob("*/COMMIT"))
    assert committed[-1] == f"step-{reached:08d}"
    assert not (run / "DONE").exists() and not (run / "claim").exists()
    again = start(run, f"--stop-at={reached + 3}")
    _, errors = again.communicate(timeout=90)
    assert again.returncode == 85, errors
    assert steps(run) == reached + 3
    assert [e["verdict"] for e in RunDir(run).events("resumed")] == ["continuous"]


def test_a_killed_run_goes_on_from_its_last_commit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_until(lambda: bool(list((run / "checkpoints").glob("*/COMMIT"))) and steps(run) > 30, process)
    process.kill()
    process.communicate(timeout=60)
    newest = max(int(p.parent.name[5:]) for p in (run / "checkpoints").glob("*/COMMIT"))
    again = start(run, f"--stop-at={newest + 5}", "--backend=torch")
    _, errors = again.communicate(timeout=90)
    assert again.returncode == 85, errors
    (seam,) = RunDir(run).events("resumed")
    assert (seam["step"], seam["verdict"]) == (newest, "continuous")
    curve = RunDir(run).curve()
    assert [row["step"] for row in curve] == list(range(1, newest + 6))  # no step missing, none twice
