"""What a new user runs into in the first hours: comparing runs, a failed run, a cancelled run, a mistyped command."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from portatrain.cli import launch_main, main
from portatrain.data import TextFiles
from portatrain.model.layout import axis_warning, unknown_axes
from portatrain.model.module import Module, Param, describe
from portatrain.optim import AdamW, Cosine, Schedule
from portatrain.recipe import Recipe, apply_overrides
from portatrain.runs.history import read_history
from portatrain.runs.run_dir import RunDir
from portatrain.training.hooks import Hook
from portatrain.training.metrics import StepRecord
from portatrain.training.metrics.console import ConsoleSink
from portatrain.training.trainer import train
from portatrain.training.view import TrainingView
from recipes.models.decoder import DecoderConfig

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True, kw_only=True)
class Explodes(Schedule):
    """Divides by zero at the last step."""

    def curve(self, step: int, steps: int) -> float:
        return 1.0 / (steps - step)


@dataclass(frozen=True, kw_only=True)
class Cancels(Hook):
    """Cancels the run after its second step, as `launch cancel` does: by the mark, then by a signal."""

    def on_step(self, run: TrainingView, record: StepRecord) -> None:
        if record.step == 2:
            RunDir(run.folder).put("CANCELLED", {"unix_s": 0.0})
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    for n in range(8):
        (tmp_path / f"{n}.txt").write_text(f"{n} and {n} make {2 * n}.\n" * 8)
    return Recipe(
        name="tried",
        model=DecoderConfig(vocab=256, embed=16, layers=1, heads=2),
        data=TextFiles(paths=str(tmp_path / "*.txt"), seq_len=16, validation=0.4),
        optimizer=AdamW(lr=1e-3),
        schedule=Cosine(),
        steps=2,
        batch=4,
        eval_batches=1,
    )


def test_the_runs_of_a_sweep_are_compared(recipe: Recipe, capsys: Capture) -> None:
    for name, changes in {"a": [], "b": ["optimizer.lr=0.01"], "c": ["optimizer=Lion", "optimizer.lr=0.001"]}.items():
        assert train(apply_overrides(recipe, changes), RunDir(f"runs/{name}"), backend="torch") == 0
    assert train(replace(recipe, name="other", steps=1), RunDir("runs/d"), backend="torch") == 0
    capsys.readouterr()
    assert launch_main(["list", "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["a"]["differs"] == {"optimizer": "AdamW", "optimizer.lr": "0.001"}
    assert rows["b"]["differs"] == {"optimizer": "AdamW", "optimizer.lr": "0.01"}
    assert rows["c"]["differs"] == {"optimizer": "Lion"}  # its other fields are those of another rule
    assert rows["d"]["differs"] == {}  # the only run of its recipe
    for row in rows.values():
        (last,) = RunDir(f"runs/{row['run']}").events("eval")
        assert row["validation_loss"] == last["loss"] != row["loss"]
    assert launch_main(["list"]) == 0
    table = capsys.readouterr().out
    for said in ("train loss", "validation loss", "backend", "torch", "optimizer.lr=0.01", "optimizer=Lion"):
        assert said in table
    assert f"{rows['b']['validation_loss']:.4f}" in table


def test_a_failed_run_in_the_foreground_says_what_to_do(recipe: Recipe, capsys: Capture) -> None:
    broken = replace(recipe, schedule=Explodes(), name="broken", checkpoint_every=1, steps=6)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        train(broken, RunDir("runs/broken"), backend="torch")
    assert launch_main(["status", "broken"]) == 0
    said = capsys.readouterr().out
    assert "full error:" in said and "launch logs" not in said  # it wrote to its terminal
    assert re.search(r"correct what failed, then `launch resume broken` continues from step \d; with --new-code", said)
    (Path("runs/broken/attempts/1/rank-0.log")).write_text("output")
    assert launch_main(["status", "broken"]) == 0
    assert "`launch logs broken` shows the output; correct" in capsys.readouterr().out


def test_the_column_kept_is_explained_if_steps_were_repeated(recipe: Recipe, capsys: Capture) -> None:
    run = RunDir("runs/again")
    assert train(recipe, run, backend="torch", stop_at=1) == 85
    assert launch_main(["status", "again"]) == 0
    out = capsys.readouterr().out
    assert "kept: the number" not in out and "`launch resume again` continues from step 1." in out
    rows = Path("runs/again/attempts/1/metrics.jsonl")
    (row,) = map(json.loads, rows.read_text().splitlines())
    rows.write_text("".join(json.dumps({**row, "step": step}) + "\n" for step in (1, 2)))
    assert train(recipe, run, backend="torch") == 0
    assert launch_main(["status", "again"]) == 0
    assert "kept: the number of steps of the attempt that are on the run's curve" in capsys.readouterr().out


def test_a_cancelled_run_is_recorded_as_cancelled(recipe: Recipe, capsys: Capture) -> None:
    run = RunDir("runs/ended")
    code = train(replace(recipe, hooks=(Cancels(),), steps=50), run, backend="torch", sinks=[ConsoleSink()])
    assert code == 85
    said = capsys.readouterr().err
    assert "stopping: asked cancel" in said and "preempt" not in said and re.search(r"\ncancelled: step \d+", said)
    (end,) = run.events("end")
    assert end["status"] == "cancelled" and read_history(run).attempts[-1].ended == "cancelled"


def test_a_name_that_is_no_run_has_the_near_ones_only(recipe: Recipe, capsys: Capture) -> None:
    for n in range(30):
        Path(f"runs/sweep-{n}/jobs").mkdir(parents=True)
    assert launch_main(["status", "swep-7"]) == 2
    said = capsys.readouterr().err
    assert "Did you mean sweep-7" in said and said.count("sweep-") <= 3 and "`launch list --runs runs`" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "tiny-lm"], "expected --run-dir, got none"),
        (["train", "tiny-lm", "--run-dir", "r", "--devices", "two"], "--devices: expected a whole number, got 'two'"),
        (["train", "tiny-lm", "--run-dir", "r", "--mehs", "fsdp=2"], "got --mehs fsdp=2. Did you mean --mesh?"),
        (["plan", "tiny-lm", "--compiler", "gcc"], "expected one of .*auto.*got 'gcc'"),
        (["show", "tiny-lm", "--set"], "--set: expected one argument, got none"),
        (["show", "tiny-lm", "--set", "hooks=TextSample"], r"\(\) to leave out all hooks.*hooks=\(TextSample\(\),\)"),
        (["show", "tiny-lm", "--set", "steps=3"], r"--set schedule.warmup=0\) or lengthen the run \(--set steps="),
    ],
)
def test_a_mistyped_command_is_one_short_sentence(words: list[str], said: str, capsys: Capture) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and len(error) < 300, error


@pytest.mark.parametrize("order", [["steps=3", "schedule.warmup=0"], ["schedule.warmup=0", "steps=3"]])
def test_a_short_run_of_a_recipe_with_a_warm_up(order: list[str], recipe: Recipe) -> None:
    long = replace(recipe, steps=200, schedule=Cosine(warmup=20))
    assert apply_overrides(long, order).steps == 3


def test_several_unknown_axes_are_one_warning() -> None:
    class Odd(Module):
        def __init__(self) -> None:
            self.a = Param(embd=4, hid=4)
            self.b = Param(hid=4, outs=2)

    warning = axis_warning(unknown_axes(describe(Odd())))
    assert warning.startswith("axes 'embd', 'hid' and 'outs' of a and 1 more are in no mapping")
    assert "Did you mean embed for embd?" in warning and "compute={'embd': (), 'hid': (), 'outs': ()}" in warning
    assert axis_warning([]) == ""
