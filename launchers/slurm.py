"""Submit jobs to Slurm: one batch job for each acceptable partition. The first job to start claims the run.

The job that starts holds its siblings. If it is preempted, it saves, releases the siblings and requeues itself. The job
that finishes cancels the others. It needs no daemon, no accounting and no job array, and treats the answers of `squeue`
as hints.

The meaning of signals: the script asks Slurm for USR1 before its time limit (`--signal=B:USR1@60`), and with
`SlurmctldParameters=preempt_send_user_signal` Slurm sends USR1 at a preemption too. At a TERM the launcher asks Slurm
whether the job is preempted or cancelled.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from launchers.base import (
    Job,
    JobRuntime,
    JobState,
    Launcher,
    Option,
    Rank,
    check_options,
    each_sibling,
    exports,
    option,
    python,
    shell,
    supervise_command,
    variables,
)
from launchers.slurm_commands import call, installed
from portatrain.errors import UserError
from portatrain.plan.clusters.chip import Chip
from portatrain.runs import jobs
from portatrain.runs.open import open_run
from portatrain.system import environment
from portatrain.system.environment import whole_number
from portatrain.system.processes import free_port
from portatrain.system.urls import is_remote

SIGNAL_S = 60
OPTIONS = {
    "partition": Option("a partition, or several, as in gpu,spot", default="the default partition of Slurm"),
    "account": Option("an account", default="the user's default account"),
    "qos": Option("a QOS", default="the default QOS"),
    "gres": Option("generic resources, as in gpu:h100:8"),
    "constraint": Option("node features"),
    "time": Option("a time limit, as in 24:00:00, or minutes", (str, int), "the limit of the partition"),
    "signal_s": Option("seconds before the time limit at which Slurm sends USR1", (int,), SIGNAL_S),
    "grace_s": Option("seconds from the signal of a preemption to the kill", (int,), "the partition's GraceTime"),
    "cpus_per_task": Option("CPUs of a process", (int,), "the default of Slurm"),
    "mem": Option("memory of a node, as in 500G, or MiB", (str, int), "the default of the partition"),
    "exclusive": Option("true: ask for whole nodes", (bool,), "false"),
    "setup": Option("shell lines to run before the start, as in module load cuda"),
    "python": Option("the Python to run with", default="the Python of `launch`"),
    "env": Option("environment variables, a table", (dict,)),
    "sbatch": Option("more #SBATCH options, a list of words", (list,)),
    "srun": Option("more options of srun, a list of words", (list,)),
    "hang_s": Option(
        "seconds without progress after which an attempt counts as hung; 0: never",
        (int, float),
        environment.HANG_S.otherwise,
    ),
}
ENDS_WITHIN_S = 15
"""The seconds for which srun lets the other processes run after one has ended. Normally all end together. If one fails,
the others wait for it in a collective until srun kills them."""
STAY_S = 90.0
PREFERRED_STARTS_WITHIN_S = 10.0
"""Seconds that a job waits for a job in a preferred partition, also started by Slurm, to claim the run."""


class SlurmLauncher(Launcher):
    """See `launchers.base.Launcher`."""

    name: ClassVar[str] = "slurm"
    example_options: ClassVar[str] = '{ partition = "PARTITION" }'
    options: ClassVar[Mapping[str, Option | str]] = OPTIONS

    def carries(self, chip: Chip) -> bool:
        return chip.vendor != "google"

    def materialize(self, job: Job) -> str:
        def given(name: str, flag: str) -> list[str]:
            value = option(job, name, object)
            return [] if value is None else [f"--{flag}={value}"]

        lines = [
            f"--job-name={job.name}",
            *given("partition", "partition"),
            *given("account", "account"),
            *given("qos", "qos"),
            *given("constraint", "constraint"),
            *given("time", "time"),
            f"--nodes={job.hosts}",
            f"--ntasks={job.processes}",
            f"--ntasks-per-node={job.processes // job.hosts}",
            *given("cpus_per_task", "cpus-per-task"),
            *given("mem", "mem"),
            *given("gres", "gres"),
            *(["--exclusive"] if option(job, "exclusive", bool) else []),
            f"--signal=B:USR1@{option(job, 'signal_s', int, SIGNAL_S)}",
            "--requeue",
            "--open-mode=append",
            f'--output="{_escaped(_log(job))}"',
            *([f'--chdir="{job.cwd}"'] if job.cwd else []),
            *option(job, "sbatch", list, []),
        ]
        setup = option(job, "setup", str, "").strip()
        env = exports(variables(job))
        for line in lines:
            if isinstance(line, str) and line.isprintable():
                continue
            raise UserError(
                f"cluster {job.cluster}: an option of sbatch",
                expected="text on one line",
                got=repr(line),
                do="Write it without line ends and control characters; `setup` is the option for shell lines.",
            )
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH {line}" for line in lines),
                "set -e",
                *([setup] if setup else []),
                *env,
                "trap '' USR1  # until the supervisor listens",
                f"exec {shell(supervise_command(job))}",
                "",
            ]
        )

    def check_settings(self, job: Job) -> None:
        check_options(job, OPTIONS)
        if re.search(r'["\n\\]', job.run_dir + job.cwd):
            raise UserError(
                f"run directory {job.run_dir}",
                expected="a path without quotes, backslashes and line ends, which sbatch cannot take",
                got=repr(job.run_dir),
                do="Choose another --runs.",
            )

    def check(self, job: Job) -> None:
        installed(job.cluster)
        partition = job.options.get("partition")
        known = call(["sinfo", "--noheader", "--format=%R"]).split()
        for one in str(partition).split(",") if partition else []:
            if one not in known:
                from portatrain.errors import choice

                raise choice(f"cluster {job.cluster}: partition {one!r}", one, known)

    def submit(self, job: Job) -> str:
        installed(job.cluster)
        answer = call(["sbatch", "--parsable"], text=self.materialize(job), what=f"job {job.number} of {job.run}")
        return answer.strip().split(";")[0]

    def describe(self, job: Job) -> JobState:
        if job.id is None:
            return JobState(state="gone", reason="never submitted")
        installed(job.cluster)
        try:
            said = call(["squeue", "--noheader", f"--jobs={job.id}", "--format=%T|%r|%N"]).strip()
        except UserError as error:
            if "Invalid job id" in error.got:
                return JobState(state="gone")
            raise
        if not said:
            return JobState(state="gone")
        state, reason, nodes = said.splitlines()[0].split("|")
        if state == "PENDING":
            held = "held" in reason.lower()
            return JobState(state="held" if held else "pending", reason=reason)
        running = state in ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SUSPENDED", "REQUEUED")
        return JobState(state="running" if running else "gone", reason=state, where=nodes)

    def logs(self, job: Job) -> Iterator[str]:
        path = _log(job)
        if path.exists():
            yield from path.read_text(errors="replace").splitlines()

    def cancel(self, job: Job) -> None:
        if job.id is not None and self.describe(job).state != "gone":
            call(["scancel", job.id])

    def release(self, job: Job) -> None:
        if job.id is not None:
            call(["scontrol", "release", job.id])

    def hold(self, job: Job) -> None:
        """Keep a pending job from starting."""
        if job.id is not None:
            call(["scontrol", "hold", job.id])

    def names(self, prefix: str) -> Mapping[str, str]:
        installed("slurm")
        rows = call(["squeue", "--noheader", "--me", "--format=%i|%j"]).split()
        pairs = (row.split("|", 1) for row in rows if "|" in row)
        return {name: number for number, name in pairs if name.startswith(prefix)}

    def doctor(self, options: Mapping[str, Any], storage: Path | None) -> Iterator[tuple[str, str, str]]:
        from launchers.slurm_doctor import look

        yield from look(options, storage)

    def rank(self, env: Mapping[str, str]) -> Rank | None:
        if "SLURM_PROCID" not in env:
            return None
        here = env.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]
        return Rank(
            rank=whole_number(env, "SLURM_PROCID"),
            world=whole_number(env, "SLURM_STEP_NUM_TASKS", whole_number(env, "SLURM_NTASKS", 1)),
            local_rank=whole_number(env, "SLURM_LOCALID"),
            local_world=whole_number({"SLURM_STEP_TASKS_PER_NODE": here}, "SLURM_STEP_TASKS_PER_NODE"),
        )

    def scheduler_facts(self, env: Mapping[str, str]) -> Mapping[str, str]:
        names = ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")
        return {name: env[name] for name in names if name in env}

    def runtime(self, job: Job) -> JobRuntime:
        return SlurmRuntime(job)


class SlurmRuntime(JobRuntime):
    """A batch job on its first node."""

    def __init__(self, job: Job) -> None:
        self.job, self.slurm = job, SlurmLauncher()
        self.id = os.environ["SLURM_JOB_ID"]

    def yield_to_preferred(self) -> None:
        until_s = time.monotonic() + PREFERRED_STARTS_WITHIN_S
        while time.monotonic() < until_s and open_run(self.job.run_dir).owner() is None:
            siblings = (job for job in jobs.of(self.job.run_dir) if job.engine == self.job.engine)
            better = [job for job in siblings if job.id is not None and job.number < self.job.number]
            if not any(self._starts(job) for job in better):
                break
            time.sleep(0.5)

    def _starts(self, job: Job) -> bool:
        try:
            return self.slurm.describe(job).reason in ("RUNNING", "CONFIGURING")
        except UserError:
            return False

    def on_claimed(self) -> None:
        def hold(job: Job) -> None:
            if self.slurm.describe(job).state == "pending":
                self.slurm.hold(job)

        each_sibling(self.job, hold)

    def command(self, attempt: Path) -> tuple[list[str], dict[str, str], Path | None]:
        job = self.job
        remote = job.code is not None and is_remote(job.code)  # every node has a copy of its own
        fetch = ["-m", "portatrain.runs.remote_run_dir", str(job.code), python(job)] if remote else []
        words = [
            "srun",
            f"--nodes={job.hosts}",
            f"--ntasks={job.processes}",
            f"--ntasks-per-node={job.processes // job.hosts}",
            "--kill-on-bad-exit=0",
            f"--wait={ENDS_WITHIN_S}",
            "--open-mode=append",
            f"--output={_escaped(attempt / 'rank-%t.log', keep=True)}",
            *option(job, "srun", list, []),
            python(job),
            *fetch,
            "-m",
            "launchers.rank_entry",
            *job.train()[1:],
        ]
        # Slurm derives its default port from the number of the job, which a requeue keeps; a socket of the previous
        # attempt may still be closing on it. So each attempt takes a free port of this host, where process 0 runs.
        env = {"MASTER_ADDR": head_address(), "MASTER_PORT": str(free_port())}
        grace = option(job, "grace_s", int) or _grace_s(os.environ.get("SLURM_JOB_PARTITION", ""))
        if grace:
            env[environment.GRACE_S.name] = str(grace)
        if "hang_s" in job.options:
            env[environment.HANG_S.name] = str(job.options["hang_s"])
        return words, env, None

    def means(self, signum: int) -> str:
        if signum == signal.SIGUSR1:
            return "preempt"
        try:
            said = call(["scontrol", "show", "job", self.id], timeout_s=5.0)
        except UserError:
            return "unclear"
        # If others requeue a job (an administrator, or a preemption without a grace period), its state is COMPLETING,
        # like the state of a cancelled job; but Slurm has counted the restart already.
        restarts = re.search(r"Restarts=(\d+)", said)
        if restarts and int(restarts[1]) > int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            return "preempt"
        state = re.search(r"JobState=(\S+)", said)
        if state and state[1] in ("CANCELLED", "COMPLETING", "DEADLINE"):
            return "cancel"
        preempted = re.search(r"PreemptTime=(\S+)", said)
        if preempted and preempted[1] not in ("None", "N/A", "Unknown"):
            return "preempt"
        return "unclear"

    def on_exit(self, outcome: str) -> None:
        if outcome == "over":
            each_sibling(self.job, self.slurm.cancel)
        elif outcome == "superseded":
            self._self(["scontrol", "requeuehold", self.id])
        elif outcome == "preempted":
            each_sibling(self.job, self.slurm.release)
            self._self(["scontrol", "requeue", self.id])
        else:  # Slurm ends this job for a reason of its own, and decides by that reason whether to requeue it
            time.sleep(STAY_S)

    def _self(self, words: list[str]) -> None:
        try:
            call(words)
        except UserError as error:
            print(str(error), file=sys.stderr, flush=True)
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Slurm may end this process now: its work is done
        time.sleep(STAY_S)


def _log(job: Job) -> Path:
    """Return the log file of the batch script. It is always on a file system, because Slurm writes to nothing else."""
    if is_remote(job.run_dir):
        return Path(job.cwd, f"{job.name}.log")
    return Path(job.run_dir, "jobs", f"{job.number}.log")


def head_address() -> str:
    """Return the address at which Slurm itself reaches this node."""
    name = os.environ.get("SLURMD_NODENAME")
    said = call(["scontrol", "show", "node", name]) if name else ""
    found = re.search(r"NodeAddr=(\S+)", said)
    return found[1] if found else os.uname().nodename


def _grace_s(partition: str) -> int | None:
    """Return the partition's GraceTime; None if preemption has no grace period."""
    try:
        found = re.search(r"GraceTime=(\d+)", call(["scontrol", "show", "partition", partition]))
    except UserError:
        return None
    return int(found[1]) if found and int(found[1]) else None


def _escaped(path: Path, *, keep: bool = False) -> str:
    """Escape % in a path for --output; with `keep`, keep the pattern in its last part."""
    return f"{str(path.parent).replace('%', '%%')}/{path.name if keep else path.name.replace('%', '%%')}"
