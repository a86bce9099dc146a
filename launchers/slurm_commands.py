"""Run Slurm's own commands and turn their refusals into user errors."""

from __future__ import annotations

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


def call(words: list[str], *, text: str | None = None, what: str = "Slurm", timeout_s: float = 60.0) -> str:
    """Run a Slurm command and return its output; UserError with Slurm's message if it fails."""
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            what,
            expected=f"an answer from `{' '.join(words[:3])}`",
            got=str(error),
            do="Check that the controller answers: scontrol ping.",
        ) from error
    if done.returncode:
        raise UserError(
            what,
            expected=f"`{' '.join(words[:3])}` to be accepted",
            got="; ".join(done.stderr.split("\n")).strip("; ") or f"code {done.returncode}",
            do="Run `launch doctor CLUSTER`, which checks the configuration.",
        )
    return done.stdout
