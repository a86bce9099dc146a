"""Metrics into the run directory: metrics.jsonl and events.jsonl of the attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from portatrain.runs.attempt import Attempt
from portatrain.runs.events import Kind
from portatrain.training.metrics.record import EvalRecord, RunInfo, StepRecord


class JsonlSink:
    """A ``Sink`` that writes to an attempt, which its owner closes."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def start(self, info: RunInfo) -> None:
        about = {key: value for key, value in asdict(info).items() if key != "recipe"}  # run.json has that
        self._attempt.event(Kind.START, **about)

    def step(self, record: StepRecord) -> None:
        row = asdict(record)
        if not record.statistics:
            del row["statistics"]  # most steps have none
        self._attempt.metrics(row)

    def eval(self, record: EvalRecord) -> None:
        self._attempt.event(Kind.EVAL, **asdict(record))

    def event(self, kind: str, **fields: object) -> None:
        self._attempt.event(kind, **fields)

    def end(self, summary: Mapping[str, object]) -> None:
        self._attempt.event(Kind.END, **summary)
