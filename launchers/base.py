"""What a launcher is, and how one is found.

A launcher carries jobs to one kind of place. A job runs `launchers.supervisor` on its first host; that reads the
record, takes the claim, and starts `portatrain train` as the launcher's `Landed` says. So what differs between places
is: what is submitted, how processes are started there, and what a signal means there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from portatrain.errors import UserError, choice
from portatrain.runs.jobs import Job
from portatrain.system import environment
from portatrain.system.urls import is_remote

__all__ = [
    "GROUP",
    "Job",
    "JobState",
    "Landed",
    "LandedInImage",
    "Launcher",
    "check_shared",
    "commands_in_image",
    "launcher",
    "launcher_names",
    "train_here",
    "supervise_command",
]

GROUP = "portatrain.launchers"
"""The entry-point group that a lab's own launchers register in."""

_OURS = {
    "local": "launchers.local:LocalLauncher",
    "slurm": "launchers.slurm:SlurmLauncher",
    "kubernetes": "launchers.kubernetes:KubernetesLauncher",
    "skypilot": "launchers.skypilot:SkyPilotLauncher",
    "gcp_tpu": "launchers.gcp_tpu:GcpTpuLauncher",
}

STATES = ("pending", "held", "running", "gone", "unknown")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What a scheduler says of a job: a hint, the run directory is the record."""

    state: str
    """'pending', 'held', 'running', 'gone' (it knows no such job, or one that has ended) or 'unknown' (no answer)."""
    reason: str = ""
    """The scheduler's own words."""
    where: str = ""
    """Nodes, where it runs."""


class Launcher(Protocol):
    """Carries jobs to one kind of place. Every verb raises UserError where the place cannot be reached."""

    def materialize(self, job: Job) -> str:
        """Exactly what `submit` would hand over, as text; changes nothing and needs nothing installed."""
        ...

    def check(self, job: Job) -> None:
        """Raise UserError for what would keep the job from ever starting; changes nothing."""
        ...

    def submit(self, job: Job) -> str:
        """Hand a written job over; return the scheduler's id of it."""
        ...

    def describe(self, job: Job) -> JobState:
        """What the scheduler says of it."""
        ...

    def logs(self, job: Job) -> Iterator[str]:
        """What the engine itself has of the job's output, beside the logs in the run directory."""
        ...

    def cancel(self, job: Job) -> None:
        """Take it out of the scheduler, pending or running; nothing where it is gone."""
        ...

    def release(self, job: Job) -> None:
        """Let a held job start."""
        ...

    def names(self, prefix: str) -> Mapping[str, str]:
        """name -> id of the user's jobs in the scheduler whose names begin so; for finding orphans."""
        ...

    def doctor(self, options: Mapping[str, Any], storage: Path | None) -> Iterator[tuple[str, str, str]]:
        """(what was looked at, 'ok' | 'warn' | 'bad', what was found and how to mend it). `storage`: where runs would
        be; None where that is an object store."""
        ...


class Landed(Protocol):
    """A job where it has landed: how the supervisor starts an attempt there, and what ends mean."""

    restarts: bool
    """Whether another attempt can be started after one has failed. False where the engine starts the processes of the
    other hosts: it must start them all again."""

    def give_way(self) -> None:
        """Nothing is claimed yet: wait for a job of a place that is preferred to this one and starts at this moment."""
        ...

    def arrive(self) -> None:
        """The claim is ours: siblings may not start."""
        ...

    def command(self, attempt: Path) -> tuple[list[str], dict[str, str], Path | None]:
        """(command, more environment, file for its output or None where it opens its own) of one attempt."""
        ...

    def means(self, signum: int) -> str:
        """What a signal to the supervisor means here: 'preempt', 'cancel' or 'unclear'."""
        ...

    def leave(self, outcome: str) -> None:
        """The claim has been released. 'over' (done, cancelled or given up), 'preempted', 'unclear' (asked to stop, and
        nothing says why), 'failed' (for the engine to start again) or 'aside' (another attempt has the run)."""
        ...


class LandedInImage:
    """The first host of a job whose engine starts the processes of all hosts, and all of them again. See `Landed`."""

    restarts = False
    logs = True
    """Whether the output of process 0 goes to the attempt's folder; else to the engine."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def give_way(self) -> None:
        """There is nothing to wait for: whichever claims the run first goes on."""

    def arrive(self) -> None:
        """Siblings that start step aside by the claim."""

    def command(self, attempt: Path) -> tuple[list[str], dict[str, str], Path | None]:
        words = [sys.executable, "-m", "launchers.rank_entry", *train_here(self.job)]
        return words, {}, attempt / "rank-0.log" if self.logs else None

    def means(self, signum: int) -> str:
        return "preempt"  # a cancel takes the job out, and leaves nothing that could start again

    def leave(self, outcome: str) -> None:
        """Nothing is left behind."""


def launcher_names() -> list[str]:
    """The engines that there are, ours first."""
    theirs = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    return [*_OURS, *sorted(theirs - set(_OURS))]


def launcher(name: str) -> Any:
    """The launcher `name`; UserError for one that there is not."""
    if name not in launcher_names():
        raise choice(f"engine {name!r}", name, launcher_names())
    if name in _OURS:
        module, _, qualname = _OURS[name].partition(":")
        return getattr(importlib.import_module(module), qualname)()
    (point,) = importlib.metadata.entry_points(group=GROUP, name=name)
    return point.load()()


def supervise_command(job: Job) -> list[str]:
    """What a job runs on its first host, as words for `env`."""
    return _with_code(job, python(job), *_supervisor(job))


def commands_in_image(job: Job) -> tuple[list[str], list[str]]:
    """(what the first host runs, what the others run), where an engine starts the same command on every host of an
    image or machine that is not this one."""
    there = str(job.options.get("python", "python3"))
    landing = ("-m", "launchers.rank_entry", *job.train()[1:])
    return _with_code(job, there, *_supervisor(job)), _with_code(job, there, *landing)


def train_here(job: Job) -> list[str]:
    """`Job.train` without its first word, with the code of the run where it lies on this machine."""
    words = job.train()[1:]
    if job.code is None or not is_remote(job.code):
        return words
    from portatrain.runs.remote_run_dir import localized

    return localized(words, job.code)


def _supervisor(job: Job) -> tuple[str, ...]:
    return "-m", "launchers.supervisor", job.run_dir, str(job.number)


def _with_code(job: Job, python: str, *args: str) -> list[str]:
    # Without PYTHONSAFEPATH the working directory's modules would come before the run's own.
    words = ["env", "PYTHONSAFEPATH=1"]
    if job.code is not None and is_remote(job.code):
        # What is installed there fetches the run's own code, and goes on with that.
        return [*words, python, "-m", "portatrain.runs.remote_run_dir", job.code, python, *args]
    path = job.code if job.code is not None else os.environ.get("PYTHONPATH")
    return [*words, *([f"PYTHONPATH={path}"] if path else []), python, *args]


def check_shared(job: Job, mounted: Mapping[str, Any] | None, how: str) -> None:
    """Raise UserError unless machines that share nothing with this one will see the run directory: in an object store,
    or in one of the folders that are `mounted` there (None: the user's set-up lines may do so)."""
    if is_remote(job.run_dir) or mounted is None:
        return
    if not any(Path(job.run_dir).is_relative_to(folder) for folder in mounted):
        raise UserError(
            f"run directory {job.run_dir}",
            expected="a place that the machines there see too",
            got="a folder of this one",
            do=f"Give --runs s3://bucket/runs (gs://, az://), or {how}.",
        )


def host_processes(job: Job) -> dict[str, str]:
    """What `launchers.rank_entry` has to be told where an engine starts one process a host and the backend has more."""
    return {environment.HOST_PROCESSES.name: str(job.processes // job.hosts)} if job.processes > job.hosts else {}


def python(job: Job) -> str:
    """The Python to run with: the cluster's, else this one."""
    return str(job.options.get("python", sys.executable))


def shell(words: list[str]) -> str:
    """Words as a line for a shell."""
    return shlex.join(words)


def option(job: Job, name: str, kind: type, default: Any = None) -> Any:
    """An option of the job's cluster; UserError where it is of another kind."""
    value = job.options.get(name, default)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    raise UserError(
        f"cluster {job.cluster}: option {name}",
        expected=f"a {kind.__name__}",
        got=repr(value),
        do="Mend it in clusters.toml.",
    )


def check_options(job: Job, known: Mapping[str, str]) -> None:
    """Raise UserError for an option that the engine does not know."""
    for name in job.options:
        if name not in known:
            raise choice(f"cluster {job.cluster}: option {name!r} of {job.engine}", name, known)
