"""The lab's hook and tracker: both use what is public alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portatrain import Hook
from portatrain.training.metrics import EvalRecord, RunInfo, StepRecord
from portatrain.training.view import TrainingView


@dataclass(frozen=True, kw_only=True)
class Norms(Hook):
    """Writes the norm of a parameter at the start, at saves and at the end."""

    parameter: str

    def _note(self, run: TrainingView, when: str) -> None:
        whole = run.parameter(self.parameter)  # every process takes part
        run.event("norm", when=when, step=run.step, norm=float((whole.astype("float64") ** 2).sum() ** 0.5))

    def on_start(self, run: TrainingView) -> None:
        self._note(run, "start")

    def on_save(self, run: TrainingView) -> None:
        self._note(run, "save")

    def on_end(self, run: TrainingView) -> Mapping[str, Any]:
        self._note(run, "end")
        return {"steps_seen": run.step, "last_loss": run.metrics["loss"]}


class FileTracker:
    """A tracker: a line a step beside the run. `ACME` in the environment of the run is not needed."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def _write(self, **row: Any) -> None:
        assert self._path is not None
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def start(self, info: RunInfo) -> None:
        self._path = Path(info.run_dir, "acme.jsonl")

    def step(self, record: StepRecord) -> None:
        self._write(step=record.step, loss=record.loss)

    def eval(self, record: EvalRecord) -> None:
        self._write(step=record.step, validation=record.loss)

    def event(self, kind: str, **fields: object) -> None:
        pass

    def end(self, summary: Mapping[str, object]) -> None:
        self._write(status=summary.get("status"))


class FailingTracker(FileTracker):
    """Fails at its second step: the run goes on without it."""

    def step(self, record: StepRecord) -> None:
        if record.step == 2:
            raise RuntimeError("the service is gone")
        super().step(record)
