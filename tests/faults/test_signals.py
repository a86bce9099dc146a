"""Real processes and real signals: a run that is asked to stop, or killed, loses nothing that was saved.

test_stop_table.py has every signal in every phase; here are a run that goes on afterwards, the grace, kills and hangs.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from portatrain.runs.run_dir import RunDir
from tests.support import forks

OPTIONS = [
    f"--set={o}"
    for o in (
        "model.layers=1",
        "model.embed=32",
        "model.mlp=64",
        "data.seq_len=64",
        "batch=4",
        "steps=4000",
        "eval_every=none",
        "hooks=()",
        "checkpoint_every=20",
    )
]


PLAIN = "import sys; from portatrain.cli import main; sys.exit(main())"
# Batches from the 41st sample on do not come to the loop, as when a file system is away.
STALLED = """
import sys, time
from portatrain.cli import main
from portatrain.data import read_ahead
read = read_ahead._read
class Stalls:
    def __init__(self, split):
        self.split = split
    def __getattr__(self, name):
        return getattr(self.split, name)
    def batch(self, start, count):
        if start >= 40:
            time.sleep(3600)
        return self.split.batch(start, count)
read_ahead._read = lambda split, *rest: read(Stalls(split), *rest)
sys.exit(main())
"""
# Saves after the first do not end.
STUCK = """
import sys, time
from portatrain.checkpoint.saver import Checkpoints
from portatrain.cli import main
whole = Checkpoints.save
def save(self, step, *rest, **options):
    if step > 5:
        time.sleep(3600)
    return whole(self, step, *rest, **options)
Checkpoints.save = save
sys.exit(main())
"""
# A signal comes when the attempt has just begun.
BEGINNING = """
import os, signal, sys, time
from portatrain.cli import main
from portatrain.runs.run_dir import RunDir
whole = RunDir.begin
def begin(*rest):
    attempt = whole(*rest)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    return attempt
RunDir.begin = begin
sys.exit(main())
"""
# Says when the continuity record is taken.
RECORDING = """
import sys
from portatrain.training import continuity
from portatrain.cli import main
whole = continuity.record
def record(backend, state, recipe, train, step, **options):
    print("record", step, file=sys.stderr)
    return whole(backend, state, recipe, train, step, **options)
continuity.record = record
sys.exit(main())
"""


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    with forks.serving():
        yield


class Process:
    """A command in a fork, and what it writes to standard error."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._fork = forks.start(command, env=env, stdout=1, stderr=self._errors.fileno())
        self.poll, self.kill, self.send_signal = self._fork.poll, self._fork.kill, self._fork.send_signal

    @property
    def returncode(self) -> int | None:
        return self._fork.returncode

    def ended(self, timeout: float = 60) -> str:
        """Wait for its end; return what it wrote."""
        try:
            self._fork.wait(timeout)
        finally:
            self.kill()
        self._errors.seek(0)
        with self._errors:
            return self._errors.read()


def start(run: Path, *more: str, program: str = PLAIN, **env: str) -> Process:
    command = [sys.executable, "-c", program, "train", "tiny-lm", "--run-dir", str(run), *OPTIONS, *more]
    return Process(command, {**os.environ, forks.QUICK: "1", **env})


def wait_until(condition: Callable[[], bool], process: Process, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.ended()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def steps(run: Path) -> int:
    return len(RunDir(run).curve()) if (run / "run.json").exists() else 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85)])
def test_a_signal_ends_the_step_saves_and_leaves(number: int, code: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_until(lambda: steps(run) > 5, process)
    process.send_signal(number)
    errors = process.ended(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    reached = steps(run)
    committed = sorted(p.parent.name for p in (run / "checkpoints").glob("*/COMMIT"))
    assert committed[-1] == f"step-{reached:08d}"
    assert not (run / "DONE").exists() and not (run / "claim").exists()
    again = start(run, f"--stop-at={reached + 3}")
    errors = again.ended(timeout=90)
    assert again.returncode == 85, errors
    assert steps(run) == reached + 3
    assert [e["verdict"] for e in RunDir(run).events("resumed")] == ["continuous"]


def test_a_killed_run_goes_on_from_its_last_commit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_until(lambda: bool(list((run / "checkpoints").glob("*/COMMIT"))) and steps(run) > 30, process)
    process.kill()
    process.ended()
    newest = max(int(p.parent.name[5:]) for p in (run / "checkpoints").glob("*/COMMIT"))
    again = start(run, f"--stop-at={newest + 5}", "--backend=torch")
    errors = again.ended(timeout=90)
    assert again.returncode == 85, errors
    (seam,) = RunDir(run).events("resumed")
    assert (seam["step"], seam["verdict"]) == (newest, "continuous")
    curve = RunDir(run).curve()
    assert [row["step"] for row in curve] == list(range(1, newest + 6))  # no step missing, none twice


def ends(process: Process, code: int, within_s: float) -> str:
    """What it wrote to standard error, where it has ended so within that time."""
    errors = process.ended(timeout=within_s)
    assert process.returncode == code and "Traceback" not in errors, errors
    return errors


def committed(run: Path) -> int:
    return max((int(p.parent.name[5:]) for p in (run / "checkpoints").glob("*/COMMIT")), default=0)


def test_while_it_compiles_it_leaves_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_until(lambda: bool(list((run / "attempts").glob("1/events.jsonl"))), process)
    process.send_signal(signal.SIGTERM)
    errors = ends(process, 85, 60)
    if steps(run) == 0:  # else the first step was quicker than this test
        assert "stopped at once" in errors
        assert RunDir(run).rows(1, "events")[-1]["status"] == "preempted"
    assert not (run / "claim").exists()


@pytest.mark.parametrize(("grace", "steps"), [({}, ["3"]), ({"PORTATRAIN_GRACE_S": "60"}, ["0", "3"])])
def test_what_a_save_needs_is_compiled_before_the_first_step_where_a_grace_is_given(
    grace: dict[str, str], steps: list[str], tmp_path: Path
) -> None:
    process = start(tmp_path / "run", "--stop-at=3", program=RECORDING, **grace)
    errors = ends(process, 85, 90)
    assert [line.split()[1] for line in errors.splitlines() if line.startswith("record ")] == steps


def test_while_it_begins_it_leaves_an_attempt_that_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "stopped at once" in ends(start(run, program=BEGINNING), 85, 60)
    assert RunDir(run).rows(1, "events")[-1]["status"] == "preempted"
    assert not (run / "claim").exists()


def test_when_the_grace_is_nearly_over_the_checkpoint_before_stands(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "--set=checkpoint_every=5", program=STUCK, PORTATRAIN_GRACE_S="4")
    wait_until(lambda: steps(run) == 10 and committed(run) == 5, process)
    process.send_signal(signal.SIGTERM)
    errors = ends(process, 85, 30)
    assert "the grace of 4 s was nearly over" in errors and committed(run) == 5
    assert not (run / "claim").exists()


@pytest.mark.full  # it waits for the limit, which is far above what compiling takes on a busy machine
def test_a_stall_is_a_hang_that_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "--set=checkpoint_every=5", program=STALLED, PORTATRAIN_HANG_S="40")
    errors = ends(process, 85, 200)
    (hang,) = RunDir(run).events("hang")
    assert (hang["phase"], hang["step"]) == ("data", 11)
    assert "phase 'data' of step 11" in errors
    assert "read_ahead.py" in (run / "attempts" / "1" / hang["stacks"]).read_text()
    assert committed(run) == 10 and not (run / "claim").exists()


def test_a_run_that_was_started_to_outlive_its_terminal_does(tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{PLAIN}"
    process = start(run, "--stop-at=60", program=program)
    wait_until(lambda: steps(run) > 3, process)
    process.send_signal(signal.SIGHUP)
    ends(process, 85, 90)
    assert steps(run) == 60
