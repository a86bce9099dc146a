"""Signals that come while the main thread is in a call that lasts, notices of clouds, and hangs: real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from launchers.rank_entry import rank_variables as variables
from portatrain.errors import UserError
from portatrain.system.cloud_notices import Notices, noticed, source
from portatrain.system.environment import GRACE_S, NOTICES
from portatrain.system.watchdog import behind

ROOT = Path(__file__).parents[2]

# pbkdf2 stays in C for minutes, as a compiler does: a Python handler would not run before it returns.
BUSY = """
import hashlib, sys
from portatrain.system.stop_signals import StopSignals
with StopSignals() as signals:
    signals.trained = sys.argv[1] == "trained"
    signals.on_asked = lambda kind: print("asked", kind, flush=True)
    signals.on_leaving = lambda why: print("leaving:", why, flush=True)
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
"""


@pytest.fixture
def busy() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(busy: list[subprocess.Popen[str]], how: str, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    busy.append(process)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_with_nothing_to_save_it_leaves_at_once(busy: list[subprocess.Popen[str]], number: int, code: int) -> None:
    process = start(busy, "untrained")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "leaving: no step was trained yet" in out and "continues from its newest checkpoint" in err


def test_with_something_to_save_it_waits_for_the_trainer_until_the_grace_is_nearly_over(
    busy: list[subprocess.Popen[str]],
) -> None:
    process = start(busy, "trained", **{GRACE_S.name: "3"})
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert process.poll() is None
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 85 and "asked preempt" in out and "grace of 3 s" in out


@pytest.mark.parametrize("apart_s", [0.0, 1.5])  # on a busy machine they are seconds apart
def test_a_second_signal_leaves_at_once_but_not_another_one_of_the_same_request(
    busy: list[subprocess.Popen[str]], apart_s: float
) -> None:
    process = start(busy, "trained")
    process.send_signal(signal.SIGUSR1)
    time.sleep(apart_s)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 85 and "a second signal came" in out


class Metadata(BaseHTTPRequestHandler):
    answers: dict[str, str]

    def do_GET(self) -> None:
        text = self.answers.get(self.path)
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[tuple[str, dict[str, str]]]:
    answers: dict[str, str] = {}
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (Metadata,), {"answers": answers}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()
    thread.join()


def test_notices_of_clouds(metadata: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, answers = metadata
    base = "/computeMetadata/v1/instance"
    answers |= {f"{base}/preempted": "FALSE", f"{base}/maintenance-event": "NONE"}
    assert not noticed("gcp", url) and not noticed("aws", url) and not noticed("gcp", "http://127.0.0.1:1")
    answers[f"{base}/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert noticed("gcp", url)
    answers["/latest/meta-data/spot/instance-action"] = '{"action": "terminate"}'
    assert noticed("aws", url)
    monkeypatch.setenv(NOTICES.name, f"gcp={url}")
    asked = threading.Event()
    with Notices(asked.set, every_s=0.05):
        assert asked.wait(10)
    with pytest.raises(UserError, match="one of aws, gcp"):
        source("azure")


def test_where_a_process_is_by_its_scheduler() -> None:
    head = {"MASTER_ADDR": "head", "MASTER_PORT": "1"}
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    assert variables({**slurm, **head}) == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert variables({**slurm, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == {}
    pod = {"JOB_INDEX": "2", "JOB_COMPLETION_INDEX": "1", "PORTATRAIN_HOSTS": "12", "PORTATRAIN_SLICE_HOSTS": "4"}
    assert variables({**pod, **head})["RANK"] == "9"
    tpu = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    assert variables({**tpu, **head}) == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    # The pods of a JobSet on TPUs have Cloud TPU's variables too: they count within a slice.
    assert variables({**pod, **tpu, **head})["RANK"] == "9"
    assert variables({"RANK": "0", "WORLD_SIZE": "2", **slurm}) == {}
    with pytest.raises(UserError, match="MASTER_ADDR"):
        variables(slurm)
    with pytest.raises(UserError, match="SLURM_PROCID: expected a whole number"):
        variables({**slurm, **head, "SLURM_PROCID": "abc"})
    with pytest.raises(UserError, match="rank below 4"):
        variables({**slurm, **head, "SLURM_PROCID": "7"})


def row(process: int, step: int, phase: str, host: str = "", unix_s: float = 100.0) -> dict[str, object]:
    return {"process": process, "host": host or f"host{process}", "step": step, "phase": phase, "unix_s": unix_s}


@pytest.mark.parametrize(
    ("rows", "processes", "hosts", "words"),
    [
        ([row(0, 5, "step"), row(1, 5, "data")], 2, ["host1"], "phase 'data' of step 5"),
        ([row(0, 5, "agree"), row(1, 4, "save")], 2, ["host1"], "phase 'save' of step 4"),
        ([row(0, 5, "step"), row(1, 5, "step", unix_s=10.0)], 2, ["host1"], "no sign of life"),
        ([row(0, 5, "step")], 2, [], "Processes 1 give no sign of life"),
        ([row(0, 5, "step"), row(1, 5, "step")], 2, [], "None is behind"),
    ],
)
def test_who_is_behind(rows: list[dict[str, object]], processes: int, hosts: list[str], words: str) -> None:
    found = behind({int(str(r["process"])): r for r in rows}, processes)
    assert found["hosts"] == hosts and words in found["text"]
