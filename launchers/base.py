"""The protocol of launchers, and the functions that find them.

A launcher carries jobs to one kind of scheduler. A job runs `launchers.supervisor` on its first host; that reads the
record, takes the claim, and starts `portatrain train` as the launcher's `JobRuntime` says. So schedulers differ in what
is submitted, in how processes are started, and in what a signal means.

A lab's launcher is a class with the members of `Launcher`, registered under the entry points `portatrain.launchers`
(docs/plugins.md).
"""

from __future__ import annotations

import os
import shlex
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from launchers.cluster_options import Option, check_options, missing, option, variables
from portatrain.errors import UserError
from portatrain.plan.clusters.catalog import CHIPS
from portatrain.plan.clusters.chip import Chip
from portatrain.runs import jobs
from portatrain.runs.jobs import Job
from portatrain.system import environment
from portatrain.system.plugins import Registry, lacks
from portatrain.system.urls import is_remote

__all__ = [
    "Job",
    "JobRuntime",
    "JobState",
    "Launcher",
    "Option",
    "Rank",
    "RuntimeInImage",
    "carriers",
    "check_options",
    "check_shared",
    "commands_in_image",
    "each_sibling",
    "launcher",
    "launcher_names",
    "missing",
    "option",
    "runtime_of",
    "supervise_command",
    "tolerantly",
    "train_here",
    "variables",
]

LAUNCHERS = Registry(
    kind="engine",
    group="portatrain.launchers",
    ours={
        "local": "launchers.local:LocalLauncher",
        "slurm": "launchers.slurm:SlurmLauncher",
        "kubernetes": "launchers.kubernetes:KubernetesLauncher",
        "skypilot": "launchers.skypilot:SkyPilotLauncher",
        "gcp_tpu": "launchers.gcp_tpu:GcpTpuLauncher",
    },
)
"""Every launcher by name. `rank` is asked in this order: pods of a JobSet on TPUs have Cloud TPU's variables too."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The scheduler's answer about a job. It is only a hint; the run directory is the record."""

    state: str
    """'pending', 'held', 'running', 'gone' (it knows no such job, or one that has ended) or 'unknown' (no answer)."""
    reason: str = ""
    """The scheduler's own words."""
    where: str = ""
    """The nodes on which it runs."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The number of a process among those of its job, and among those of its host."""

    rank: int
    world: int
    local_rank: int = 0
    local_world: int = 1


class Launcher(Protocol):
    """Carries jobs to one kind of scheduler. It is made without arguments and keeps no state between calls.

    Every method raises UserError if the scheduler cannot be reached, or refuses. A class that inherits from this
    Protocol has the defaults below; one that does not must have every member.
    """

    name: ClassVar[str]
    """The name of the launcher, which `engine = "..."` in clusters.toml gives."""
    example_options: ClassVar[str] = "{ }"
    """The options that a cluster cannot do without, as a TOML table to be filled in."""
    options: ClassVar[Mapping[str, Option | str]] = {}
    """The options that a cluster can have, each with its meaning. Others are refused."""
    queues: ClassVar[bool] = True
    """True: jobs wait, several may be handed over for one run, and the first to start claims it; such a launcher needs
    a cluster of clusters.toml. False: a job starts at once, and the launcher's name alone is a cluster."""

    def carries(self, chip: Chip) -> bool:
        """Return whether jobs for such chips can be carried. Only suggestions depend on it."""
        return True

    @abstractmethod
    def materialize(self, job: Job) -> str:
        """Return exactly what `submit` would hand over, as text. Change nothing; need nothing installed."""
        ...

    def check_settings(self, job: Job) -> None:
        """Raise UserError for what is wrong in the options of the job's cluster. Ask nothing of this machine or of the
        scheduler: `--dry-run` calls it too."""
        check_options(job, self.options)

    @abstractmethod
    def check(self, job: Job) -> None:
        """Raise UserError for what would keep the job from ever starting: a folder that its machines will not see, what
        is not installed, what the scheduler does not have. `check_settings` was called before. Change nothing."""
        ...

    @abstractmethod
    def submit(self, job: Job) -> str:
        """Hand over a job that is written in the record; return the scheduler's id of it. What is handed over runs
        `supervise_command(job)` on the job's first host."""
        ...

    @abstractmethod
    def describe(self, job: Job) -> JobState:
        """Return what the scheduler says of the job."""
        ...

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """Take the job out of the scheduler, pending or running. Do nothing if it is gone."""
        ...

    @abstractmethod
    def runtime(self, job: Job) -> JobRuntime:
        """Return the job's life on its first host, where this is called."""
        ...

    def logs(self, job: Job) -> Iterator[str]:
        """Yield the lines that the scheduler itself has of the job's output, beside the logs in the run directory."""
        return iter(())

    def release(self, job: Job) -> None:
        """Let a held job start. Do nothing if the scheduler cannot hold jobs."""
        return

    def names(self, prefix: str) -> Mapping[str, str]:
        """Return name -> id of the user's jobs in the scheduler whose names begin with `prefix`, to find orphans."""
        return {}

    def rank(self, env: Mapping[str, str]) -> Rank | None:
        """Return the rank that the scheduler's variables in `env` give; None if they are not there."""
        return None

    def scheduler_facts(self, env: Mapping[str, str]) -> Mapping[str, str]:
        """Return the variables of `env` that say where in the scheduler this is, for the record."""
        return {}

    def doctor(self, options: Mapping[str, Any], storage: Path | None) -> Iterator[tuple[str, str, str]]:
        """Yield (the subject of a check, 'ok' | 'warn' | 'bad', the result and what to do). `storage` is the folder of
        the runs; None if they would be in an object store."""
        return iter(())


class JobRuntime(Protocol):
    """The life of a job on its first host: how the supervisor starts an attempt, and what its ends mean."""

    restarts: ClassVar[bool] = True
    """Whether the supervisor can start another attempt after one has failed. False if the scheduler starts the
    processes of the other hosts, because it must then start all of them again."""

    def yield_to_preferred(self) -> None:
        """Before claiming, wait briefly for a sibling job on a preferred cluster that is starting now."""
        return

    def on_claimed(self) -> None:
        """React to the claim that this job has taken: siblings should not start."""
        return

    @abstractmethod
    def command(self, attempt: Path) -> tuple[list[str], dict[str, str], Path | None]:
        """Return one attempt's (command, additional environment, file for its output). The file is None if the command
        opens its own. `attempt` is the folder of the attempt."""
        ...

    def means(self, signum: int) -> str:
        """Return the meaning of a signal to the supervisor: 'preempt', 'cancel' or 'unclear'."""
        return "unclear"

    def on_exit(self, outcome: str) -> None:
        """React to the end of this job's part in the run, after the claim has been released. `outcome` is 'over' (the
        run is done, cancelled or given up), 'preempted', 'unclear' (the job was asked to stop for an unknown reason),
        'failed' (the scheduler should start it again) or 'superseded' (another attempt has the run)."""
        return


class RuntimeInImage(JobRuntime):
    """The first host of a job, if the scheduler starts the processes of all hosts and restarts all of them together."""

    restarts: ClassVar[bool] = False
    logs: ClassVar[bool] = True
    """Whether the output of process 0 goes to the attempt's folder; otherwise the scheduler keeps it."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def command(self, attempt: Path) -> tuple[list[str], dict[str, str], Path | None]:
        words = [sys.executable, "-m", "launchers.rank_entry", *train_here(self.job)]
        return words, {}, attempt / "rank-0.log" if self.logs else None

    def means(self, signum: int) -> str:
        return "preempt"  # a cancel takes the job out, and leaves nothing that could start again


def launcher_names() -> list[str]:
    """Return the names of all launchers, ours first."""
    return LAUNCHERS.names()


def launcher(name: str) -> Launcher:
    """Return the launcher `name`.

    Raises:
        UserError: there is none of that name, it does not import, or it lacks members of `Launcher`.
    """
    found = LAUNCHERS.load(name)
    if missing := lacks(found, Launcher):
        raise UserError(
            f"engine {name}",
            expected="a class with the members of launchers.base.Launcher",
            got=f"{getattr(found, '__qualname__', found)}, without {', '.join(missing)}",
            do="Add them, or inherit from Launcher for those that have a default.",
        )
    made: Launcher = found()
    return made


def runtime_of(job: Job) -> JobRuntime:
    """Return the runtime of `job` on its first host, which is this one; UserError if it lacks members."""
    found = launcher(job.engine).runtime(job)
    if missing := lacks(found, JobRuntime):
        raise UserError(
            f"engine {job.engine}: runtime",
            expected="an object with the members of launchers.base.JobRuntime",
            got=f"{type(found).__qualname__}, without {', '.join(missing)}",
            do="Add them, or inherit from JobRuntime for those that have a default.",
        )
    return found


def carriers(chip: Chip) -> list[str]:
    """Return the launchers that could carry a job to such chips through a queue, the most specialised ones first."""
    found = []
    for name in launcher_names():
        try:
            one = launcher(name)
        except UserError:  # a broken package must not keep the others from being suggested
            continue
        if one.queues and one.carries(chip):
            found.append((sum(one.carries(other) for other in CHIPS.values()), name))
    return [name for _, name in sorted(found, key=lambda pair: pair[0])]


def each_sibling(job: Job, verb: Callable[[Job], None]) -> None:
    """Call `verb`, as `tolerantly` does, with every other job of the run that has the same launcher."""
    others = [j for j in jobs.of(job.run_dir) if j.engine == job.engine and j.id is not None and j.number != job.number]
    for sibling in others:
        tolerantly(verb, sibling)


def tolerantly(verb: Callable[[Job], None], job: Job) -> None:
    """Call `verb` with `job`; say so on standard error if the scheduler refuses (it has just started, or is gone)."""
    try:
        verb(job)
    except UserError as error:
        print(f"job {job.number} ({job.id}): {error}", file=sys.stderr, flush=True)


def supervise_command(job: Job) -> list[str]:
    """Return the command of a job's first host, as words for `env`."""
    return _with_code(job, python(job), *_supervisor(job))


def commands_in_image(job: Job) -> tuple[list[str], list[str]]:
    """Return (command of the first host, command of the others), for a scheduler that starts one command on every host
    and uses an image or a machine other than this one."""
    there = str(job.options.get("python", "python3"))
    other = ("-m", "launchers.rank_entry", *job.train()[1:])
    return _with_code(job, there, *_supervisor(job)), _with_code(job, there, *other)


def train_here(job: Job) -> list[str]:
    """Return `Job.train` without its first word, with the path of the run's code on this machine."""
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
        # The portatrain that is installed there fetches the run's own code, and continues with it.
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
            expected="a location that the cluster's machines can access",
            got="a folder of this machine",
            do=f"Give --runs s3://bucket/runs (gs://, az://), or {how}.",
        )


def host_processes(job: Job) -> dict[str, str]:
    """Return the variables for `launchers.rank_entry` if the scheduler starts fewer processes per host than needed."""
    return {environment.HOST_PROCESSES.name: str(job.processes // job.hosts)} if job.processes > job.hosts else {}


def python(job: Job) -> str:
    """Return the Python of the cluster, or this process's Python if none is configured."""
    return str(job.options.get("python", sys.executable))


def shell(words: list[str]) -> str:
    """Join words to a line for a shell."""
    return shlex.join(words)


def exports(variables: Mapping[str, str]) -> list[str]:
    """Return the lines of a shell script that set environment variables."""
    return [f"export {shell([f'{name}={value}'])}" for name, value in variables.items()]
