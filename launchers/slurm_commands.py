"""Run Slurm's own commands and turn their refusals into user errors."""

from __future__ import annotations

import re
import shutil
import subprocess

from portatrain.errors import UserError


def installed(cluster: str) -> None:
    if shutil.which("sbatch") is None:
        raise UserError(
            f"cluster {cluster}",
            expected="Slurm's commands on this machine (sbatch, squeue, scontrol, scancel)",
            got="no sbatch",
            do="Launch from a login node of the cluster.",
        )


UNREACHABLE = re.compile(r"unable to contact|connection|timed out|unable to establish|name resolution", re.IGNORECASE)
"""What Slurm's commands say if no controller answers."""
PING = "Check that the controller answers: scontrol ping. If it does not, ask the administrator of the cluster."


def call(
    words: list[str],
    *,
    text: str | None = None,
    what: str = "Slurm",
    timeout_s: float = 60.0,
    do: str = "Run `launch doctor CLUSTER`, which checks the configuration.",
) -> str:
    """Run a Slurm command and return its output; UserError with Slurm's message if it fails, and with what to do."""
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(what, expected=f"an answer from `{' '.join(words[:3])}`", got=str(error), do=PING) from error
    if done.returncode:
        said = "; ".join(done.stderr.split("\n")).strip("; ")
        raise UserError(
            what,
            expected=f"`{' '.join(words[:3])}` to be accepted",
            got=said or f"code {done.returncode}",
            do=PING if UNREACHABLE.search(said) else do,
        )
    return done.stdout
