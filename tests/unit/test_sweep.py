"""`portatrain sweep`: one run for each point, killed and gone on with. The training is a stand-in that computes nothing
(tests/support/fakes/train.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from portatrain.cli import main
from portatrain.commands.sweep_points import grid, points, split
from portatrain.errors import UserError
from portatrain.recipe import load_recipe
from portatrain.runs.claim import live_owner
from portatrain.runs.history import read_history
from portatrain.runs.run_dir import RunDir
from tests.support import stand_in

Capture = pytest.CaptureFixture[str]
WORDS = ["sweep", "tiny-lm", "--grid", "optimizer.lr=1e-3,3e-3", "--cluster", "here"]
NAMES = ["tiny-lm-lr0.001", "tiny-lm-lr0.003"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_in.prepare(tmp_path, monkeypatch)
    monkeypatch.setenv("FAKE_STEP_S", "0.01")
    return tmp_path


def until(condition: Callable[[], object], what: str, seconds: float = 40) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.05)


def step(name: str) -> int:
    return read_history(RunDir(Path("runs", name))).step if Path("runs", name, "run.json").exists() else 0


def free(name: str) -> bool:
    return live_owner(Path("runs", name, "claim")) is None


def attempts(name: str) -> list[tuple[int, int] | None]:
    return [one.steps for one in read_history(RunDir(Path("runs", name))).attempts]


def test_every_point_is_trained_one_after_the_other_and_compared(capsys: Capture) -> None:
    assert main(WORDS) == 0
    said = capsys.readouterr().out
    assert "sweep tiny-lm: 2 runs, 1 at once; 0 done, 0 being trained, 0 to resume, 2 new" in said
    assert said.index("[1/2] tiny-lm-lr0.001 is done: step 60") < said.index("[2/2] tiny-lm-lr0.003 begins")
    assert "Sweep over optimizer.lr" in Path("runs/tiny-lm-compare.html").read_text()
    first, second = (read_history(RunDir(Path("runs", name))) for name in NAMES)
    assert [run.recipe["optimizer"]["lr"] for run in (first, second)] == [1e-3, 3e-3]
    assert first.attempts[0].ended_unix_s <= second.attempts[0].began_unix_s + 1
    assert main(WORDS) == 0  # a second call finds all done
    assert "2 done, 0 being trained, 0 to resume, 0 new" in capsys.readouterr().out
    assert [attempts(name) for name in NAMES] == [[(1, 60)], [(1, 60)]]
    # The same runs, but of another recipe.
    assert main([*WORDS, "--set", "seed=5"]) == 2
    assert "another one (differs in seed)" in capsys.readouterr().err


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def test_killed_with_its_jobs_and_gone_on_with(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.15")
    command = [sys.executable, "-m", "portatrain", *WORDS]
    sweep = subprocess.Popen(command)
    until(lambda: step(NAMES[0]) >= 1, "the first run trains")
    kill(sweep)
    assert not Path("runs", NAMES[1]).exists()
    again = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    until(lambda: step(NAMES[0]) >= 22, "it has a checkpoint")
    assert again.stdout is not None and "1 being trained, 0 to resume, 1 new" in again.stdout.readline()
    assert "[1/2] tiny-lm-lr0.001 is being trained already; waiting for it" in again.stdout.readline()
    kill(again)
    again.stdout.close()
    owner = live_owner(Path("runs", NAMES[0], "claim"))
    assert owner is not None  # a run outlives the commands that wait for it
    monkeypatch.setenv("FAKE_STEP_S", "0.01")
    os.kill(owner.pid, signal.SIGKILL)  # and now it is killed too
    until(lambda: read_history(RunDir(Path("runs", NAMES[0]))).state == "LOST", "lost")
    assert main(WORDS) == 0
    said = capsys.readouterr().out
    assert "1 to resume, 1 new" in said and "[1/2] tiny-lm-lr0.001 resumes, from step 20" in said
    first, second = (RunDir(Path("runs", name)) for name in NAMES)
    assert [row["step"] for row in first.curve()] == list(range(1, 61))
    assert len(first.attempt_numbers()) == 2 and second.attempt_numbers() == [1]


@pytest.mark.full
def test_asked_to_stop_it_saves_all_and_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "0.2")
    words = [sys.executable, "-m", "portatrain", *WORDS, "--jobs", "2"]
    sweep = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(lambda: all(step(name) >= 2 for name in NAMES), "both train at once")
    sweep.send_signal(signal.SIGTERM)  # handled as Ctrl-C is
    _, said = sweep.communicate(timeout=40)
    assert sweep.returncode == 130 and "the same command goes on from here" in said and "Traceback" not in said
    assert all(free(name) for name in NAMES)
    reached = [step(name) for name in NAMES]
    monkeypatch.setenv("FAKE_STEP_S", "0.01")
    assert main([*WORDS, "--jobs", "2"]) == 0
    assert "2 to resume, 0 new" in capsys.readouterr().out
    assert [attempts(name) for name in NAMES] == [[(1, at), (at + 1, 60)] for at in reached]  # nothing was lost


@pytest.mark.full
def test_a_run_that_fails_does_not_hold_the_others_up(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("FAKE", "crash")
    assert main([*WORDS, "--max-restarts", "0"]) == 1
    said = capsys.readouterr()
    assert said.err.count("ended as FAILED at step 0 of 600: ") == 2 and "2 of 2 did not finish" in said.err
    assert Path("runs/tiny-lm-compare.html").exists()


def test_a_dry_run_says_what_would_be_done(capsys: Capture) -> None:
    assert main([*WORDS, "--dry-run"]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first == ("launch --cluster here tiny-lm --run tiny-lm-lr0.001 --set optimizer.lr=1e-3    # would begin")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--grid", "optimizer.lr"], "FIELD=VALUE,VALUE"),
        (["--grid", "optimizer.lr=1,,2"], "a value that is missing"),
        (["--grid", "optimizer.lr=1e-3,0.001"], "which are the same recipe"),
        (["--grid", "optimizer.lr=1e-3"], "at least two points"),
        (["--grid", "optimizer.lx=1,2"], "field 'lx' of AdamW"),
        (["--grid", "optimizer.lr=1e-3,a"], "expected a number"),
        (["--grid", "optimizer.lr=1,2", "--grid", "optimizer.lr=3,4"], "a second --grid"),
        (["--grid", "optimizer.lr=1,2", "--set", "optimizer.lr=3"], "--set optimizer.lr too"),
        (["--grid", "optimizer.lr=1,2", "--jobs", "0"], "at least 1"),
        (["--grid", "optimizer.lr=1,2", "--run", "../x"], "'../x'"),
        (["--grid", "optimizer.lr=1,2", "--cluster", "nowhere"], "nowhere"),
        ([], "expected --grid"),
    ],
)
def test_mistakes_end_before_any_run_begins(words: list[str], hint: str, capsys: Capture) -> None:
    assert main(["sweep", "tiny-lm", *words]) == 2
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1 and not Path("runs").exists()


def test_names_are_short_different_and_the_same_each_time() -> None:
    recipe = load_recipe("tiny-lm")
    fields = grid(["optimizer=AdamW,Lion", "model.layers=2,4"], [])
    assert [one.name for one in points("a", recipe, fields, [])] == [
        f"a-optimizer{rule}-layers{n}" for rule in ("AdamW", "Lion") for n in (2, 4)
    ]
    longer = points("x" * 60, recipe, {"optimizer.lr": ["1e-3", "2e-3"]}, [])
    odd = points("a", recipe, {"compute": ["{'embed': 'fsdp'}", "{'embed': 'tensor'}"]}, [])
    for found in (longer, odd):
        names = [one.name for one in found]
        assert len(set(names)) == 2 and all(len(name) <= 63 for name in names)
    assert [one.name for one in points("x" * 60, recipe, {"optimizer.lr": ["0.001", "0.002"]}, [])] == [
        one.name for one in longer
    ]


def test_commas_in_brackets_belong_to_a_value() -> None:
    assert split("(a,b),c,{'x': (1,2)}") == ["(a,b)", "c", "{'x': (1,2)}"]
    with pytest.raises(UserError, match="a value that is missing"):
        grid(["a=1,"], [])
