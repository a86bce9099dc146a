"""A job on two hosts of two processes each, where the scheduler starts one process a host, as Kubernetes does: here
both hosts are this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from portatrain.runs.run_dir import RunDir
from portatrain.system.environment import HOST_PROCESSES
from portatrain.system.processes import free_port

pytestmark = [pytest.mark.meshes, pytest.mark.timeout(300)]

SMALL = [
    f"--set={o}"
    for o in (
        "model.layers=1",
        "model.embed=32",
        "model.mlp=64",
        "data.seq_len=64",
        "batch=4",
        "steps=40",
        "eval_every=none",
        "hooks=()",
        "checkpoint_every=none",
    )
]


def pods(run: Path, *words: str) -> list[tuple[int, str]]:
    """(exit code, standard error) of each of two pods."""
    port = str(free_port())
    started = []
    for index in range(2):
        env = {
            **os.environ,
            "JOB_COMPLETION_INDEX": str(index),
            "PORTATRAIN_HOSTS": "2",
            HOST_PROCESSES.name: "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, "-m", "launchers.rank_entry", "train", "tiny-lm", "--run-dir", str(run)]
        started.append(
            subprocess.Popen(
                [*command, "--backend=torch", *SMALL, *words],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    try:
        return [(p.returncode, e) for p in started for _, e in [p.communicate(timeout=240)]]
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait(10)


def test_the_processes_of_all_hosts_are_one_group(tmp_path: Path) -> None:
    ended = pods(tmp_path / "run", "--mesh=fsdp=4", "--stop-at=3")
    assert [code for code, _ in ended] == [85, 85], ended
    assert sorted(p.name for p in (tmp_path / "run/attempts/1/beats").iterdir()) == [f"rank-{r}.json" for r in range(4)]
    assert len(RunDir(tmp_path / "run").curve()) == 3


def test_a_mistake_is_said_once_a_host(tmp_path: Path) -> None:
    ended = pods(tmp_path / "run", "--mesh=fsdp=8")
    assert [code for code, _ in ended] == [2, 2], ended
    assert all("fsdp=8" in error and "Traceback" not in error for _, error in ended), ended
