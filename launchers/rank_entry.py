"""`python -m launchers.rank_entry train ...`: one process of a job, as the scheduler started it.

Puts what the scheduler's environment says (Slurm, Kubernetes JobSet, Cloud TPU) into the variables that torchrun would
set, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and goes on as `portatrain`. Where the
scheduler starts one process a host and the backend needs more (`environment.HOST_PROCESSES`), it starts them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from portatrain.errors import UserError
from portatrain.system import environment
from portatrain.system.environment import whole_number


def place(env: Mapping[str, str]) -> dict[str, str]:
    """Those variables for a process with environment `env`; {} where it is the only one, or where they are set.

    Raises:
        UserError: the environment contradicts itself.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return {}
    if "SLURM_PROCID" in env:
        world = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
        here = env.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]
        found = (env["SLURM_PROCID"], world, env["SLURM_LOCALID"], here)
    elif "JOB_COMPLETION_INDEX" in env:  # JobSet: an index a pod, over all jobs of the set
        hosts = environment.HOSTS.get(env)
        each = environment.SLICE_HOSTS.get(env) or hosts
        index = whole_number(env, "JOB_INDEX", 0) * each + whole_number(env, "JOB_COMPLETION_INDEX")
        found = (str(index), str(hosts), "0", "1")
    elif "SKYPILOT_NODE_RANK" in env:
        found = (env["SKYPILOT_NODE_RANK"], env.get("SKYPILOT_NUM_NODES", "1"), "0", "1")
    elif "TPU_WORKER_ID" in env and "TPU_WORKER_HOSTNAMES" in env:
        hosts_here = env["TPU_WORKER_HOSTNAMES"].split(",")
        slices, each = whole_number(env, "MEGASCALE_NUM_SLICES", 1), len(hosts_here)
        index = whole_number(env, "MEGASCALE_SLICE_ID", 0) * each + whole_number(env, "TPU_WORKER_ID")
        found = (str(index), str(slices * each), "0", "1")
    else:
        return {}
    rank, world, local, here = found
    names = {"rank": rank, "number of processes": world, "local rank": local, "processes a host": here}
    numbers = {name: whole_number({name: text}, name) for name, text in names.items()}
    if numbers["number of processes"] == 1:
        return {}
    if not numbers["rank"] < numbers["number of processes"]:
        raise UserError(
            "the scheduler's environment",
            expected=f"a rank below {world}",
            got=rank,
            do="Look at SLURM_*, JOB_COMPLETION_INDEX or TPU_WORKER_*.",
        )
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise UserError(
            "the scheduler's environment",
            expected="MASTER_ADDR and MASTER_PORT, the head of the attempt",
            got="none",
            do="Start it by `launch`, whose supervisor sets them.",
        )
    return {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": here}


def main() -> int:
    """Take the place, then be `portatrain`."""
    from portatrain.cli import main as portatrain
    from portatrain.system.processes import ends_at_once, run_processes

    os.environ.pop(environment.PARENT.name, None)
    try:
        n = environment.HOST_PROCESSES.take()
        found = place(os.environ)
        if found and found["LOCAL_WORLD_SIZE"] == "1" and n > 1:
            entry, args = "launchers.rank_entry:one", {"words": sys.argv[1:]}
            return run_processes(n, entry, args, host=int(found["RANK"]), hosts=int(found["WORLD_SIZE"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _note(error.code)
        return error.code
    os.environ.update(found)

    def run() -> int:
        code = portatrain()
        _note(code)
        return code

    return ends_at_once(run)


def one(args: argparse.Namespace) -> int:
    """One of a host's processes: `portatrain` with these words. Whoever started it prints its errors."""
    from portatrain.cli import run as portatrain

    code = portatrain(args.words)
    _note(code)
    return code


def _note(code: int) -> None:
    """Leave the exit code where the supervisor looks: whoever starts processes may report another's, that it killed."""
    folder = environment.LOGS.get()
    if folder is not None:
        with contextlib.suppress(OSError):
            Path(folder, f"exit-{os.environ.get(environment.RANK.name, '0')}").write_text(str(code))


if __name__ == "__main__":
    sys.exit(main())
