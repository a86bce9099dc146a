"""The results of evaluation tasks on the checkpoints of a run: one small file for each task and step, in `tasks/`.

Another result of the same task, step, weights and number of examples replaces the one before it. The files are beside
the attempts, because a checkpoint is evaluated by whoever wants to, while the run goes on or when it is over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from portatrain.runs.rows import bounded, damaged, numbers, whole
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files

FOLDER = "tasks"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one task gave on one checkpoint."""

    task: str
    step: int
    """The steps that the weights were trained for."""
    metrics: Mapping[str, float]
    samples: int | None = None
    """The number of documents; None for a group, which has none of its own."""
    shots: int | None = None
    """Examples before each question."""
    ema: bool = False
    """Whether the weights were the averaged ones."""
    backend: str = ""
    version: str = ""
    """The version of the task, as its definition says."""
    release: str = ""
    """The package that ran it, with its release."""
    unix_s: float = 0.0

    @property
    def label(self) -> str:
        """The task as a curve of the report names it."""
        return self.task + (f", {self.shots} shots" if self.shots else "") + (", averaged weights" if self.ema else "")


def record(run: RunDir, result: TaskResult) -> str:
    """Write a result into the record of a run; return the name of the file."""
    about = re.sub(r"[^\w.-]", "-", result.task) + (f"-{result.shots}-shot" if result.shots else "")
    name = f"{FOLDER}/step-{result.step:08d}-{about}{'-ema' if result.ema else ''}.json"
    (run.path / FOLDER).mkdir(parents=True, exist_ok=True)
    run.put(name, asdict(result))
    return name


def results(run: RunDir, live: Iterable[Mapping[str, Any]] = ()) -> list[TaskResult]:
    """Return the results of a run, by task and step. Raises UserError for a damaged file.

    live: the events `task` of its attempts, in order. The newest of a task and step counts, and a file before events.
    """
    found = []
    for path in sorted((run.path / FOLDER).glob("*.json")):
        row = json_files.read_object(path)
        try:
            found.append(_checked(row))
        except (ValueError, TypeError) as error:
            raise damaged(path, error) from error
    known = {(one.label, one.step): one for event in live for one in _of_event(event)}
    known |= {(one.label, one.step): one for one in found}
    return sorted(known.values(), key=lambda one: (one.label, one.step))


def _of_event(event: Mapping[str, Any]) -> list[TaskResult]:
    try:
        return [_checked(dict(event))]
    except (ValueError, TypeError):
        return []  # of another release: the curve can do without it


def _checked(row: dict[str, Any]) -> TaskResult:
    whole(row, "step", required=True)
    for key in ("samples", "shots"):
        whole(row, key)
    for key in ("task", "backend", "version", "release"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"{key!r} is no text")
    if not row.get("task") or not isinstance(row.get("ema", False), bool):
        raise ValueError("'task' or 'ema' is missing or of another type")
    row["metrics"] = numbers(row.get("metrics") or {}, "metrics")
    row["unix_s"] = bounded(row.get("unix_s") or 0.0, "unix_s", 1e11)
    return TaskResult(**{name: row[name] for name in TaskResult.__dataclass_fields__ if name in row})
