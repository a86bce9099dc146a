"""Run a job of this machine in the foreground: `launch --cluster local RECIPE`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess

from launchers.base import Job, python, train_here, variables
from portatrain.commands import results, train
from portatrain.system import environment
from portatrain.system.urls import is_remote


def run(job: Job) -> int:
    """Train in this process, so that Ctrl-C reaches the trainer and nothing else; return the exit code."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    # Parse the options of `portatrain train`, so that --dry-run prints exactly the command that runs.
    args = parser.parse_args(job.train()[2:])
    # `launch resume` needs these values.
    source = {k: getattr(job, k) for k in ("recipe", "overrides", "backend", "mesh", "devices", "cwd", "track")}
    before = os.environ.get(environment.CLUSTER.name)
    os.environ[environment.CLUSTER.name] = json.dumps({"engine": "local", "cluster": "local", "source": source})
    try:
        code = train.run(args) if job.code is None else _with_code(job)
    finally:
        os.environ.pop(environment.CLUSTER.name)
        if before is not None:
            os.environ[environment.CLUSTER.name] = before
    results.show(job.run_dir)
    return code


def _with_code(job: Job) -> int:
    """Train in a child process with the run's copy of the code, because this process has imported other code."""
    from portatrain.system.processes import forwarding

    folder = job.code if not is_remote(str(job.code)) else None
    if folder is None:
        from portatrain.runs.remote_run_dir import local_code

        folder = str(local_code(str(job.code)))
    env = {**os.environ, **variables(job), "PYTHONPATH": folder, "PYTHONSAFEPATH": "1"}
    words = [python(job), "-m", "portatrain.cli", *train_here(job)]
    started: list[subprocess.Popen[bytes]] = []
    with forwarding(started):
        started.append(subprocess.Popen(words, env=env, start_new_session=True))
        return started[0].wait()
