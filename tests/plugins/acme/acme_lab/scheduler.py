"""The launcher of the lab's scheduler: `engine = "acme_scheduler"` in clusters.toml, with the option `queue`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from acme_lab.daemon import jobs as queued
from acme_lab.daemon import state
from launchers.base import (
    Job,
    JobRuntime,
    JobState,
    Launcher,
    Rank,
    each_sibling,
    option,
    python,
    shell,
    supervise_command,
    train_here,
)
from portatrain.errors import UserError

OPTIONS = {"queue": "the folder of the queue", "python": "the Python to run with"}


class AcmeScheduler(Launcher):
    """Writes a folder for each job, which `acme_lab.daemon` finds."""

    name: ClassVar[str] = "acme_scheduler"
    example_options: ClassVar[str] = '{ queue = "FOLDER" }'
    options: ClassVar[Mapping[str, str]] = OPTIONS

    def materialize(self, job: Job) -> str:
        return f"{shell(supervise_command(job))}\n"

    def check(self, job: Job) -> None:
        _queue(job)

    def submit(self, job: Job) -> str:
        queue = _queue(job)
        number = 1 + max((int(p.name) for p in queued(queue)), default=0)
        folder = queue / str(number)
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps({"name": job.name, "words": supervise_command(job)}))
        state(folder, "pending")
        return str(number)

    def describe(self, job: Job) -> JobState:
        return JobState(state=state(_folder(job)) if job.id else "gone")

    def logs(self, job: Job) -> Iterator[str]:
        path = _folder(job) / "log"
        yield from path.read_text(errors="replace").splitlines() if path.exists() else ()

    def cancel(self, job: Job) -> None:
        if self.describe(job).state != "gone":
            (_folder(job) / "cancel").touch()

    def release(self, job: Job) -> None:
        if self.describe(job).state == "held":
            state(_folder(job), "pending")

    def hold(self, job: Job) -> None:
        if self.describe(job).state == "pending":
            state(_folder(job), "held")

    def names(self, prefix: str) -> Mapping[str, str]:
        return {}

    def rank(self, env: Mapping[str, str]) -> Rank | None:
        if "ACME_RANK" not in env:
            return None
        return Rank(rank=int(env["ACME_RANK"]), world=int(env["ACME_WORLD"]))

    def scheduler_facts(self, env: Mapping[str, str]) -> Mapping[str, str]:
        return {name: env[name] for name in ("ACME_JOB", "ACME_QUEUE") if name in env}

    def doctor(self, options: Mapping[str, Any], storage: Path | None) -> Iterator[tuple[str, str, str]]:
        there = Path(str(options.get("queue", ""))).is_dir()
        yield "queue", "ok" if there else "bad", f"{options.get('queue')} {'is' if there else 'is not'} a folder"

    def runtime(self, job: Job) -> JobRuntime:
        return AcmeRuntime(job)


class AcmeRuntime(JobRuntime):
    """A job that the daemon has started on this machine."""

    def __init__(self, job: Job) -> None:
        self.job, self.launcher = job, AcmeScheduler()

    def on_claimed(self) -> None:
        each_sibling(self.job, self.launcher.hold)

    def command(self, attempt: Path) -> tuple[list[str], dict[str, str], Path | None]:
        words = [python(self.job), "-m", "portatrain.cli", *train_here(self.job)]
        return words, {"PORTATRAIN_PARENT": str(os.getpid())}, attempt / "rank-0.log"

    def means(self, signum: int) -> str:
        folder = Path(os.environ["ACME_QUEUE"], os.environ["ACME_JOB"])
        if (folder / "cancel").exists():
            return "cancel"
        return "preempt" if signum == signal.SIGTERM and (folder / "preempt").exists() else "unclear"

    def on_exit(self, outcome: str) -> None:
        if outcome == "over":
            each_sibling(self.job, self.launcher.cancel)
        elif outcome == "preempted":
            each_sibling(self.job, self.launcher.release)


class Unfinished:
    """A launcher that lacks most members: it is refused when it is named."""

    name = "acme_unfinished"

    def submit(self, job: Job) -> str:
        return ""


def _queue(job: Job) -> Path:
    queue = option(job, "queue", str)
    if queue is None or not Path(queue).is_dir():
        raise UserError(
            f"cluster {job.cluster}: option queue",
            expected="the folder of the scheduler's queue",
            got=repr(queue),
            do="Start the daemon, and name its folder in clusters.toml.",
        )
    return Path(queue)


def _folder(job: Job) -> Path:
    return _queue(job) / str(job.id)
