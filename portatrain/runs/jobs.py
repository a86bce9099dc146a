"""The jobs of a run: `jobs/1.json`, `jobs/2.json` ... of its run directory.

A job is written before it is submitted, and gets the scheduler's id afterwards. A job that was submitted but has no id
yet can therefore be found by its name. The files are the record; the scheduler's answer about an id is a hint.
"""

from __future__ import annotations

import json
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
    """One job of a run on one cluster.

    `processes` is the number of processes that the scheduler starts, over all `hosts`. If it is 1, the command starts
    the further processes that its backend needs on that host.
    """

    run_dir: str
    """Absolute."""
    recipe: str
    """The absolute path of a recipe file (in the run's copy of the code if it has one) or a shipped recipe's name."""
    cluster: str
    engine: str
    overrides: tuple[str, ...] = ()
    backend: str | None = None
    """None: the job chooses when it starts, from the devices of its machine."""
    mesh: str | None = None
    devices: int | None = None
    hosts: int = 1
    processes: int = 1
    max_restarts: int = 3
    detached: bool = True
    cwd: str = ""
    """The working directory of the submission; relative paths of the recipe's data start from it."""
    source: str = ""
    """The recipe file that the user gave (an absolute path), or ''; for --new-code."""
    code: str | None = None
    """The folder with the run's own copy of the code; None: the job uses the code that its machine has installed."""
    cluster_shape: Mapping[str, Any] = field(default_factory=dict)
    """The cluster's chip, chips, slices, topology, chips_per_host and resource (its name in Kubernetes)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The cluster's options for its engine."""
    track: tuple[str, ...] = ()
    """The names of the trackers that get its metrics as well."""
    profile: str | None = None
    """The steps to profile, 'FIRST:LAST'."""
    number: int = 0
    """The N of jobs/N.json; 0: not written yet."""
    id: str | None = None
    """The scheduler's id; None: not submitted, or the submission was interrupted."""
    submitted_unix_s: float | None = None
    submission: str = ""
    """The same for all jobs that were submitted together."""

    @property
    def run(self) -> str:
        """The run's name."""
        return Path(self.run_dir).name

    @property
    def name(self) -> str:
        """The job's name in the scheduler: at most 40 letters, digits and '-', unique to run directory and number."""
        from hashlib import sha256

        short = re.sub(r"[^a-z0-9]+", "-", self.run.lower()).strip("-")[:24].rstrip("-") or "run"
        return f"pt-{short}-{sha256(self.run_dir.encode()).hexdigest()[:6]}-{self.number}"

    def train(self) -> list[str]:
        """Return the words of the `portatrain train` command that the job runs."""
        words = ["portatrain", "train", self.recipe, "--run-dir", self.run_dir]
        for name in ("backend", "mesh", "devices", "profile"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", str(value)]
        for override in self.overrides:
            words += ["--set", override]
        for tracker in self.track:
            words += ["--track", tracker]
        return words

    def write(self) -> Job:
        """Write the job under the next free number; return it with that number."""
        number = max((job.number for job in of(self.run_dir)), default=0) + 1
        if is_remote(self.run_dir):
            run = open_run(self.run_dir)
            while not run.put(f"jobs/{number}.json", _public(replace(self, number=number)), once=True):
                number += 1
            return replace(self, number=number)
        folder = Path(self.run_dir) / "jobs"
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:  # creating the file reserves the number
                os.close(os.open(folder / f"{number}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                break
            except FileExistsError:
                number += 1
        return replace(self, number=number).update()

    def update(self) -> Job:
        env = self.options.get("env")
        if isinstance(env, Mapping) and env and None not in env.values() and not is_remote(self.run_dir):
            _write_private(_private(Path(self.run_dir), self.number), env)
        open_run(self.run_dir).put(f"jobs/{self.number}.json", _public(self))
        return self

    def forget(self) -> None:
        """Remove a job that was never submitted from the record."""
        open_run(self.run_dir).remove(f"jobs/{self.number}.json")
        if not is_remote(self.run_dir):
            _private(Path(self.run_dir), self.number).unlink(missing_ok=True)

    def submitted(self, id: str) -> Job:
        """Record the scheduler's id."""
        return replace(self, id=id, submitted_unix_s=time.time()).update()


def read(run_dir: str | Path, number: int) -> Job:
    """Return job `number` of a run; UserError if it is missing or damaged."""
    return _read(open_run(run_dir).path, number)


def _read(folder: Path, number: int) -> Job:
    path = folder / "jobs" / f"{number}.json"
    job = of_row(path, json_files.read_object(path))
    private = _private(folder, number)
    env = job.options.get("env")
    if isinstance(env, Mapping) and None in env.values() and os.access(private, os.R_OK):
        known = json_files.read_object(private)
        job = replace(job, options={**job.options, "env": {k: known.get(k, v) for k, v in env.items()}})
    return job


def _public(job: Job) -> dict[str, Any]:
    """Return the fields of a job for the record. Of its environment variables, which may be secret, it has the names:
    the values are with the scheduler, and in a file beside the record that only its owner can read."""
    row = asdict(job)
    env = job.options.get("env")
    if isinstance(env, Mapping):
        row["options"] = {**row["options"], "env": dict.fromkeys(map(str, env))}
    return row


def _private(folder: Path, number: int) -> Path:
    return folder / "jobs" / f"{number}.env.json"


def _write_private(path: Path, env: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    json_files.write_text(path, json.dumps(json_files.strict(env), indent=2) + "\n", mode=0o600)


def of_row(path: Path, found: Mapping[str, Any]) -> Job:
    """Return the job that the JSON object `found` of the file `path` describes; UserError if it is damaged."""
    known = {f.name for f in fields(Job)}
    try:
        found = {"cluster_shape": found.get("place", {}), **found}  # the key of earlier releases
        row: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in known}
        job = Job(**row)
        _check(job)
        return job
    except (TypeError, ValueError) as error:
        raise UserError(
            str(path), expected="a job that portatrain wrote", got=str(error), do="Restore the file from a copy."
        ) from error


def of(run_dir: str | Path) -> list[Job]:
    """Return the jobs of a run, in order."""
    path = open_run(run_dir).path
    folder = path / "jobs"
    found = sorted(folder.glob("*.json")) if folder.is_dir() else []
    # An empty file is a number that another process has just reserved.
    numbers = [json_files.digits(p.stem) for p in found if not p.is_file() or p.stat().st_size]
    return [_read(path, n) for n in sorted(n for n in numbers if n is not None)]


TEXTS = ("run_dir", "recipe", "cluster", "engine", "cwd", "source", "submission")


def _check(job: Job) -> None:
    """Raise ValueError if a field does not have the type that portatrain writes."""
    for f in fields(Job):
        value = getattr(job, f.name)
        if f.name in TEXTS:
            good = isinstance(value, str)
        elif f.name in ("backend", "mesh", "code", "id", "profile"):
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
