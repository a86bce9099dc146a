"""One run through many preemptions and kills at random moments on a real Slurm: `make soak-engines`.

SOAK_KILLS (50) and SOAK_SEED (1) choose how many and which, SOAK_BACKEND (torch, which starts soonest) who trains.
Prints the table of docs/run/reliability.md.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.runs.claim import live_owner
from portatrain.runs.history import read_history
from portatrain.runs.run_dir import RunDir
from tests.engines.slurm_here import Slurm
from tests.engines.story import launch, now, prepare, story_of

pytestmark = [pytest.mark.engines, pytest.mark.soak, pytest.mark.timeout(14_000)]

KILLS, SEED = int(os.environ.get("SOAK_KILLS", "50")), int(os.environ.get("SOAK_SEED", "1"))
BACKEND = os.environ.get("SOAK_BACKEND", "torch")
WINDOW_S = 5.0
"""A disturbance comes so long, at most, after an attempt has begun, or after its first step."""
Until = Callable[..., None]

# Both partitions as the same backend and mesh in two processes, on two hosts and on one, so that the end can be
# compared bit for bit.
SAME = {
    "torch": (("count = 4", "count = 2"), ('backend = "jax"', 'backend = "torch"'), ("fsdp=4", "fsdp=2")),
    "jax": (("count = 2", "count = 4"), ('backend = "torch"', 'backend = "jax", processes = 2'), ("fsdp=2", "fsdp=4")),
}


@dataclass(frozen=True)
class Disturbance:
    """What was done to an attempt, and when."""

    attempt: int
    kind: str
    unix_s: float


def test_no_step_is_lost_or_trained_twice(
    lab: Slurm, until: Until, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare()
    # Half of a start would be compiling what the attempt before has compiled.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    edit("clusters.toml", *SAME[BACKEND])
    edit("paced.py", ("seconds=0.25", "seconds=0.15"))
    steps = 18 * KILLS
    words = ["--set", f"steps={steps}"]
    launch("--cluster", "lab-tpu,lab-gpu", "paced.py", "--run", "story", "--max-restarts", "50", *words)
    run, alone = RunDir(Path("runs/story")), RunDir(Path("runs/alone"))
    report(run, disturbed(lab, run, until))
    undisturbed(alone, *words, "--set", "hooks=()")
    check(run, steps, every=10)
    assert [row["loss"] for row in run.curve()] == [row["loss"] for row in alone.curve()]
    assert same(run, alone)
    seams = Counter(a.verdict for a in read_history(run).attempts if a.verdict)
    assert set(seams) == {"continuous"}, seams
    print(f"{BACKEND}: losses and last checkpoint bit-equal to the undisturbed run; seams {dict(seams)}", flush=True)


def test_the_same_with_a_stand_in(light_lab: Slurm, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    """What carries the run, at a hundredth of the work: the training keeps the run directory and computes nothing."""
    steps = 60 * KILLS
    monkeypatch.setenv("FAKE_STEPS", str(steps))
    monkeypatch.setenv("FAKE_STEP_S", "0.1")
    launch("--cluster", "lab-tpu,lab-gpu", "tiny-lm", "--run", "story", "--max-restarts", "50")
    run = RunDir(Path("runs/story"))
    report(run, disturbed(light_lab, run, until))
    check(run, steps, every=20)


def edit(path: str, *changes: tuple[str, str]) -> None:
    text = Path(path).read_text()
    for old, new in changes:
        assert old in text, (path, old)
        text = text.replace(old, new)
    Path(path).write_text(text)


def undisturbed(run: RunDir, *words: str) -> None:
    """The same training in the same two processes, without a scheduler."""
    program = "import sys; from portatrain.cli import main; sys.exit(main())"
    options = ["--backend", BACKEND, "--mesh", SAME[BACKEND][-1][1], "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "paced.py", "--run-dir", str(run.path), *options, *words],
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def disturbed(lab: Slurm, run: RunDir, until: Until) -> list[Disturbance]:
    """See the run to its end with KILLS disturbances."""
    chosen, found, began_s = random.Random(SEED), list[Disturbance](), time.monotonic()
    while len(found) < KILLS:
        until(lambda: alive(run) is not None or run.is_done, 180, "an attempt to disturb", story_of)
        assert not run.is_done, f"over after {len(found)} disturbances"
        number = max(run.attempt_numbers())
        if chosen.random() < 0.8:  # else while it starts
            until(lambda n=number: run.rows(n, "metrics") or left(run, n), 180, "a step", story_of)
        time.sleep(chosen.uniform(0.0, WINDOW_S))
        kind = chosen.choice(("preempt", "preempt", "kill", "requeue"))
        now_s = time.time()
        if max(run.attempt_numbers()) != number or not disturb(lab, run, kind):
            continue
        found.append(Disturbance(number, kind, now_s))
        until(lambda n=number: left(run, n), 60, f"attempt {number} has left after {kind}", story_of)
        if len(found) % 5 == 0:
            took_s = time.monotonic() - began_s
            print(f"{len(found)} of {KILLS} in {took_s:.0f} s: step {now().step}", flush=True)
        for job in lab.jobs():  # whatever preempted it has done so
            if name(lab, job) == "wrap":
                lab.call("scancel", job)
    until(lambda: now().state == "SUCCEEDED", 900, "the end", story_of)
    until(lambda: not [j for j in lab.jobs() if name(lab, j) != "wrap"], 60, "no job of the run is left", lab.jobs)
    return found


def check(run: RunDir, steps: int, every: int) -> None:
    """Each step is on the curve once, every attempt resumes after the last commit, and no seam trained more again than
    the steps between two saves."""
    assert [row["step"] for row in run.curve()] == list(range(1, steps + 1))
    for number in run.attempt_numbers():
        rows = run.rows(number, "metrics")
        assert [row["step"] for row in rows] == list(range(rows[0]["step"], rows[-1]["step"] + 1)) if rows else True
        before = [e["committed"] for e in run.rows(number - 1, "events") if e["event"] == "left"]
        if rows and before:
            assert rows[0]["step"] == (before[0] or 0) + 1, number
    for number, lost in lost_steps(run):
        assert 0 <= lost <= every, (number, lost)


def alive(run: RunDir) -> int | None:
    """The process that holds the run, where an attempt of it has begun and not left."""
    owner = live_owner(run.path / "claim")
    numbers = run.attempt_numbers()
    return owner.pid if owner is not None and numbers and not left(run, numbers[-1]) else None


def left(run: RunDir, number: int) -> bool:
    """Whether attempt `number` is over: it says so, or nobody holds the run, or a later one has begun."""
    events = [e["event"] for e in run.rows(number, "events")]
    return "left" in events or live_owner(run.path / "claim") is None or max(run.attempt_numbers()) > number


def name(lab: Slurm, job: str) -> str:
    return lab.call("squeue", "-h", "-j", job, "-o", "%j", check=False).strip()


def disturb(lab: Slurm, run: RunDir, kind: str) -> bool:
    """Preempt it, kill its processes, or have an administrator requeue it; whether there was something to disturb."""
    landed = [e for e in run.events("landed") if e["attempt"] == max(run.attempt_numbers())]
    if not landed or alive(run) is None:
        return False
    partition = landed[0]["scheduler"]["SLURM_JOB_PARTITION"]
    if kind == "preempt":
        lab.preempt(partition, {"tpu": 2, "gpu": 1}[partition])
    elif kind == "kill":
        return bool([os.kill(pid, signal.SIGKILL) for pid in trainers(lab)])
    else:
        lab.call("scontrol", "requeue", landed[0]["id"])
    return True


def trainers(lab: Slurm) -> Iterator[int]:
    """The processes of the attempt that this Slurm started, without its supervisor."""
    ours = f"SLURM_CONF={lab.folder}/slurm.conf".encode()
    for path in [p for p in Path("/proc").iterdir() if p.name.isdigit()]:
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            env = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launchers.rank_entry" in words and b"srun" not in words[0] and ours in env:
            yield int(path.name)


def same(a: RunDir, b: RunDir) -> bool:
    """Whether the newest checkpoints hold the same bits."""
    folders = [max((r.path / "checkpoints").glob("step-*")) for r in (a, b)]
    with LocalStore(folders[0]) as x, LocalStore(folders[1]) as y:
        one, two = Reader(x), Reader(y)
        assert one.names == two.names
        return all(one.read(n).tobytes() == two.read(n).tobytes() for n in one.names)


def lost_steps(run: RunDir) -> list[tuple[int, int]]:
    """(attempt, steps that it trained and that were trained again) of every attempt that another followed."""
    ends = {n: rows[-1]["step"] for n in run.attempt_numbers() if (rows := run.rows(n, "metrics"))}
    starts = {n: rows[0]["step"] for n in run.attempt_numbers() if (rows := run.rows(n, "metrics"))}
    numbers = sorted(ends)
    return [(a, ends[a] - starts[b] + 1) for a, b in itertools.pairwise(numbers)]


def report(run: RunDir, found: list[Disturbance]) -> None:
    """The figures of docs/run/reliability.md."""
    numbers, kinds = run.attempt_numbers(), Counter(d.kind for d in found)
    rows = {n: run.rows(n, "metrics") for n in numbers}
    again = dict(lost_steps(run))
    told, killed = [d for d in found if d.kind != "kill"], [d for d in found if d.kind == "kill"]
    with_work = [d for d in told if rows[d.attempt]]
    # By the step at which the next attempt resumed: a supervisor that is killed after the save records no end.
    fired = [d for d in with_work if again[d.attempt] == 0]
    lost = list(again.values())
    print(
        f"\ndisturbances      {len(found)} ({', '.join(f'{v} {k}' for k, v in sorted(kinds.items()))})\n"
        f"attempts          {len(numbers)}, {sum(1 for n in numbers if rows[n])} of them with a step\n"
        f"saves within the grace / signals that came after a step had been trained   {len(fired)} / {len(with_work)}\n"
        f"signals that came before the first step of an attempt                      {len(told) - len(with_work)}\n"
        f"steps trained again   {sum(lost)} of {run.curve()[-1]['step']}; the most at one seam {max(lost)}\n"
        f"median seconds from the signal to the next step   {_median(run, rows, told)}\n"
        f"median seconds from a kill to the next step       {_median(run, rows, killed)}",
        flush=True,
    )


def _median(run: RunDir, rows: dict[int, list[dict[str, Any]]], of: list[Disturbance]) -> str:
    """Of the seconds from a disturbance to the next step, where the next attempt came to one."""
    waits = [
        _began_s(run, d.attempt + 1) + rows[d.attempt + 1][0]["time_s"] - d.unix_s
        for d in of
        if rows.get(d.attempt + 1)
    ]
    return f"{statistics.median(waits):.1f} (of {len(waits)})" if waits else "none"


def _began_s(run: RunDir, number: int) -> float:
    from portatrain.system import json_files

    path = run.path / "attempts" / str(number) / "attempt.json"
    found: dict[str, Any] = json_files.read_json(path) if path.exists() else {}
    return float(found.get("began_unix_s", 0.0))
