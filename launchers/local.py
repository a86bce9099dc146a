"""This machine: `launch --cluster local RECIPE`, in the foreground, or in the background with --detach."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from launchers.base import (
    Job,
    JobRuntime,
    JobState,
    Launcher,
    Option,
    python,
    shell,
    supervise_command,
    train_here,
    variables,
)
from portatrain.errors import UserError
from portatrain.runs.claim import process_start
from portatrain.runs.open import open_run
from portatrain.system import environment

OPTIONS = {
    "python": Option("the Python to run with", default="the Python of `launch`"),
    "env": Option("environment variables, a table", (dict,)),
}
STARTS_WITHIN_S = 20.0


class LocalLauncher(Launcher):
    """A detached job: a supervisor in a session of its own starts the training, and again after a failure.

    A foreground job does not use a launcher: `portatrain.commands.foreground` runs it.
    """

    name: ClassVar[str] = "local"
    queues: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Option | str]] = OPTIONS

    def materialize(self, job: Job) -> str:
        if not job.detached:
            return shell(job.train())
        return f"{shell(supervise_command(job))}\n# which runs, as often as needed:\n{shell(job.train())}"

    def check(self, job: Job) -> None:
        return  # this machine has all that it needs

    def submit(self, job: Job) -> str:
        run = open_run(job.run_dir, work=True)
        log = run.path / "jobs" / f"{job.number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                supervise_command(job),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **variables(job)},
            )
        # The supervisor runs on this machine, so its success or failure shows at once.
        until_s = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < until_s and process.poll() is None:
            owner = run.owner()
            if owner is not None and owner.pid == process.pid:
                break
            time.sleep(0.05 if run.locks else 1.0)
        if process.poll() not in (None, 0):
            raise UserError(
                f"job {job.number} of {job.run}",
                expected="a supervisor that starts",
                got=f"exit code {process.returncode}: {log.read_text(errors='replace').strip()[-400:]}",
                do=f"Its output is in {log}.",
            )
        started = f"{process.pid}@{process_start(process.pid) or ''}"
        process.returncode = 0  # it is to outlive this process, which Popen would warn of
        return started

    def describe(self, job: Job) -> JobState:
        pid = _pid(job)
        if pid is None:
            return JobState(state="gone")
        return JobState(state="running", where=f"process {pid}")

    def logs(self, job: Job) -> Iterator[str]:
        run = open_run(job.run_dir)
        run.refresh(logs=True)
        path = run.path / "jobs" / f"{job.number}.log"
        if path.exists():
            yield from path.read_text(errors="replace").splitlines()

    def cancel(self, job: Job) -> None:
        pid = _pid(job)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)

    def runtime(self, job: Job) -> JobRuntime:
        return LocalRuntime(job)


class LocalRuntime(JobRuntime):
    """A detached job. It has no scheduler to requeue it (`launch resume` continues the run) and no siblings."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def command(self, attempt: Path) -> tuple[list[str], dict[str, str], Path | None]:

        words = [python(self.job), "-m", "portatrain.cli", *train_here(self.job)]
        return words, {environment.PARENT.name: str(os.getpid())}, attempt / "rank-0.log"


def _pid(job: Job) -> int | None:
    """Return the PID of the supervisor if it is alive."""
    pid, _, start = (job.id or "").partition("@")
    return int(pid) if pid.isdigit() and start and process_start(int(pid)) == start else None
