"""Check a Slurm cluster for problems that would break a run, and explain how to fix them."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from launchers import slurm_commands
from launchers.base import shell
from launchers.slurm_commands import installed
from portatrain.errors import UserError
from portatrain.runs.run_dir import existing_ancestor

call = partial(slurm_commands.call, do="Ask the administrator of the cluster what this answer of Slurm means.")
Finding = tuple[str, str, str]
TRIAL_S = 30


def look(options: Mapping[str, Any], storage: Path | None) -> Iterator[Finding]:
    """Yield the findings of `launchers.base.Launcher.doctor`."""
    try:
        installed("slurm")
        config = dict(re.findall(r"^(\S+)\s*=\s*(.*?)\s*$", call(["scontrol", "show", "config"]), re.MULTILINE))
    except UserError as error:
        yield "controller", "bad", str(error)
        return
    yield "controller", "ok", f"Slurm {config.get('SLURM_VERSION', '?')} answers"
    yield _requeue(config)
    yield _notice(config)
    name = str(options.get("partition") or "")
    partition, findings = _partition(name)
    yield from findings
    if partition:
        yield from _nodes(partition)
        if storage is not None:
            yield _trial(partition, storage)


def _requeue(config: Mapping[str, str]) -> Finding:
    mode = config.get("PreemptMode", "OFF")
    if config.get("PreemptType", "").endswith("none"):
        return "preemption", "ok", "none: jobs end only by their time limit, and requeue themselves then"
    if "REQUEUE" in mode:
        return "preemption", "ok", f"{config['PreemptType']}, {mode}"
    return (
        "preemption",
        "warn",
        f"PreemptMode={mode}: a preempted job is not requeued; `launch resume` continues its run",
    )


def _notice(config: Mapping[str, str]) -> Finding:
    if "preempt_send_user_signal" in config.get("SlurmctldParameters", ""):
        return "notice", "ok", "preempt_send_user_signal: a job hears of its preemption by USR1"
    return (
        "notice",
        "warn",
        "without SlurmctldParameters=preempt_send_user_signal a preemption comes as TERM, and the job has to ask Slurm "
        "what it means; ask the administrator to set it",
    )


def _partition(name: str) -> tuple[dict[str, str], list[Finding]]:
    """Return Slurm's data on the partition, {} if it does not exist, and the findings."""
    words = ["scontrol", "--oneliner", "show", "partition", *([name] if name else [])]
    try:
        lines = call(words).splitlines()
    except UserError as error:
        return {}, [("partition", "bad", f"{name}: {error.got}")]
    rows = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines if line.strip()]
    row = next((r for r in rows if name or r.get("Default") == "YES"), None)
    if row is None:
        text = "no default one: name it in clusters.toml, options = { partition = ... }"
        return {}, [("partition", "bad", text)]
    up = row.get("State") == "UP"
    text = f"{row['PartitionName']} is {row.get('State')}, time limit {row.get('MaxTime')}"
    found: list[Finding] = [("partition", "ok" if up else "bad", text)]
    grace = int(row.get("GraceTime", "0") or 0)
    if row.get("PreemptMode", "OFF") != "OFF" and not grace:
        text = "GraceTime=0: a preempted job is killed at once and saves nothing; ask for 60 or more"
        found.append(("grace", "bad", text))
    else:
        found.append(("grace", "ok", f"{grace} s from the signal to the kill"))
    return row, found


def _nodes(partition: Mapping[str, str]) -> Iterator[Finding]:
    said = call(["sinfo", "--noheader", "--Node", f"--partition={partition['PartitionName']}", "--format=%N|%t|%o"])
    rows = [row.split("|") for row in said.split() if row.count("|") == 2]
    up = [row for row in rows if row[1].rstrip("*~#$@+-") in ("idle", "mix", "alloc", "comp")]
    yield "nodes", "ok" if up else "bad", f"{len(up)} of {len(rows)} are up"
    unknown = []
    for _, _, address in rows[:50]:
        try:
            socket.getaddrinfo(address, None)
        except OSError:
            unknown.append(address)
    if unknown:
        yield ("names", "bad", f"{', '.join(unknown[:3])} do not resolve: processes find each other by these addresses")
    else:
        yield "names", "ok", "node addresses resolve here"


def _trial(partition: Mapping[str, str], storage: Path) -> Finding:
    """Write a file in a small job, and check that this machine sees it."""
    name = f".doctor-{secrets.token_hex(6)}"
    path = existing_ancestor(storage).absolute() / name
    try:
        call(
            [
                "srun",
                f"--partition={partition['PartitionName']}",
                "--nodes=1",
                "--ntasks=1",
                "--time=1",
                f"--immediate={TRIAL_S}",
                "--quiet",
                "sh",
                "-c",
                shell(["touch", str(path)]),
            ],
            timeout_s=TRIAL_S + 30,
        )
        if path.exists():
            return "storage from a node", "ok", f"{path.parent} is shared and writable"
        text = f"this machine does not see a file that a node wrote in {path.parent}: put --runs on shared storage"
        return "storage from a node", "bad", text
    except UserError as error:
        busy = "Immediate execution" in error.got or "allocation failure" in error.got
        if busy:
            return "storage from a node", "warn", f"not tried: no node was free within {TRIAL_S} s"
        return "storage from a node", "bad", f"a job could not write there: {error.got}"
    finally:
        path.unlink(missing_ok=True)
