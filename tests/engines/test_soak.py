"""One run through many preemptions and kills at random moments on a real Slurm: `make soak-engines`.

SOAK_KILLS (50) and SOAK_SEED (1) choose how many and which. Prints the table of docs/reliability.md.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.claim import live_owner
from portatrain.run_dir import RunDir
from portatrain.status import status
from tests.engines.slurm_here import Slurm
from tests.engines.test_story import launch, now, prepare, story_of

pytestmark = [pytest.mark.engines, pytest.mark.soak, pytest.mark.timeout(14_000)]

KILLS, SEED = int(os.environ.get("SOAK_KILLS", "50")), int(os.environ.get("SOAK_SEED", "1"))
STEPS_A_KILL = 60
Until = Callable[..., None]


def test_no_step_is_lost_or_trained_twice(lab: Slurm, until: Until) -> None:
    prepare()
    # Both partitions as the same backend and mesh, so that the end can be compared bit for bit.
    text = Path("clusters.toml").read_text()
    for old, new in (
        ('backend = "torch"', 'backend = "jax"'),
        ("count = 2", "count = 4"),
        ("fsdp=2", "fsdp=4"),
    ):
        text = text.replace(old, new)
    Path("clusters.toml").write_text(text)
    Path("paced.py").write_text(Path("paced.py").read_text().replace("seconds=0.25", "seconds=0.1"))
    words = ["--set", f"steps={STEPS_A_KILL * KILLS}"]
    launch("--cluster", "lab-tpu,lab-gpu", "paced.py", "--run", "story", "--max-restarts", "50", *words)
    run = RunDir(Path("runs/story"))
    kinds = disturbed(lab, run, until)
    other = ["--run", "undisturbed", "--backend", "jax", "--mesh", "fsdp=4", *words]
    launch("--cluster", "local", "paced.py", *other)
    report(run, kinds)
    alone = RunDir(Path("runs/undisturbed"))
    check(run, every=10)
    assert [row["loss"] for row in run.curve()] == [row["loss"] for row in alone.curve()]
    assert same(run, alone)
    assert {a.verdict for a in status(run).attempts if a.verdict} == {"continuous"}


def test_the_same_with_a_stand_in(light_lab: Slurm, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    """What carries the run, at a hundredth of the work: the training keeps the run directory and computes nothing."""
    monkeypatch.setenv("FAKE_STEPS", str(STEPS_A_KILL * KILLS))
    monkeypatch.setenv("FAKE_STEP_S", "0.1")
    launch("--cluster", "lab-tpu,lab-gpu", "tiny-lm", "--run", "story", "--max-restarts", "50")
    run = RunDir(Path("runs/story"))
    report(run, disturbed(light_lab, run, until))
    check(run, every=20)


def disturbed(lab: Slurm, run: RunDir, until: Until) -> Counter[str]:
    """See the run to its end with KILLS disturbances; how many of each kind there were."""
    chosen, kinds = random.Random(SEED), Counter[str]()
    while sum(kinds.values()) < KILLS and not run.is_done:
        until(lambda: alive(run) is not None or run.is_done, 180, "an attempt to disturb", story_of)
        time.sleep(chosen.uniform(0.0, 9.0))
        before = max(run.attempt_numbers())
        kind = chosen.choice(("preempt", "preempt", "kill", "requeue"))
        if not disturb(lab, run, kind):
            continue
        kinds[kind] += 1
        until(lambda n=before: left(run, n), 60, f"attempt {before} has left after {kind}", story_of)
        if sum(kinds.values()) % 5 == 0:
            print(
                f"{sum(kinds.values())} of {KILLS}: step {now().step}, {len(now().attempts)} attempts",
                flush=True,
            )
        for job in lab.jobs():  # whatever preempted it has done so
            if name(lab, job) == "wrap":
                lab.call("scancel", job)
    until(lambda: now().state == "SUCCEEDED", 900, "the end", story_of)
    until(
        lambda: not [j for j in lab.jobs() if name(lab, j) != "wrap"],
        60,
        "no job of the run is left",
        lab.jobs,
    )
    return kinds


def check(run: RunDir, every: int) -> None:
    """Each step is on the curve once, and no seam trained more again than the steps between two saves."""
    assert [row["step"] for row in run.curve()] == list(range(1, STEPS_A_KILL * KILLS + 1))
    for number, lost in lost_steps(run):
        assert lost <= every, (number, lost)


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
        if b"portatrain.landing" in words and b"srun" not in words[0] and ours in env:
            yield int(path.name)


def same(a: RunDir, b: RunDir) -> bool:
    """Whether the newest checkpoints hold the same bits."""
    folders = [max((r.path / "checkpoints").glob("step-*")) for r in (a, b)]
    with LocalStore(folders[0]) as x, LocalStore(folders[1]) as y:
        one, two = Reader(x), Reader(y)
        assert one.names == two.names
        return all(np.array_equal(one.read(n).view(np.uint8), two.read(n).view(np.uint8)) for n in one.names)


def lost_steps(run: RunDir) -> list[tuple[int, int]]:
    """(attempt, steps that it trained and that were trained again) of every attempt that another followed."""
    ends = {n: rows[-1]["step"] for n in run.attempt_numbers() if (rows := run.rows(n, "metrics"))}
    starts = {n: rows[0]["step"] for n in run.attempt_numbers() if (rows := run.rows(n, "metrics"))}
    numbers = sorted(ends)
    return [(a, ends[a] - starts[b] + 1) for a, b in itertools.pairwise(numbers)]


def report(run: RunDir, kinds: Counter[str]) -> None:
    """The figures of docs/reliability.md."""
    numbers = run.attempt_numbers()
    events = {n: run.rows(n, "events") for n in numbers}
    rows = {n: run.rows(n, "metrics") for n in numbers}
    lefts = {n: next((e for e in events[n] if e["event"] == "left"), None) for n in numbers}
    asked = {n for n in numbers if (e := lefts[n]) and e["asked"] == "preempt"}
    with_work = {n for n in asked if rows[n]}
    fired = {n for n in with_work if lefts[n]["committed"] == rows[n][-1]["step"]}  # type: ignore[index]
    began = {n: _began_s(run, n) for n in numbers}
    waits = []
    for n in asked:
        ended_s = next(e["unix_s"] for e in events[n] if e["event"] == "left")
        later = [m for m in numbers if m > n and rows[m]]
        if later:
            waits.append(began[later[0]] + rows[later[0]][0]["time_s"] - ended_s)
    lost = lost_steps(run)
    print(
        f"\ndisturbances      {sum(kinds.values())} ({', '.join(f'{v} {k}' for k, v in sorted(kinds.items()))})\n"
        f"attempts          {len(numbers)}\n"
        f"saves within the grace / signals that came after a step had been trained   {len(fired)} / {len(with_work)}\n"
        f"signals that came before the first step of an attempt                      {len(asked) - len(with_work)}\n"
        f"steps trained again   {sum(n for _, n in lost)}; the most at one seam {max(n for _, n in lost)}\n"
        f"median seconds from leaving to the next step   {statistics.median(waits) if waits else float('nan'):.1f}",
        flush=True,
    )


def _began_s(run: RunDir, number: int) -> float:
    from portatrain import files

    path = run.path / "attempts" / str(number) / "attempt.json"
    found: dict[str, Any] = files.read_json(path) if path.exists() else {}
    return float(found.get("began_unix_s", 0.0))
