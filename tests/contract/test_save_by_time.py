"""Checkpoints by time, and how much of the validation split the last evaluation sees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from portatrain.backends.base import missing
from portatrain.cli import main
from portatrain.data import open_data
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.system.stop_signals import StopSignals
from portatrain.training import save_timer
from portatrain.training.save_timer import SaveTimer
from portatrain.training.trainer import train
from tests.support.running import BACKENDS
from tests.support.short_runs import losses, small
from tests.support.small_recipe import make


class Clock:
    """A clock that a test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_save_is_due_after_its_time_and_never_takes_more_than_its_share() -> None:
    clock = Clock()
    timer = SaveTimer(600.0, clock)
    clock.now_s += 599.0
    assert not timer.due
    clock.now_s += 1.0
    assert timer.due
    with timer.saving():
        clock.now_s += 300.0  # the first one compiles
    clock.now_s += 600.0
    assert timer.due
    with timer.saving():
        clock.now_s += 30.0  # the loop waits half a minute: 2 % of 25 minutes
    clock.now_s += 1499.0
    assert not timer.due
    clock.now_s += 1.0
    assert timer.due
    with timer.saving():
        clock.now_s += 1.0
    clock.now_s += 600.0
    assert timer.due
    timer.start()
    assert not timer.due
    clock.now_s += 1e9
    assert not SaveTimer(None, clock).due


def test_process_0_decides_and_a_stop_comes_first() -> None:
    """Each row: (what the process is asked, whether it wants to save) of every process, and what all do."""
    for processes, all_do in (
        ([(None, False), (None, False)], None),
        ([(None, True), (None, False)], "save"),
        ([(None, True), ("preempt", False)], "preempt"),
        ([("interrupt", True), ("preempt", False)], "interrupt"),
    ):
        kinds = {None: 0, "preempt": 2, "interrupt": 3}
        largest = max(1 if save and asked is None else kinds[asked] for asked, save in processes)
        for asked, save in processes:
            stop, mine = StopSignals(), []
            stop.asked = asked
            found = stop.agreed(lambda value, mine=mine, most=largest: mine.append(value) or most, save=save)
            assert len(mine) == 1 and mine[0] <= largest  # one exchange
        assert found == all_do
        assert stop.asked == (all_do if all_do != "save" else None)


def test_the_default_changes_no_hash_and_bad_values_are_refused() -> None:
    recipe = make()
    assert recipe.checkpoint_every_s == 600.0
    assert not {"checkpoint_every_s", "eval_final_batches"} & set(recipe.to_json())
    assert make(checkpoint_every_s=None).sha256 != recipe.sha256
    assert Recipe.from_json(recipe.to_json()) == recipe
    for changes in ({"checkpoint_every_s": 0.0}, {"eval_final_batches": 0}, {"eval_final_batches": "some"}):
        with pytest.raises(UserError):
            make(**changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_without_a_rule_by_steps_is_saved_by_time(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_timer, "SAVE_SHARE", 1e9)
    recipe = small("checkpoint_every_s=1e-6", "checkpoint_keep=100")
    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
    assert train(recipe, run, backend=backend, stop_at=9) == 85
    saved = [event["step"] for event in run.events("saving")]
    skipped = [event["step"] for event in run.events("save_skipped")]
    assert saved[0] == 1 and saved[-1] == 9  # the one where it stopped too
    assert sorted([*saved, *skipped]) == list(range(1, 10))
    assert {f"step-{step:08d}" for step in saved} == {
        path.parent.name for path in run.path.glob("checkpoints/*/COMMIT")
    }
    assert train(recipe, run, backend=backend) == 0
    assert train(small("checkpoint_every_s=none"), whole, backend=backend) == 0
    assert [event["step"] for event in whole.events("saving")] == [12]
    assert losses(run) == losses(whole)


@pytest.mark.meshes
def test_processes_save_at_the_same_step(tmp_path: Path) -> None:
    if missing("torch"):
        pytest.skip("torch is not installed")
    words = ["tiny-lm", "--run-dir", str(tmp_path / "run"), "--backend", "torch", "--mesh", "fsdp=2"]
    given = (
        "steps=6",
        "batch=4",
        "data.seq_len=64",
        "model.layers=2",
        "model.embed=32",
        "hooks=()",
        "schedule.warmup=1",
    )
    changes = [word for one in (*given, "checkpoint_every_s=1e-6", "checkpoint_keep=10") for word in ("--set", one)]
    done = subprocess.run(
        [sys.executable, "-m", "portatrain", "train", *words, *changes], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "run")
    saved = [event["step"] for event in run.events("saving")]
    assert saved[0] == 1 and saved[-1] == 6
    assert main(["ckpt", "verify", str(tmp_path / "run")]) == 0
    steps = {path.parent.name for path in run.path.glob("checkpoints/*/COMMIT")}
    assert steps == {f"step-{step:08d}" for step in saved}  # each is whole: the parts of both processes are of one step


@pytest.mark.parametrize(
    ("given", "batches"), [((), 3), (("eval_final_batches=5",), 5), (("eval_final_batches=all",), 0)]
)
def test_the_last_evaluation_is_as_large_as_the_recipe_says(
    given: tuple[str, ...], batches: int, tmp_path: Path
) -> None:
    recipe = small("steps=2", "eval_batches=3", "eval_final_batches=none", *given)
    run = RunDir(tmp_path / "run")
    assert train(recipe, run, backend=BACKENDS[0]) == 0
    (found,) = run.events("eval")
    held = open_data(recipe.data, seed=0).validation
    assert held is not None
    assert found["samples"] == (batches * recipe.batch if batches else held.windows)
    assert json.loads((run.path / "summary.json").read_text())["validation_loss"] == found["loss"]
