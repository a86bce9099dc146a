"""The tracker trackio: a local database, or the Space or server that its own variables name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from portatrain.runs.reported import scalars as scalars_of_event
from portatrain.training.metrics.record import EvalRecord, RunInfo, StepRecord
from portatrain.training.metrics.trackers import imported, run_key, scalars

PROJECT = "TRACKIO_PROJECT"
"""The variable that names the project; trackio itself has none."""


class TrackioSink:
    """A ``Sink`` to trackio; TRACKIO_DIR, TRACKIO_SPACE_ID and its other variables apply.

    trackio appends what it is given. So an attempt that trains steps again sends only those that are not there yet.
    """

    def __init__(self) -> None:
        self._trackio = imported("trackio", "trackio")
        self._run: Any = None

    def start(self, info: RunInfo) -> None:
        # trackio knows a run by its name, so the name holds the id.
        self._project, self._name = os.environ.get(PROJECT, "portatrain"), f"{info.run}-{run_key(info)}"
        self._run = self._trackio.init(
            project=self._project, name=self._name, config=dict(info.recipe), resume="allow", embed=False
        )
        # The step after the last one that is there, which trackio finds wherever the run is kept.
        self._there = self._run._next_step - 1
        self._at = self._there

    def step(self, record: StepRecord) -> None:
        self._at = record.step
        if record.step > self._there:
            self._run.log(scalars(record, "train"), step=record.step)

    def eval(self, record: EvalRecord) -> None:
        if record.step > self._there or (record.step == self._there and not self._evaluated(record.step)):
            self._run.log(scalars(record, "validation"), step=record.step)

    def _evaluated(self, step: int) -> bool:
        """Return whether the evaluation after the last step that is there is there, too."""
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(self._project, self._name)
        return any(row.get("step") == step and "validation/loss" in row for row in rows)

    def event(self, kind: str, **fields: object) -> None:
        found = scalars_of_event(kind, fields)
        if self._run is not None and found:
            step = fields.get("step")
            at = step if isinstance(step, int) else self._at
            if at > self._there:
                self._run.log(found, step=at)

    def end(self, summary: Mapping[str, object]) -> None:
        if self._run is not None:
            self._trackio.finish()
