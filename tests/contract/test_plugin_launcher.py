"""A launcher of another package: named in clusters.toml, planned, submitted, supervised, preempted, resumed, finished.
Its scheduler is a folder and a daemon on this machine. The training computes nothing, but for one tiny run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launchers.rank_entry import rank_variables
from portatrain.cli import launch_main
from portatrain.runs import jobs
from portatrain.runs.history import History, read_history
from portatrain.runs.run_dir import RunDir

ROOT = Path(__file__).parents[2]
ACME = ROOT / "tests" / "plugins" / "acme"
TINY = ["steps=12", "batch=4", "model.layers=1", "model.embed=32", "data.seq_len=32", "schedule.warmup=1", "hooks=()"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with clusters.toml, and the scheduler's queue, whose daemon runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ACME))
    for name, value in {
        "PYTHONPATH": ROOT,
        "REAL_PYTHON": sys.executable,
        "FAKES": ROOT / "tests/support/fakes",
    }.items():
        monkeypatch.setenv(name, str(value))
    queue = tmp_path / "queue"
    queue.mkdir()
    # An installed package is found whatever PYTHONPATH says; this one is found by these Pythons alone.
    for name, program in {"fake": f"{ROOT}/tests/support/fakes/python", "real": sys.executable}.items():
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{ACME}" exec {program} "$@"\n')
        script.chmod(0o755)
        with open("clusters.toml", "a") as file:
            options = f'{{ queue = "{queue}", python = "{script}" }}'
            file.write(f'[{name}]\nchip = "cpu"\ncount = 1\nengine = "acme_scheduler"\noptions = {options}\n')
            file.write(f'[{name}-too]\nchip = "cpu"\ncount = 1\nengine = "acme_scheduler"\noptions = {options}\n')
    words = [sys.executable, "-m", "acme_lab.daemon", str(queue), "20"]
    path = os.pathsep.join([str(ACME), str(ROOT)])
    daemon = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path, "FAKE_STEP_S": "0.04"})
    yield queue
    (queue / "closed").touch()
    for job in queue.glob("*/state"):
        (job.parent / "cancel").touch()
    until(lambda: "running" not in states(queue), "no job runs")
    daemon.kill()
    daemon.wait()


def now(name: str = "a") -> History:
    return read_history(RunDir(Path("runs", name)))


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(p.read_text() for p in [*Path("runs").glob("**/*.log"), *Path("queue").glob("*/log")])
        assert time.monotonic() < end_s, f"{what}\n{logs}"
        time.sleep(0.05)


def states(queue: Path) -> list[str]:
    return [(queue / str(n) / "state").read_text() for n in range(1, 1 + len(list(queue.glob("[0-9]*/state"))))]


def test_from_clusters_toml_to_the_end(lab: Path, capsys: Capture) -> None:
    assert launch_main(["--cluster", "fake", "tiny-lm", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "# fake by acme_scheduler" in shown and "-m launchers.supervisor" in shown
    assert launch_main(["doctor", "fake"]) == 0
    assert "queue: " in capsys.readouterr().out
    assert launch_main(["--cluster", "fake,fake-too", "tiny-lm", "--run", "a"]) == 0
    until(lambda: now().step >= 4, "steps")
    assert states(lab) == ["running", "held"]  # the first claimed the run, and holds its sibling
    (landed,) = RunDir(Path("runs/a")).events("landed")
    assert (landed["engine"], landed["cluster"], landed["scheduler"]["ACME_JOB"]) == ("acme_scheduler", "fake", "1")

    (lab / "1" / "preempt").touch()
    until(lambda: len(now().attempts) == 2 and now().attempts[1].steps, "another attempt")
    first, second = now().attempts
    assert first.ended == "preempted" and second.verdict == "continuous"
    assert first.steps and second.steps and second.steps[0] == first.steps[1] + 1
    until(lambda: now().state == "SUCCEEDED", "the end")
    until(lambda: states(lab) == ["gone", "gone"], "nothing of the run is left in the queue")
    assert now().trained_again == 0 and now().step == 60
    assert launch_main(["status", "a", "--ask"]) == 0


def test_cancelled_and_resumed(lab: Path, capsys: Capture) -> None:
    assert launch_main(["--cluster", "fake", "tiny-lm", "--run", "a"]) == 0
    until(lambda: now().step >= 2, "steps")
    assert launch_main(["cancel", "a"]) == 0
    reached = now().step
    assert now().state == "CANCELLED" and now().committed == reached
    until(lambda: states(lab) == ["gone"], "the scheduler has let it go")
    assert launch_main(["resume", "a", "--cluster", "fake-too"]) == 0
    until(lambda: now().state == "SUCCEEDED", "the end")
    assert [j.cluster for j in jobs.of("runs/a")] == ["fake", "fake-too"] and now().trained_again == 0


@pytest.mark.full
def test_a_real_run_is_preempted_and_goes_on(lab: Path) -> None:
    settings = [word for size in TINY for word in ("--set", size)]
    assert launch_main(["--cluster", "real", "tiny-lm", "--run", "a", *settings, "--set", "steps=400"]) == 0
    until(lambda: now().step >= 3, "steps", 120)
    (lab / "1" / "preempt").touch()
    until(lambda: len(now().attempts) == 2 and now().attempts[1].verdict, "another attempt", 120)
    assert now().attempts[1].verdict == "continuous"
    until(lambda: now().state == "SUCCEEDED", "the end", 240)
    assert [row["step"] for row in RunDir(Path("runs/a")).curve()] == list(range(1, 401))


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("acme_unfinished", "engine acme_unfinished: expected a class with the members of launchers.base.Launcher"),
        ("acme_gone", "engine acme_gone: expected acme_lab.nowhere:Launcher to be importable"),
        ("acme_schedule", "Did you mean acme_scheduler"),
    ],
)
def test_what_is_no_launcher_is_refused_by_name(
    engine: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ACME))
    Path("clusters.toml").write_text(f'[mine]\nchip = "cpu"\ncount = 1\nengine = "{engine}"\n')
    assert launch_main(["--cluster", "mine", "tiny-lm"]) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown


def test_its_ranks_are_torchrun_s(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.syspath_prepend(str(ACME))
    env = {"ACME_RANK": "3", "ACME_WORLD": "4", "MASTER_ADDR": "head", "MASTER_PORT": "1"}
    assert rank_variables(env) == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    # Packages that are broken do not keep a job of another engine from its rank.
    assert "acme_gone is not asked for a rank" in capsys.readouterr().err
