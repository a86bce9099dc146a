"""The tracker MLflow: the server of MLFLOW_TRACKING_URI, or a database in the run directory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from portatrain.runs.events import Kind
from portatrain.runs.reported import scalars as scalars_of_event
from portatrain.system import json_files
from portatrain.training.metrics.record import EvalRecord, RunInfo, StepRecord
from portatrain.training.metrics.trackers import imported, run_key, scalars

EVERY_S = 10.0
"""Numbers are sent after so many seconds, since training waits for the request."""
MOST = 1000
"""The most numbers that a request of MLflow takes."""
HELD = 10 * MOST
"""Numbers that are kept before they are sent, at most about so many."""
LONGEST = 500
"""Characters of a parameter that every store of MLflow takes."""
TAG = "portatrain.run"
ENDED = {"done": "FINISHED", "failed": "FAILED"}


class MlflowSink:
    """A ``Sink`` to MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables apply.

    A run is found again by a tag with its id. MLflow appends what it is given, so an attempt that trains steps again
    sends only those that are not there yet. Numbers are sent together, at the latest before a save: a run that goes on
    from a checkpoint finds everything before it.
    """

    def __init__(self) -> None:
        imported("mlflow", "mlflow")
        self._client: Any = None
        self._run = ""
        self._held: list[Any] = []
        self._sent_s = time.monotonic()

    def start(self, info: RunInfo) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{info.run_dir}/mlflow.db"
        client: Any = MlflowClient(tracking_uri=uri)
        name, key = os.environ.get("MLFLOW_EXPERIMENT_NAME", "portatrain"), run_key(info)
        known = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if known is None else known.experiment_id
        found = client.search_runs([experiment], f"tags.`{TAG}` = '{key}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
        else:
            self._run = client.create_run(experiment, tags={TAG: key}, run_name=info.run).info.run_id
            for field, value in _fields(info.recipe):
                client.log_param(self._run, field, value)
        client.set_tag(self._run, f"attempt.{info.attempt}", f"{info.backend} on {info.device}, mesh {info.mesh}")
        self._client = client
        self._there = {kind: self._last(f"{kind}/loss") for kind in ("train", "validation")}
        self._at = 0

    def _last(self, key: str) -> int:
        """Return the last step that has this number; 0 if none has."""
        return max((one.step for one in self._client.get_metric_history(self._run, key)), default=0)

    def step(self, record: StepRecord) -> None:
        self._at = record.step
        if record.step > self._there["train"]:
            self._hold(scalars(record, "train"), record.step)

    def eval(self, record: EvalRecord) -> None:
        if record.step > self._there["validation"]:
            self._hold(scalars(record, "validation"), record.step)

    def event(self, kind: str, **fields: object) -> None:
        if self._client is None:
            return
        step = fields.get("step")
        at = step if isinstance(step, int) else self._at
        if at > self._there["train"]:
            self._hold(scalars_of_event(kind, fields), at)
        if kind == Kind.SAVING:
            self._send()

    def end(self, summary: Mapping[str, object]) -> None:
        if self._client is not None:
            self._send()
            self._client.set_tag(self._run, "summary", str(json_files.strict(dict(summary)))[:5000])
            self._client.set_terminated(self._run, ENDED.get(str(summary.get("status")), "KILLED"))

    def _hold(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._held += [Metric(named(name), value, now, step) for name, value in values.items()]
        if len(self._held) >= HELD or time.monotonic() - self._sent_s > EVERY_S:
            self._send()

    def _send(self) -> None:
        while self._held:
            self._client.log_batch(self._run, metrics=self._held[:MOST])
            del self._held[:MOST]
        self._sent_s = time.monotonic()


def named(name: str) -> str:
    """Return the name of a number as MLflow takes it: 'train/grad.blocks.attn.wq.3'. A name must be no folder of
    another one, as 'validation/loss' would be of 'validation/loss/code'."""
    kind, _, rest = name.partition("/")
    return f"{kind}/{re.sub(r'[^A-Za-z0-9_. :-]', '_', rest.replace('/', '.'))}"


def _fields(recipe: Any, path: str = "") -> list[tuple[str, str]]:
    """Return the fields of a recipe, dotted, with their values as text."""
    if isinstance(recipe, Mapping) and recipe:
        found = []
        for key, value in recipe.items():
            found += _fields(value, f"{path}.{key}" if path else str(key))
        return found
    return [(re.sub(r"[^A-Za-z0-9_. :-]", "_", path), str(recipe)[:LONGEST])]
