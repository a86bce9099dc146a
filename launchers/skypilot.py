"""SkyPilot: one managed job whose task file names every acceptable kind of machine; SkyPilot finds the capacity.

Exit code 85 is a recovery code, so that a saved run is started again wherever there is room. SkyPilot is installed by
its user (it brings about a hundred packages): the task file needs nothing, submitting needs its command `sky`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
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
    RuntimeInImage,
    check_shared,
    commands_in_image,
    host_processes,
    option,
    shell,
    variables,
)
from launchers.yaml_text import to_yaml
from portatrain.errors import UserError
from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.slices import RULES
from portatrain.system import json_files
from portatrain.system.environment import whole_number
from portatrain.system.exit_codes import RESUMABLE

OPTIONS = {
    "accelerators": Option("SkyPilot's name and the count of a node, as in H100:8", default="from the chip"),
    "any_of": Option("SkyPilot's resources, a list of tables, in place of the other resources", (list,)),
    "infra": Option("a cloud, region or context, as in gcp/us-east5", default="SkyPilot's choice"),
    "spot": Option("true: spot capacity", (bool,), "false"),
    "image": Option("an image", default="SkyPilot's choice"),
    "setup": Option("shell lines to run once on every machine"),
    "volumes": Option("volumes to mount, a table: folder -> volume", (dict,)),
    "file_mounts": Option("buckets to mount, a table: folder -> bucket", (dict,)),
    "env": Option("environment variables, a table", (dict,)),
    "python": Option("the Python of the machines", default="python3"),
}
PORT = 8476
NAMES = {"a100-40": "A100", "a100-80": "A100-80GB", "h100-sxm": "H100", "gaudi3": "Gaudi3"}
"""SkyPilot's names of chips, if they differ from the chip's name in capitals."""
TPUS = {"tpu-v5e": "tpu-v5litepod", "tpu-7x": "tpu-v7x"}


class SkyPilotLauncher(Launcher):
    """See `launchers.base.Launcher`."""

    name: ClassVar[str] = "skypilot"
    example_options: ClassVar[str] = '{ infra = "CLOUD" }'
    options: ClassVar[Mapping[str, Option | str]] = OPTIONS

    def carries(self, chip: Chip) -> bool:
        return chip.stack != "cpu"

    def materialize(self, job: Job) -> str:
        return to_yaml(task(job))

    def check(self, job: Job) -> None:
        mounted = {**option(job, "file_mounts", dict, {}), **option(job, "volumes", dict, {})}
        check_shared(job, None if option(job, "setup", str) else mounted, "mount it: the option volumes or file_mounts")
        _sky(job)

    def submit(self, job: Job) -> str:
        _sky(job)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="portatrain-") as file:
            file.write(self.materialize(job))
            file.flush()
            _call(job, ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, file.name], timeout_s=900)
        return job.name

    def describe(self, job: Job) -> JobState:
        if job.id is None:
            return JobState(state="gone", reason="never submitted")
        _sky(job)
        rows = _rows(_call(job, ["sky", "jobs", "queue", "--output", "json"]))
        found = [row for row in rows if row.get("job_name") == job.id]
        if not found:
            return JobState(state="gone")
        status = str(found[0].get("status", "")).rpartition(".")[2]
        if status in ("RUNNING", "CANCELLING"):
            return JobState(state="running", reason=status)
        return JobState(
            state="pending" if status in ("PENDING", "SUBMITTED", "STARTING", "RECOVERING") else "gone", reason=status
        )

    def logs(self, job: Job) -> Iterator[str]:
        yield f"sky jobs logs --name {job.id}"

    def cancel(self, job: Job) -> None:
        if self.describe(job).state != "gone":
            _call(job, ["sky", "jobs", "cancel", "--yes", "--name", str(job.id)])

    def doctor(self, options: Mapping[str, Any], storage: Path | None) -> Iterator[tuple[str, str, str]]:
        job = Job(run_dir=str(storage or ""), recipe="", cluster="this cluster", engine="skypilot", options=options)
        try:
            _sky(job)
            yield "SkyPilot", "ok", _call(job, ["sky", "--version"]).strip()
        except UserError as error:
            yield "SkyPilot", "bad", str(error)

    def rank(self, env: Mapping[str, str]) -> Rank | None:
        if "SKYPILOT_NODE_RANK" not in env:
            return None
        return Rank(rank=whole_number(env, "SKYPILOT_NODE_RANK"), world=whole_number(env, "SKYPILOT_NUM_NODES", 1))

    def scheduler_facts(self, env: Mapping[str, str]) -> Mapping[str, str]:
        return {name: env[name] for name in ("SKYPILOT_TASK_ID", "SKYPILOT_NODE_RANK") if name in env}

    def runtime(self, job: Job) -> JobRuntime:
        return ManagedJobRuntime(job)


def _rows(text: str) -> list[dict[str, Any]]:
    """Return the jobs that `sky jobs queue` printed as JSON."""
    try:
        rows = json_files.loads(text.strip() or "[]")
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        do = "Run it by hand; a warning among its lines may be the reason."
        raise UserError("sky jobs queue --output json", expected="a list of jobs", got=repr(text[:200]), do=do)
    return rows


def task(job: Job) -> dict[str, Any]:
    """Return the task file as plain data."""
    one: dict[str, Any] = {"accelerators": option(job, "accelerators", str) or _accelerators(job)}
    for name, key, kind in (("infra", "infra", str), ("image", "image_id", str), ("spot", "use_spot", bool)):
        if option(job, name, kind) is not None:
            one[key] = job.options[name]
    recovery = {"max_restarts_on_errors": job.max_restarts, "recover_on_exit_codes": [RESUMABLE]}
    anything = option(job, "any_of", list)
    resources: dict[str, Any] = {"job_recovery": recovery}
    resources |= {"any_of": [dict(r) for r in anything]} if anything else one
    first, other = commands_in_image(job)
    more = "".join(f" {key}={value}" for key, value in host_processes(job).items())
    run = (
        f'export MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1) MASTER_PORT={PORT}{more}\n'
        f'if [ "$SKYPILOT_NODE_RANK" = 0 ]; then exec {shell(first)}; fi\n'
        f"exec {shell(other)}\n"
    )
    # A TPU slice is one node to SkyPilot, of however many hosts; it runs the command on each of them.
    nodes = int(job.cluster_shape.get("slices", 1)) if _is_tpu(job) else job.hosts
    found: dict[str, Any] = {"name": job.name, "num_nodes": nodes, "resources": resources}
    env = variables(job)
    if env:
        found["envs"] = env
    for name in ("file_mounts", "volumes"):
        if option(job, name, dict):
            found[name] = dict(job.options[name])
    if option(job, "setup", str):
        found["setup"] = job.options["setup"]
    return {**found, "run": run}


def _accelerators(job: Job) -> str:
    chip, each = str(job.cluster_shape.get("chip", "")), int(job.cluster_shape.get("chips_per_host", 1))
    if _is_tpu(job):
        of_a_slice = int(job.cluster_shape["chips"]) // int(job.cluster_shape["slices"]) * RULES[chip].per_name
        return f"{TPUS.get(chip, chip)}-{of_a_slice}:1"
    return f"{NAMES.get(chip, chip.upper())}:{each}"


def _is_tpu(job: Job) -> bool:
    return job.cluster_shape.get("chip", "") in RULES


class ManagedJobRuntime(RuntimeInImage):
    """The first node of a managed job. SkyPilot restarts the job by its exit code, and removes the machines when it has
    ended. A run has one managed job; its task file lists the acceptable machines."""


def _sky(job: Job) -> None:
    if shutil.which("sky") is None:
        raise UserError(
            f"cluster {job.cluster}",
            expected="SkyPilot's command `sky` on this machine",
            got="none",
            do="Install it in an environment of its own: pip install skypilot, then `sky check`.",
        )


def _call(job: Job, words: list[str], *, timeout_s: float = 120.0) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"cluster {job.cluster}",
            expected=f"an answer from `{' '.join(words[:3])}`",
            got=str(error),
            do="Run this command in a shell to see the problem.",
        ) from error
    if done.returncode:
        raise UserError(
            f"cluster {job.cluster}",
            expected=f"`{' '.join(words[:3])}` to be accepted",
            got=(done.stderr or done.stdout).strip()[-500:],
            do="Run `sky check`, which lists the configured clouds.",
        )
    return done.stdout
