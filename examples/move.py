"""One run that is killed twice and moves twice: JAX, then torch FSDP2 on two processes, then JAX on four devices.

    make demo-move                     # or: python examples/move.py [RUNS]

The script trains a small decoder on JAX and kills it with SIGKILL in the middle of a step. It resumes from the last
checkpoint on torch with two processes, kills those, and finishes on JAX with four simulated devices. Then it trains the
same recipe without interruption. It prints the verdict at each resume point and the largest difference between the two
loss curves, and writes RUNS/moved/report.html. The exit code is 0 only if every step is on the curve exactly once and
the curves agree to 1e-6.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from portatrain.runs.run_dir import RunDir

SIZES = (
    "model.layers=2",
    "model.embed=64",
    "model.mlp=128",
    "model.dropout=0.1",
    "data.seq_len=128",
    "batch=8",
    "accumulation=2",
    "steps=60",
    "schedule.warmup=6",
    "eval_every=none",
    "hooks=()",
    "checkpoint_every=5",
)
BOUND = 1e-6
LEGS = (
    ("JAX, one device", ("--backend", "jax"), 18),
    ("torch FSDP2, two processes", ("--backend", "torch", "--mesh", "fsdp=2"), 37),
    ("JAX, four devices", ("--backend", "jax", "--mesh", "fsdp=2,tensor=2"), None),
)
"""Each attempt's title, its options, and the step after which it is killed."""


def start(run: Path, words: tuple[str, ...]) -> subprocess.Popen[bytes]:
    sizes = [word for size in SIZES for word in ("--set", size)]
    command = [sys.executable, "-m", "portatrain.cli", "train", "tiny-lm", "--run-dir", str(run), *sizes, *words]
    log = (run.parent / f"{run.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log)


def last_step(run: Path, attempt: int) -> int:
    rows = RunDir(run).rows(attempt, "metrics") if (run / f"attempts/{attempt}/metrics.jsonl").exists() else []
    return rows[-1]["step"] if rows else 0


def kill(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the process and all its children, as if the machine had failed."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, children), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def leg(run: Path, number: int, words: tuple[str, ...], kill_after: int | None) -> None:
    process = start(run, words)
    try:
        while process.poll() is None and (kill_after is None or last_step(run, number) < kill_after):
            time.sleep(0.002)
        if kill_after is not None and process.poll() is None:
            time.sleep(0.01)  # into the next step
            kill(process)
            print(f"  SIGKILL after step {last_step(run, number)}", flush=True)
            return
    finally:
        if process.poll() is None:
            kill(process)
    if process.returncode != 0 or kill_after is not None:
        print((run.parent / f"{run.name}.log").read_text()[-3000:])
        raise SystemExit(f"attempt {number} ended by itself with exit code {process.returncode}")


def main() -> int:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-move")
    runs.mkdir(parents=True, exist_ok=True)
    moved, whole = runs / "moved", runs / "undisturbed"
    for run in (moved, whole):
        shutil.rmtree(run, ignore_errors=True)
        (runs / f"{run.name}.log").unlink(missing_ok=True)
    for number, (what, words, kill_after) in enumerate(LEGS, start=1):
        print(f"attempt {number}: {what}", flush=True)
        leg(moved, number, words, kill_after)
    print("the same recipe without interruption, on JAX", flush=True)
    leg(whole, 1, ("--backend", "jax"), None)

    run = RunDir(moved)
    resume_points = run.events("resumed")
    for point in resume_points:
        figures = {k.removesuffix("_difference"): f"{v:.1e}" for k, v in point.items() if k.endswith("_difference")}
        print(f"resume point after step {point['step']}: {point['verdict']} {figures}")
    one, two = RunDir(whole).curve(), run.curve()
    worst = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(one, two, strict=True))
    whole_curve = [row["step"] for row in two] == [row["step"] for row in one]
    subprocess.run([sys.executable, "-m", "portatrain.cli", "report", str(moved)], check=True)
    good = whole_curve and worst <= BOUND and [point["verdict"] for point in resume_points] == ["continuous"] * 2
    verdict = "good" if good else "NOT GOOD"
    print(f"{len(two)} steps, largest relative difference of a loss {worst:.1e} (bound {BOUND:.0e}): {verdict}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
