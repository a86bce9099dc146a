"""The hook `Tasks`: results on the live model, on the run's curve, equal to those of its checkpoints."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import portatrain
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs.history import read_history
from portatrain.runs.reported import scalars
from portatrain.runs.run_dir import RunDir
from portatrain.runs.tasks import TaskResult, record
from portatrain.training import harness
from portatrain.training.hooks import Tasks
from portatrain.training.trainer import train
from tests.support import harness_tasks
from tests.support.running import BACKENDS

pytest.importorskip("tokenizers")
BACKEND = BACKENDS[-1]


def recipe(at: Path, hook: Tasks, **changes: Any) -> Recipe:
    made = harness_tasks.recipe(at, harness_tasks.tokenizer(at, adds=True), steps=4)
    return replace(made, eval_every=2, checkpoint_every=2, hooks=(hook,), **changes)


def test_results_of_the_live_model_are_on_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answered(model: Any, tasks: Any, **options: Any) -> harness.Evaluated:
        logits = model.predict(harness.batch_of(harness.np.zeros((2, 8), "int32")))
        asked.append((model.step, tasks, options["limit"], float(logits[0, -1, 3])))
        metrics = {"sums": {"acc": model.step / 8}, "empty": {}}
        return harness.Evaluated(
            metrics=metrics, samples={"sums": 7}, versions={}, shots={"sums": 2}, release="0", table=""
        )

    monkeypatch.setattr(harness, "evaluate_tasks", answered)
    monkeypatch.setattr(harness, "check_tasks", lambda tasks, folder: None)
    made = recipe(tmp_path, Tasks(tasks=("sums",), limit=5))
    run = RunDir(tmp_path / "run")
    assert train(made, run, backend=BACKEND) == 0
    steps = [step for step, *_ in asked]
    assert set(steps) == {2, 4} and asked[0][1:3] == (("sums",), 5)
    for step, *_, logit in asked:  # the weights were those of the step
        at_step: Any = portatrain.load(run.path, step=step, backend=BACKEND)
        assert float(at_step.predict(harness.batch_of(harness.np.zeros((2, 8), "int32")))[0, -1, 3]) == logit
    found = [(one.label, one.step, one.metrics["acc"], one.samples) for one in read_history(run).tasks]
    assert found == [("sums, 2 shots", 2, 0.25, 7), ("sums, 2 shots", 4, 0.5, 7)]
    events = [json.loads(line) for line in (run.path / "attempts/1/events.jsonl").read_text().splitlines()]
    (first, *_) = (event for event in events if event["event"] == "task")
    assert scalars("task", first) == {"task/sums, 2 shots/acc": 0.25}
    assert not read_history(run).reported
    record(run, TaskResult(task="sums", step=4, metrics={"acc": 0.75}, shots=2))  # as `portatrain eval` does
    assert [one.metrics["acc"] for one in read_history(run).tasks] == [0.25, 0.75]


def test_what_is_missing_is_said_before_the_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no package lm_eval"):
        Tasks(tasks=("a",)).check(
            recipe(tmp_path, Tasks(tasks=("a",))), recipe(tmp_path, Tasks(tasks=("a",))).describe()
        )


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install 'portatrain[lm-eval]'"
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_harness_itself_gives_what_it_gives_for_the_checkpoints(backend: str, tmp_path: Path) -> None:
    folder = harness_tasks.definitions(tmp_path)
    hook = Tasks(tasks=harness_tasks.TASKS, folder=str(folder))
    run = RunDir(tmp_path / "run")
    assert train(recipe(tmp_path, hook), run, backend=backend) == 0
    live = {(one.task, one.step): dict(one.metrics) for one in read_history(run).tasks}
    assert {step for _, step in live} == {2, 4} and {task for task, _ in live} == set(harness_tasks.TASKS)
    for step in (2, 4):
        model = portatrain.load(run.path, step=step, backend=backend)
        found = harness.evaluate_tasks(model, harness_tasks.TASKS, folder=folder, bootstraps=0)
        for task, metrics in found.metrics.items():
            assert live[task, step] == pytest.approx(metrics, nan_ok=True), (task, step)
