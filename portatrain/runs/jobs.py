"""What was handed to schedulers for a run: `jobs/1.json`, `jobs/2.json` ... of its run directory.

A job is written before it is submitted and gets its scheduler's id after, so that one whose submission was cut short is
known by its name. The files are the record; what a scheduler says of an id is a hint.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.runs.open import open_run
from portatrain.system import json_files
from portatrain.system.urls import is_remote


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way to carry a run out somewhere. `processes` are those that the scheduler starts, over `hosts`; where it is
    1 the command starts as many more as its backend needs on that host."""

    run_dir: str
    """Absolute."""
    recipe: str
    """A file (absolute), of the run's own code once that has been copied, or the name of a shipped recipe."""
    cluster: str
    engine: str
    overrides: tuple[str, ...] = ()
    backend: str | None = None
    """None: the job chooses by what it lands on."""
    mesh: str | None = None
    devices: int | None = None
    hosts: int = 1
    processes: int = 1
    max_restarts: int = 3
    detached: bool = True
    cwd: str = ""
    """Where it was submitted from: relative paths of the recipe's data are relative to it."""
    source: str = ""
    """The recipe as it was given: a file (absolute), or ''; for --new-code."""
    code: str | None = None
    """The folder with the run's own copy of the code; None: what is installed where the job runs."""
    cluster_shape: Mapping[str, Any] = field(default_factory=dict)
    """What the cluster is: chip, chips, slices, topology, chips_per_host, resource (its name in Kubernetes)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the cluster, for its engine."""
    track: tuple[str, ...] = ()
    """The trackers that get its metrics too."""
    number: int = 0
    """Of jobs/N.json; 0: not written yet."""
    id: str | None = None
    """The scheduler's; None: not submitted, or cut short."""
    submitted_unix_s: float | None = None
    submission: str = ""
    """The same for all jobs that were handed over together."""

    @property
    def run(self) -> str:
        """The run's name."""
        return Path(self.run_dir).name

    @property
    def name(self) -> str:
        """What it is called in a scheduler: letters, digits and '-', at most 40, unique to run directory and number."""
        from hashlib import sha256

        short = re.sub(r"[^a-z0-9]+", "-", self.run.lower()).strip("-")[:24].rstrip("-") or "run"
        return f"pt-{short}-{sha256(self.run_dir.encode()).hexdigest()[:6]}-{self.number}"

    def train(self) -> list[str]:
        """The `portatrain train` that carries it out, as words."""
        words = ["portatrain", "train", self.recipe, "--run-dir", self.run_dir]
        for option, value in (("--backend", self.backend), ("--mesh", self.mesh), ("--devices", self.devices)):
            if value is not None:
                words += [option, str(value)]
        for override in self.overrides:
            words += ["--set", override]
        for tracker in self.track:
            words += ["--track", tracker]
        return words

    def write(self) -> Job:
        """Record it under the next free number; the job with that number."""
        number = max((job.number for job in of(self.run_dir)), default=0) + 1
        if is_remote(self.run_dir):
            run = open_run(self.run_dir)
            while not run.put(f"jobs/{number}.json", asdict(replace(self, number=number)), once=True):
                number += 1
            return replace(self, number=number)
        folder = Path(self.run_dir) / "jobs"
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:  # the number is taken by making the file
                os.close(os.open(folder / f"{number}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                break
            except FileExistsError:
                number += 1
        return replace(self, number=number).update()

    def update(self) -> Job:
        open_run(self.run_dir).put(f"jobs/{self.number}.json", asdict(self))
        return self

    def forget(self) -> None:
        """Take it out of the record: it was never submitted."""
        open_run(self.run_dir).remove(f"jobs/{self.number}.json")

    def submitted(self, id: str) -> Job:
        """Record the scheduler's id."""
        return replace(self, id=id, submitted_unix_s=time.time()).update()


def read(run_dir: str | Path, number: int) -> Job:
    """Job `number` of a run; UserError where it is missing or damaged."""
    return _read(open_run(run_dir).path, number)


def _read(folder: Path, number: int) -> Job:
    path = folder / "jobs" / f"{number}.json"
    return of_row(path, json_files.read_object(path))


def of_row(path: Path, found: Mapping[str, Any]) -> Job:
    """The job that a JSON object of the file `path` describes; UserError where it is damaged."""
    known = {f.name for f in fields(Job)}
    try:
        found = {"cluster_shape": found.get("place", {}), **found}  # as earlier releases called it
        row: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in known}
        job = Job(**row)
        _check(job)
        return job
    except (TypeError, ValueError) as error:
        raise UserError(
            str(path), expected="a job that portatrain wrote", got=str(error), do="Restore the file from a copy."
        ) from error


def of(run_dir: str | Path) -> list[Job]:
    """The jobs of a run, in order."""
    path = open_run(run_dir).path
    folder = path / "jobs"
    found = sorted(folder.glob("*.json")) if folder.is_dir() else []
    # An empty file is a number that somebody has just taken.
    numbers = [json_files.digits(p.stem) for p in found if not p.is_file() or p.stat().st_size]
    return [_read(path, n) for n in sorted(n for n in numbers if n is not None)]


TEXTS = ("run_dir", "recipe", "cluster", "engine", "cwd", "source", "submission")


def _check(job: Job) -> None:
    """Raise ValueError for a field of another type than portatrain writes."""
    for f in fields(Job):
        value = getattr(job, f.name)
        if f.name in TEXTS:
            good = isinstance(value, str)
        elif f.name in ("backend", "mesh", "code", "id"):
            good = value is None or isinstance(value, str)
        elif f.name in ("hosts", "processes", "max_restarts", "number"):
            good = type(value) is int and 0 <= value <= 10**9
        elif f.name == "devices":
            good = value is None or (type(value) is int and 1 <= value <= 10**9)
        elif f.name in ("overrides", "track"):
            good = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
        elif f.name == "detached":
            good = isinstance(value, bool)
        elif f.name == "submitted_unix_s":
            good = value is None or (type(value) in (int, float) and 0 <= value <= 1e11)
        else:
            good = isinstance(value, Mapping)
        if not good:
            raise ValueError(f"{f.name}={value!r:.60}")
