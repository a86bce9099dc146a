"""Start one process of a job, as the scheduler runs it: `python -m launchers.rank_entry train ...`.

The launcher reads the rank from the scheduler's environment (`Launcher.rank`). This module sets the variables that
torchrun would set, RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, and then runs `portatrain`. If the scheduler
starts one process a host and the backend needs more (`environment.HOST_PROCESSES`), it starts the others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from launchers.base import Rank, launcher, launcher_names
from portatrain.errors import UserError
from portatrain.system import environment


def rank_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for a process with environment `env`; {} if it is the only one, or if they are set.

    Raises:
        UserError: the environment contradicts itself.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return {}
    found = next(((name, rank) for name in _asked_in_order(env) if (rank := _rank(name, env)) is not None), None)
    if found is None or found[1].world == 1:
        return {}
    engine, at = found
    if not 0 <= at.rank < at.world:
        raise UserError(
            f"the environment of {engine}",
            expected=f"a rank below {at.world}",
            got=str(at.rank),
            do=f"Look at the variables that {engine} sets.",
        )
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise UserError(
            f"the environment of {engine}",
            expected="MASTER_ADDR and MASTER_PORT, the head of the attempt",
            got="none",
            do="Start it by `launch`: the supervisor of the job sets them.",
        )
    return {
        "RANK": str(at.rank),
        "WORLD_SIZE": str(at.world),
        "LOCAL_RANK": str(at.local_rank),
        "LOCAL_WORLD_SIZE": str(at.local_world),
    }


def _asked_in_order(env: Mapping[str, str]) -> list[str]:
    """Return the engine that the supervisor names, then the others, because some hosts have no supervisor."""
    engine = environment.CLUSTER.get(env).get("engine")
    return sorted(launcher_names(), key=lambda name: name != engine)


def _rank(name: str, env: Mapping[str, str]) -> Rank | None:
    try:
        one = launcher(name)
    except UserError as error:  # of a package that is broken; this job may be another's
        print(f"engine {name} is not asked for a rank: {error}", file=sys.stderr)
        return None
    return one.rank(env)


def main() -> int:
    """Set the rank's variables, then continue as `portatrain`."""
    from portatrain.cli import main as portatrain
    from portatrain.system.processes import ends_at_once, run_processes

    os.environ.pop(environment.PARENT.name, None)
    try:
        n = environment.HOST_PROCESSES.take()
        found = rank_variables(os.environ)
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
    """Run `portatrain` as one of a host's processes. The process that started it prints its errors."""
    from portatrain.cli import run as portatrain

    code = portatrain(args.words)
    _note(code)
    return code


def _note(code: int) -> None:
    """Store the exit code for the supervisor, because a process starter may report that of a process it killed."""
    folder = environment.LOGS.get()
    if folder is not None:
        with contextlib.suppress(OSError):
            Path(folder, f"exit-{os.environ.get(environment.RANK.name, '0')}").write_text(str(code))


if __name__ == "__main__":
    sys.exit(main())
