"""The table of stop requests: which signal comes, in which phase, to which process, on which backend; what follows."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from portatrain.runs.run_dir import RunDir
from tests.support.pairwise import Row
from tests.support.stop_worker import PHASES, UNTRAINED

WORDS = ["model.layers=1", "model.embed=16", "model.heads=2", "model.mlp=16", "data.seq_len=32", "batch=4"]
WORDS += ["schedule.warmup=2", "hooks=()", "eval_every=3", "eval_batches=1", "eval_final_batches=none"]
WORDS += ["checkpoint_every=3"]
SAME_S = 1.2
"""Longer than StopSignals takes two signals of one kind for one request."""

REQUESTS = ("TERM", "INT", "USR1", "HUP", "TERM TERM", "INT INT")
ONE = {"phase": PHASES, "request": REQUESTS, "backend": ("torch", "jax")}
TWO = {**ONE, "backend": (*ONE["backend"], "deepspeed-2"), "told": ("all", "0", "1")}
"""The columns for one process and for two."""


def command(run: Path, backend: str, steps: int) -> list[str]:
    sets = [f"--set={word}" for word in [*WORDS, f"steps={steps}"]]
    return ["train", "tiny-lm", "--run-dir", str(run), f"--backend={backend}", *sets]


def prepare(folder: Path, row: Row, trained: Path) -> list[str]:
    """The command of a case."""
    if row["phase"] == "restore":
        shutil.copytree(trained, folder / "run")
    return command(folder / "run", row["backend"], 5 if row["phase"] in ("final", "exit") else 4000)


def wait_for(condition: Callable[[], bool], said: Callable[[], str], seconds: float = 120) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, said()
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Return whether a process runs, or has ended and was not waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def tell(folder: Path, row: Row, pids: list[int]) -> None:
    """Send the request, then let the processes that wait go on."""
    for i, name in enumerate(row["request"].split()):
        if i:
            time.sleep(SAME_S)
        for pid in pids:
            try:
                os.kill(pid, signal.Signals[f"SIG{name}"])
            except ProcessLookupError:
                assert i or row["phase"] in UNTRAINED, "it left before it was told"
    time.sleep(0.3)
    (folder / "go").touch()


def check(folder: Path, row: Row, code: int, said: str) -> None:
    """The exit code tells what was asked, what was trained is saved, and nothing is left behind."""
    run = folder / "run"
    interrupted, twice = row["request"].startswith("INT"), " " in row["request"]
    assert "Traceback" not in said or row["phase"] == "start", said
    done = (run / "DONE").exists()
    if done:
        assert row["phase"] == "exit" and code == 0, (code, said)
    else:
        killed = (
            () if row["phase"] != "start" or "told" in row else (-signal.Signals[f"SIG{row['request'].split()[0]}"],)
        )
        assert code in (130 if interrupted else 85, *killed), (code, said)
    curve = len(RunDir(run).curve()) if (run / "run.json").exists() else 0
    committed = max((int(p.parent.name[5:]) for p in (run / "checkpoints").glob("*/COMMIT")), default=0)
    if row["phase"] in UNTRAINED:
        assert curve == committed == (2 if row["phase"] == "restore" else 0), said
    elif not twice:
        assert curve == committed > 0, said
    assert not (run / "claim").exists() or RunDir(run).owner() is None, said
    attempts = RunDir(run).attempt_numbers() if (run / "run.json").exists() else []
    if attempts and row["phase"] not in ("start", "join"):
        ends = [e["status"] for e in RunDir(run).rows(attempts[-1], "events") if e["event"] == "end"]
        expected = "done" if done else "interrupted" if interrupted else "preempted"
        lost = twice and row.get("told", "all") != "all"  # a process that leaves at once is lost to the other
        assert ends == [expected] or (lost and ends == ["failed"]), (ends, said)
