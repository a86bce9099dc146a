"""One run over two partitions of a real Slurm: begins as jax on two hosts, is preempted, resumes as torch in two
processes, is preempted, ends as it began."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portatrain.runs.history import committed
from portatrain.runs.run_dir import RunDir
from tests.engines.slurm_here import Slurm
from tests.engines.story import launch, now, prepare, story_of

pytestmark = [pytest.mark.engines, pytest.mark.timeout(2400)]

Until = Callable[..., None]


def processes(attempt: int) -> list[str]:
    """Those of an attempt, by the signs of life that they leave."""
    return sorted(p.name for p in Path(f"runs/story/attempts/{attempt}/beats").iterdir())


def curves_agree(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """The largest relative difference of two curves of the same steps."""
    assert [row["step"] for row in a] == [row["step"] for row in b]
    return max(abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in zip(a, b, strict=True))


def test_preempted_on_tpu_goes_on_on_gpu_and_finishes(lab: Slurm, until: Until) -> None:
    prepare()
    launch("--cluster", "lab-tpu,lab-gpu", "paced.py", "--run", "story")
    until(lambda: now().step >= 8, 90, "training on tpu", story_of)
    assert now().state == "RUNNING" and now().attempts[-1].backend == "jax"
    assert "PENDING" in lab.jobs().values()
    (landed,) = RunDir(Path("runs/story")).events("landed")
    assert landed["scheduler"]["SLURM_JOB_NODELIST"] == "tpu[0-1]"
    assert processes(1) == ["rank-0.json", "rank-1.json"]

    asked_s = time.time()
    first = lab.preempt("tpu", 2)
    until(lambda: len(now().attempts) == 2, 60, "an attempt on gpu", story_of)
    run = RunDir(Path("runs/story"))
    landed = run.rows(2, "events")[0]
    (left,) = [e for e in run.rows(1, "events") if e["event"] == "left"]
    assert landed["cluster"] == "lab-gpu" and left["outcome"] == "preempted"
    scheduler_s = landed["unix_s"] - left["unix_s"]
    assert scheduler_s < 15, (scheduler_s, landed["unix_s"] - asked_s)
    until(lambda: now().attempts[1].steps, 90, "steps on gpu", story_of)
    seam = now().attempts
    assert seam[0].steps is not None and seam[1].steps is not None
    assert seam[1].steps[0] == seam[0].steps[1] + 1 == left["committed"] + 1
    assert seam[1].backend == "torch" and seam[1].mesh == "fsdp=2"

    until(lambda: now().step >= seam[1].steps[0] + 6, 90, "more steps on gpu", story_of)
    assert processes(2) == ["rank-0.json", "rank-1.json"]
    lab.call("scancel", first)
    lab.preempt("gpu", 1)
    until(lambda: now().state == "SUCCEEDED", 180, "the end", story_of)
    until(lambda: len(lab.jobs()) == 1, 30, "no job of the run is left in the scheduler", lab.jobs)

    end = now()
    assert [a.backend for a in end.attempts] == ["jax", "torch", "jax"]
    assert [a.verdict for a in end.attempts] == ["", "continuous", "continuous"]
    assert end.trained_again == 0 and end.step == end.steps == 40
    launch("--cluster", "local", "paced.py", "--run", "undisturbed", "--backend", "jax")
    difference = curves_agree(run.curve(), RunDir(Path("runs/undisturbed")).curve())
    print(f"largest relative difference of the curves: {difference:.2g}; scheduler: {scheduler_s:.1f} s")
    assert difference <= 1e-6
    assert committed(run) == 40
