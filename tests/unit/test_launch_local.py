"""`launch` for this machine, in the background: submit, status, logs, cancel, resume. The training is a stand-in that
computes nothing (tests/support/fakes/train.py); tests/faults has the real one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from portatrain.cli import launch_main
from portatrain.recipe import load_recipe
from portatrain.runs import jobs
from portatrain.runs.claim import live_owner
from portatrain.runs.history import History, read_history
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files
from tests.support import stand_in

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_in.prepare(tmp_path, monkeypatch)
    return tmp_path


def now() -> History:
    return read_history(RunDir(Path("runs/a")))


def until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(p.read_text() for p in sorted(Path("runs/a").glob("**/*.log")))
        assert time.monotonic() < end_s, f"{what}\n{now()}\n{logs}"
        time.sleep(0.05)


def start(*more: str) -> None:
    assert launch_main(["--cluster", "here", "tiny-lm", "--detach", "--run", "a", *more]) == 0


def ended() -> bool:
    return live_owner(Path("runs/a/claim")) is None


def test_from_submission_to_the_end(capsys: Capture) -> None:
    start()
    until(lambda: now().state == "RUNNING", "running")
    assert launch_main(["status", "a", "--ask"]) == 0
    shown = capsys.readouterr().out
    assert "a: RUNNING" in shown and "running process" in shown
    assert launch_main(["logs", "-f", "a"]) == 0  # until it is over
    assert now().state == "SUCCEEDED" and now().step == 60
    until(ended, "the supervisor has left")
    assert launch_main(["list"]) == 0
    assert "SUCCEEDED" in capsys.readouterr().out
    assert launch_main(["resume", "a"]) == 2
    assert launch_main(["cancel", "a"]) == 2
    assert capsys.readouterr().err.count("one that is finished") == 2


def test_cancelled_and_resumed_with_the_same_code(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.5")
    start()
    until(lambda: now().step >= 2, "steps")
    assert launch_main(["resume", "a"]) == 2
    assert "a claim of process" in capsys.readouterr().err
    assert launch_main(["cancel", "a"]) == 0
    assert "cancelled; newest checkpoint: step" in capsys.readouterr().out
    reached = now().step
    assert now().state == "CANCELLED" and now().committed == reached and now().attempts[0].ended == "cancelled"
    monkeypatch.setenv("FAKE_STEP_S", "0.02")
    assert launch_main(["resume", "a"]) == 0
    until(lambda: now().state == "SUCCEEDED", "the end")
    assert now().trained_again == 0 and now().attempts[1].steps == (reached + 1, 60)
    first, second = jobs.of("runs/a")
    assert first.code == second.code and (Path(str(first.code)) / "portatrain" / "training" / "trainer.py").exists()
    until(ended, "the supervisor has left")


def test_a_cancel_that_does_not_wait_promises_no_step(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.5")
    start()
    until(lambda: now().step >= 2, "steps")
    capsys.readouterr()
    assert launch_main(["cancel", "a", "--no-wait"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a: asked to save and stop, which takes a while; newest checkpoint: ")
    until(ended, "the supervisor has left")
    assert now().committed is not None and f"step {now().committed}" not in said  # it saved more after that
    assert launch_main(["cancel", "a"]) == 0
    assert f"a: cancelled; newest checkpoint: step {now().committed}" in capsys.readouterr().out


def test_the_code_of_a_run_is_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "1")
    helper, recipe = place / "helper.py", place / "mine.py"
    helper.write_text("STEPS = 60\n")
    recipe.write_text(
        "from dataclasses import replace\nfrom helper import STEPS\nfrom recipes.tiny_lm import recipe as base\n"
        "def recipe():\n    return replace(base(), steps=STEPS, name='mine')\n"
    )
    words = ["--cluster", "here", "mine.py", "--detach", "--run", "a"]
    # A process of its own: a test process has imported other helpers.
    program = "import sys; from portatrain.cli import launch_main; sys.exit(launch_main())"
    subprocess.run([sys.executable, "-c", program, *words], check=True)
    (job,) = jobs.of("runs/a")
    assert (Path(str(job.code)) / "recipe" / "helper.py").read_text() == "STEPS = 60\n"
    assert job.recipe == f"{job.code}/recipe/mine.py"
    until(lambda: now().step >= 2, "steps")
    assert launch_main(["cancel", "a"]) == 0
    # Changed since: told so, the run takes it along; else the file as it was goes on.
    recipe.write_text(recipe.read_text() + "# changed\n")
    resume = "import sys; from portatrain.cli import launch_main; sys.exit(launch_main(['resume', 'a', *sys.argv[1:]]))"
    subprocess.run([sys.executable, "-c", resume], check=True)
    until(lambda: now().state == "RUNNING", "running")
    assert jobs.of("runs/a")[1].code == job.code
    assert launch_main(["cancel", "a"]) == 0
    monkeypatch.setenv("FAKE_STEP_S", "0.02")
    subprocess.run([sys.executable, "-c", resume, "--new-code"], check=True)
    third = jobs.of("runs/a")[2]
    assert third.code != job.code and "# changed" in Path(third.recipe).read_text()
    until(lambda: now().state == "SUCCEEDED", "the end")
    until(ended, "it has ended")


def test_a_run_of_the_foreground_does_not_go_on_with_other_code(capsys: Capture) -> None:
    recipe = load_recipe("tiny-lm")
    run = RunDir(Path("runs/a"))
    source = {"recipe": "tiny-lm", "overrides": [], "backend": None, "mesh": None, "devices": None, "cwd": ""}
    run.begin(recipe, {"source": source}).close()
    told = {**run.run_info(), "code_sha256": "of other code"}
    json_files.write_json(run.path / "run.json", told)
    assert launch_main(["resume", "a"]) == 2
    assert "--new-code" in capsys.readouterr().err
    with run.begin(recipe) as attempt:
        assert [e["attempt"] for e in run.events("code_differs")] == [attempt.number]


def test_a_second_job_steps_aside(capsys: Capture) -> None:
    start()
    until(lambda: now().step >= 3, "steps")
    (job,) = jobs.of("runs/a")
    second = subprocess.run(
        [sys.executable, "-m", "launchers.supervisor", job.run_dir, "1"], capture_output=True, text=True, cwd=ROOT
    )
    assert second.returncode == 85 and "another job or process has the run" in second.stderr
    until(lambda: now().state == "SUCCEEDED", "the end")
    assert len(now().attempts) == 1
    until(ended, "the supervisor has left")


# A store that is away is no mistake: it is tried again.
@pytest.mark.parametrize(("how", "why"), [("crash", "some error of a library"), ("storage", "error 500")])
def test_failures_without_progress_end_it(how: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", how)
    start("--max-restarts", "1")
    until(lambda: now().state == "FAILED", "given up")
    until(ended, "the supervisor has left")
    assert len(now().attempts) == 2 and why in now().why
    monkeypatch.setenv("FAKE", "")
    assert launch_main(["resume", "a"]) == 0
    until(lambda: now().state == "SUCCEEDED", "the end after a resume")
    until(ended, "the supervisor has left")


def test_a_job_that_comes_as_the_run_is_given_up_leaves_it_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One submitted together with the job that gave it up, that has the claim before it can be cancelled."""
    monkeypatch.setenv("FAKE", "crash")
    start("--max-restarts", "0")
    until(lambda: now().state == "FAILED", "given up")
    until(ended, "the supervisor has left")
    (job,) = jobs.of("runs/a")
    late = subprocess.run(
        [sys.executable, "-m", "launchers.supervisor", job.run_dir, str(job.write().number)],
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert late.returncode == 2 and now().state == "FAILED" and len(now().attempts) == 1


def test_a_crash_is_only_another_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "crash-once")
    start()
    until(lambda: [a.ended for a in now().attempts] == ["failed", "done"], "the end")
    until(ended, "the supervisor has left")


def test_an_attempt_that_went_back_is_followed_by_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "spike-once")
    start("--max-restarts", "0")  # it is no failure
    until(lambda: [a.ended for a in now().attempts] == ["went_back", "done"], "the end")
    until(ended, "the supervisor has left")
    assert now().attempts[1].steps == (21, 60)


def test_a_hang_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "hang")
    monkeypatch.setenv("PORTATRAIN_HANG_S", "1")
    start("--max-restarts", "0")
    until(lambda: now().state == "FAILED", "given up")
    until(ended, "the supervisor has left")
    (hang,) = RunDir(Path("runs/a")).events("hang")
    assert (hang["step"], hang["phase"]) == (10, "step")
    stacks = Path("runs/a/attempts/1", hang["stacks"]).read_text()
    assert "time.sleep" in stacks or "in main" in stacks
    assert now().attempts[0].ended == "hung"


def test_a_supervisor_that_is_killed_takes_its_attempt_along_and_the_next_goes_on() -> None:
    start()
    until(lambda: (now().committed or 0) >= 20, "a commit")
    owner = live_owner(Path("runs/a/claim"))
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    until(lambda: now().state == "LOST", "lost")
    assert launch_main(["resume", "a"]) == 0
    until(lambda: now().state == "SUCCEEDED", "the end")
    curve = RunDir(Path("runs/a")).curve()
    assert [row["step"] for row in curve] == list(range(1, 61))
    until(ended, "the supervisor has left")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["status", "nothing"], "none there"),
        (["logs", "nothing"], "none there"),
        (["cancel", "nothing"], "none there"),
        (["resume", "nothing"], "none there"),
        (["reconcile", "nothing"], "none there"),
        (["doctor", "tpu-v5p-256"], "a name of the catalog"),
        (["doctor", "nowhere"], "local"),
        (["--cluster", "local,tpu-v5p-256", "tiny-lm"], "or one alone"),
        (["--cluster", "local", "tiny-lm", "--max-restarts", "-1"], "0 or more"),
        (["--cluster", "tpu-v5p-8", "tiny-lm"], "engine"),
        (["--cluster", "local", "tiny-lm", "--run", "x" * 64], "64 characters"),
        (["--cluster", "local", "tiny-lm", "--run", "../x"], "letters, digits"),
        (["--cluster", "here", "tiny-lm", "--detach", "--runs", "/proc/x"], "a writable folder"),
        (["--cluster", "here", "tiny-lm", "--detach", "--runs", "x" * 5000], "name too long"),
        (["status", "x" * 5000], "name too long"),
        (["doctor", "x" * 5000], " ... "),
    ],
)
def test_mistakes(words: list[str], hint: str, capsys: Capture) -> None:
    assert launch_main(words) == 2
    err = capsys.readouterr().err
    assert hint in err and "Traceback" not in err and err.count("\n") == 1
    assert not Path("runs").exists()


def test_of_several_clusters_each_is_refused_with_its_reason(capsys: Capture) -> None:
    assert launch_main(["--cluster", "tpu-v5p-8,h100-8", "tiny-lm"]) == 2
    *refused, last = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in refused] == ["cluster tpu-v5p-8", "cluster h100-8"]
    assert "none of 2, for the reasons above" in last


@pytest.mark.parametrize("name", ["tpu-v5p-8", "h100-8", "mi300x-8"])
def test_what_a_dry_run_says_of_configuring_a_cluster_configures_it(name: str, place: Path, capsys: Capture) -> None:
    assert launch_main(["--cluster", name, "tiny-lm", "--dry-run"]) == 0
    said = capsys.readouterr().out
    table = said[said.rindex("\n[my-") :]
    place.joinpath("clusters.toml").write_text(table)
    chip = table.split("]")[0].strip("\n[")
    assert f"--cluster {chip}" in said
    assert launch_main(["--cluster", chip, "tiny-lm", "--dry-run"]) == 0
    assert "not configured" not in capsys.readouterr().out


def test_a_dry_run_and_the_doctor_refuse_an_option_that_the_launch_refuses(place: Path, capsys: Capture) -> None:
    text = '[lab]\nchip = "h100"\ncount = 8\nengine = "slurm"\noptions = { partitio = "gpu" }\n'
    place.joinpath("clusters.toml").write_text(text)
    for more in ((), ("--dry-run",)):
        assert launch_main(["--cluster", "lab", "tiny-lm", *more]) == 2
        found = capsys.readouterr()
        assert "option 'partitio' of slurm" in found.err and "Did you mean partition?" in found.err
        assert "#SBATCH" not in found.out
    launch_main(["doctor", "lab"])
    assert "bad   options: cluster lab: option 'partitio'" in capsys.readouterr().out


def test_a_run_that_there_is_not_is_said_to_be_none(place: Path, capsys: Capture) -> None:
    for number in range(12):
        folder = place / "runs" / f"wide-{number}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text('{"recipe": {"steps": 3}}')
    assert launch_main(["status", "wide-99"]) == 2
    said = capsys.readouterr().err
    assert "got no such run. Did you mean wide-9" in said and "wide-4" not in said and "launch list" in said
    for number in range(2, 12):
        shutil.rmtree(place / "runs" / f"wide-{number}")
    assert launch_main(["status", "wide-99"]) == 2
    assert "expected one of wide-0, wide-1, got no such run" in capsys.readouterr().err


def test_runs_of_others_are_no_obstacle(place: Path, capsys: Capture) -> None:
    for name in ("mine", "theirs"):
        folder = place / "runs" / name
        (folder / "jobs").mkdir(parents=True)
        (folder / "run.json").write_text('{"recipe": {"steps": 3}}')
    (folder / "attempts").touch()  # which the file system refuses to list, also to root
    assert launch_main(["list"]) == 0
    found = capsys.readouterr()
    assert "mine" in found.out and "theirs: " in found.err
    assert launch_main(["reconcile"]) == 0


def test_names_that_are_near(capsys: Capture) -> None:
    start()
    until(ended, "it has ended")
    assert launch_main(["status", "aa"]) == 2
    assert "Did you mean a?" in capsys.readouterr().err
    assert launch_main(["logs", "a", "--attempt", "7"]) == 2
    assert launch_main(["logs", "a", "--rank", "3"]) == 2
    assert launch_main(["reconcile"]) == 0
    assert launch_main(["doctor", "local"]) == 0
