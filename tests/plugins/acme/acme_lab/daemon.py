"""A small scheduler: a folder of jobs, and this process, which runs them one at a time in the order of their numbers.

`python -m acme_lab.daemon QUEUE [GRACE_S]`. A job is a folder `QUEUE/N`: `job.json` (name and command), `state`
(pending, held, running, gone), and what others ask for: `preempt` and `cancel`. A preempted job gets SIGTERM and, after
the grace, SIGKILL; if it then left with code 85 it is queued again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SAVED = 85


def state(job: Path, new: str | None = None) -> str:
    """Return the job's state, after it was set to `new`."""
    if new is not None:
        partial = job / ".state"
        partial.write_text(new)
        partial.replace(job / "state")
    return (job / "state").read_text() if (job / "state").exists() else "gone"


def jobs(queue: Path) -> list[Path]:
    return sorted(
        (p for p in queue.iterdir() if p.name.isdigit() and (p / "state").exists()), key=lambda p: int(p.name)
    )


def carry_out(job: Path, grace_s: float) -> None:
    state(job, "running")
    words = json.loads((job / "job.json").read_text())["words"]
    env = {**os.environ, "ACME_JOB": job.name, "ACME_QUEUE": str(job.parent)}
    with (job / "log").open("ab") as log:
        process = subprocess.Popen(words, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    asked_s: float | None = None
    while process.poll() is None:
        if asked_s is None and ((job / "preempt").exists() or (job / "cancel").exists()):
            asked_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
        if asked_s is not None and time.monotonic() > asked_s + grace_s:
            process.kill()
        time.sleep(0.05)
    again = process.returncode == SAVED and (job / "preempt").exists() and not (job / "cancel").exists()
    if again:
        (job / "preempt").unlink()
    state(job, "pending" if again else "gone")


def main() -> None:
    queue, grace_s = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 30.0
    queue.mkdir(parents=True, exist_ok=True)
    while True:
        for job in jobs(queue):
            if state(job) in ("pending", "held") and (job / "cancel").exists():
                state(job, "gone")
        waiting = [job for job in jobs(queue) if state(job) == "pending" and not (queue / "closed").exists()]
        if waiting:
            carry_out(waiting[0], grace_s)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
