"""What carries a job on a real Slurm: claims, siblings, preemption, cancelling, failures. The training is a stand-in
that computes nothing (tests/support/fakes/train.py); test_story.py has the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm import SlurmLauncher
from portatrain.runs import jobs
from portatrain.runs.history import History, read_history
from portatrain.runs.open import open_run
from portatrain.runs.run_dir import RunDir
from tests.engines.slurm_here import Slurm
from tests.engines.story import launch

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]

Until = Callable[..., None]


def now(name: str = "a") -> History:
    return read_history(RunDir(Path("runs", name)))


def events(kind: str, name: str = "a") -> list[dict[str, Any]]:
    return RunDir(Path("runs", name)).events(kind)


def seen(name: str = "a") -> str:
    run = Path("runs", name)
    files = sorted([*run.glob("attempts/*/events.jsonl"), *run.glob("attempts/*/*.log"), *run.glob("jobs/*.log")])
    texts = [f"=== {path}\n{path.read_text(errors='replace')[-2000:]}" for path in files]
    return "\n".join([json.dumps(now(name).as_json(), indent=1), *texts])


def start(cluster: str = "lab-tpu,lab-gpu", *more: str) -> None:
    launch("--cluster", cluster, "tiny-lm", "--run", "a", *more)


def test_of_two_acceptable_partitions_one_runs_and_nothing_is_left(light_lab: Slurm, until: Until) -> None:
    start()
    assert [job.id is not None for job in jobs.of("runs/a")] == [True, True]
    until(lambda: now().state == "RUNNING", 40, "running", seen)
    until(lambda: len(light_lab.jobs()) == 2, 5, "two jobs", light_lab.jobs)
    shown = launch("status", "a", "--ask")
    assert "RUNNING" in shown and ("held" in shown or "pending" in shown)
    until(lambda: now().state == "SUCCEEDED", 40, "the end", seen)
    until(lambda: not light_lab.jobs(), 20, "no job left", light_lab.jobs)
    assert len(now().attempts) == 1 and events("landed")[0]["cluster"] == "lab-tpu"  # the preferred one
    assert "one that is finished" in launch("resume", "a", code=2)
    assert "one that is finished" in launch("--cluster", "lab-tpu", "tiny-lm", "--run", "a", code=2)


def test_a_preempted_run_goes_on_elsewhere_and_comes_back(light_lab: Slurm, until: Until) -> None:
    start()
    until(lambda: now().step >= 5, 40, "steps", seen)
    first = now().attempts[0].where.split()[0]
    partition = {"lab-tpu": ("tpu", 2), "lab-gpu": ("gpu", 1)}[first]
    light_lab.preempt(*partition)
    until(lambda: len(events("landed")) == 2 and now().step > 10, 40, "a second attempt", seen)
    (left,) = [e for e in events("left") if e["attempt"] == 1]
    assert (left["outcome"], left["asked"], left["code"]) == ("preempted", "preempt", 85)
    (landed,) = [e for e in events("landed") if e["attempt"] == 2]
    assert landed["cluster"] != first
    until(lambda: now().state == "SUCCEEDED", 40, "the end", seen)
    assert now().trained_again == 0
    until(lambda: len(light_lab.jobs()) == 1, 20, "only the one that preempted", light_lab.jobs)


@pytest.mark.parametrize("how", ["launch", "scancel"])
def test_cancelled_while_running_it_saves_and_is_not_requeued(light_lab: Slurm, until: Until, how: str) -> None:
    start()
    until(lambda: now().step >= 5, 40, "steps", seen)
    if how == "launch":
        assert "cancelled; newest checkpoint: step" in launch("cancel", "a")
    else:
        landed = events("landed")[0]
        light_lab.call("scancel", landed["id"])
    until(lambda: now().state == "CANCELLED", 30, "cancelled", seen)
    until(lambda: not light_lab.jobs(), 30, "no job left", light_lab.jobs)
    reached = now().step
    assert now().committed == reached and len(now().attempts) == 1
    launch("resume", "a")
    until(lambda: now().state == "SUCCEEDED", 60, "the end after a resume", seen)
    assert now().trained_again == 0 and now().step == 60


def test_requeued_by_an_administrator_is_no_cancel(light_lab: Slurm, until: Until) -> None:
    start("lab-tpu")
    until(lambda: now().step >= 5, 40, "steps", seen)
    light_lab.call("scontrol", "requeue", events("landed")[0]["id"])
    until(lambda: now().state == "SUCCEEDED", 90, "the end", seen)
    left = events("left")[0]
    assert (left["outcome"], left["asked"]) == ("preempted", "preempt")
    assert now().trained_again == 0 and len(now().attempts) == 2


def test_cancelled_while_pending(light_lab: Slurm, until: Until) -> None:
    blocks = [light_lab.preempt("tpu", 2), light_lab.preempt("gpu", 1)]
    until(lambda: list(light_lab.jobs().values()) == ["RUNNING"] * 2, 30, "both partitions taken", light_lab.jobs)
    start()
    assert now().state == "QUEUED"
    launch("cancel", "a")
    assert now().state == "CANCELLED"
    until(lambda: set(light_lab.jobs()) == set(blocks), 20, "only what blocks", light_lab.jobs)


def test_cancelled_while_saving(light_lab: Slurm, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SAVE_S", "3")
    start("lab-tpu")
    until(lambda: (Path("runs/a/checkpoints/step-00000020")).exists(), 40, "a save has begun", seen)
    launch("cancel", "a")
    assert now().state == "CANCELLED" and now().committed == now().step >= 20
    until(lambda: not light_lab.jobs(), 30, "no job left", light_lab.jobs)


def test_the_time_limit_is_a_preemption(light_lab: Slurm, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("clusters.toml").read_text().replace("signal_s = 15", 'signal_s = 55, time = "00:01:00"')
    Path("clusters.toml").write_text(text)
    monkeypatch.setenv("FAKE_STEP_S", "0.5")
    start("lab-tpu")
    until(lambda: len(now().attempts) >= 2, 120, "a second attempt", seen)
    left = events("left")[0]
    assert (left["outcome"], left["asked"]) == ("preempted", "preempt")
    launch("cancel", "a")


def test_failures_without_progress_end_it(light_lab: Slurm, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "crash")
    start("lab-tpu,lab-gpu", "--max-restarts", "1")
    until(lambda: now().state == "FAILED", 60, "given up", seen)
    until(lambda: not light_lab.jobs(), 20, "no job left", light_lab.jobs)
    assert len(now().attempts) == 2 and "some error of a library" in now().why


def test_one_crash_is_only_another_attempt(light_lab: Slurm, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "crash-once")
    start("lab-tpu")
    until(lambda: [a.ended for a in now().attempts] == ["failed", "done"], 60, "the end", seen)
    assert now().state == "SUCCEEDED"


def test_a_node_that_dies(light_lab: Slurm, until: Until) -> None:
    start("lab-gpu,lab-tpu")
    until(lambda: now().step >= 25, 40, "steps and a commit", seen)
    where = events("landed")[0]["host"]
    light_lab.kill_node(where)
    until(lambda: now().state == "LOST", 5, "what ran there is gone", seen)
    until(lambda: len(light_lab.jobs()) == 2, 60, "both jobs are still there", light_lab.jobs)
    # What Slurm will do by itself takes as long as the node is away; the held sibling is free to start.
    until(lambda: "released" in launch("reconcile", "a") or now().state == "SUCCEEDED", 60, "released", seen)
    until(lambda: now().state == "SUCCEEDED", 60, "the end", seen)
    assert now().attempts[0].ended == "lost" and now().attempts[1].steps[0] == 21
    assert now().trained_again > 0  # what had not been committed; the curve has each step once
    assert [row["step"] for row in RunDir(Path("runs/a")).curve()] == list(range(1, 61))
    until(lambda: not light_lab.jobs(), 60, "no job left", light_lab.jobs)


def test_two_attempts_at_once_only_one_commits(light_lab: Slurm, until: Until) -> None:
    start("lab-tpu")
    until(lambda: now().step >= 5, 40, "steps", seen)
    from portatrain.runs.claim import holder

    owner = holder(Path("runs/a/claim"))
    assert owner is not None
    refused = launch("resume", "a", "--cluster", "lab-gpu", code=2)
    assert str(owner.pid) in refused
    # Somebody who takes the claim by force: the first attempt must not commit any more.
    Path("runs/a/claim").unlink()
    from portatrain.runs.claim import Claim

    mine = Claim.acquire(Path("runs/a/claim").resolve())
    reached = now().committed
    (job,) = jobs.of("runs/a")
    asked = SlurmLauncher()
    until(lambda: asked.describe(job).state == "held", 60, "the first attempt has stepped aside", light_lab.jobs)
    assert now().committed == reached and mine.held and not RunDir(Path("runs/a")).is_done
    mine.release()
    until(lambda: "released" in launch("reconcile", "a"), 20, "released", seen)
    until(lambda: now().state == "SUCCEEDED", 60, "the end", seen)


def test_a_dry_run_prints_what_is_submitted(light_lab: Slurm, until: Until) -> None:
    shown = launch("--cluster", "lab-tpu,lab-gpu", "tiny-lm", "--run", "a", "--dry-run")
    assert not Path("runs").exists() and not light_lab.jobs()
    start()
    for job in jobs.of("runs/a"):
        assert SlurmLauncher().materialize(job) in shown
        stored = light_lab.call("scontrol", "write", "batch_script", str(job.id), "-")
        assert stored.strip() == SlurmLauncher().materialize(job).strip()
    launch("cancel", "a")


def test_a_recipe_that_does_not_import_on_the_node(light_lab: Slurm, until: Until) -> None:
    Path("mine.py").write_text(
        "import os\nfrom recipes.tiny_lm import recipe\n"
        "if 'SLURM_JOB_ID' in os.environ:\n    import a_module_that_only_the_login_node_has\n"
    )
    launch("--cluster", "lab-tpu,lab-gpu", "mine.py", "--run", "a")
    until(lambda: now().state == "FAILED", 60, "given up", seen)
    until(lambda: not light_lab.jobs(), 30, "no job left", light_lab.jobs)
    assert len(now().attempts) == 1 and "a_module_that_only_the_login_node_has" in now().why


def test_a_submission_that_is_refused_leaves_nothing(light_lab: Slurm) -> None:
    text = Path("clusters.toml").read_text().replace('gres = "gpu:2"', 'gres = "gpu:99"')
    Path("clusters.toml").write_text(text)
    assert "sbatch" in launch("--cluster", "lab-tpu,lab-gpu", "tiny-lm", "--run", "a", code=2)
    assert not light_lab.jobs() and not jobs.of("runs/a")
    Path("clusters.toml").write_text(text.replace('partition = "tpu"', 'partition = "tup"'))
    assert "Did you mean tpu" in launch("--cluster", "lab-tpu", "tiny-lm", "--run", "b", code=2)
    assert not Path("runs/b").exists()


def test_a_folder_of_odd_characters(light_lab: Slurm, until: Until) -> None:
    runs = "my runs, %j $(id) 'so'"
    launch("--cluster", "lab-tpu", "tiny-lm", "--run", "a", "--runs", runs)
    run = RunDir(Path(runs, "a"))
    until(lambda: read_history(run).state == "SUCCEEDED", 60, "the end", lambda: list(Path().rglob("*.log")))
    assert sorted(p.name for p in (run.path / "attempts/1").glob("rank-*.log")) == ["rank-0.log", "rank-1.log"]
    refused = launch("--cluster", "lab-tpu", "tiny-lm", "--run", "a", "--runs", 'say "so"', code=2)
    assert "without quotes" in refused and not Path('say "so"').exists()


def test_an_orphan_is_found_and_taken_out(light_lab: Slurm) -> None:
    blocks = {light_lab.preempt("tpu", 2), light_lab.preempt("gpu", 1)}
    start()
    (one, two) = jobs.of("runs/a")
    light_lab.call("scontrol", "update", f"JobId={one.id}", f"Name={one.name[:-1]}77")
    said = launch("reconcile", "a")
    assert f"job {one.id} (slurm, {one.name[:-1]}77) is in no record: removed" in said
    Path("runs/a/jobs", f"{two.number}.json").write_text(
        json.dumps({**json.loads(Path("runs/a/jobs", f"{two.number}.json").read_text()), "id": None})
    )
    assert f"submitted as {two.id}" in launch("reconcile", "a")
    assert jobs.of("runs/a")[1].id == two.id
    launch("cancel", "a")
    assert set(light_lab.jobs()) == blocks


def test_doctor(light_lab: Slurm) -> None:
    said = launch("doctor", "lab-tpu")
    for line in (
        "ok    controller",
        "ok    notice",
        "ok    partition: tpu is UP",
        "ok    grace",
        "ok    storage from a node",
    ):
        assert line in said, said
    text = Path("clusters.toml").read_text().replace('partition = "gpu"', 'partition = "tpu-high"')
    Path("clusters.toml").write_text(text)
    assert "ok    grace: 0 s" in launch("doctor", "lab-gpu")


def test_a_run_directory_in_an_object_store(
    light_lab: Slurm, until: Until, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    from tests.support.s3 import s3

    monkeypatch.setenv("PORTATRAIN_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("FAKE_STEP_S", "0.3")
    with s3(monkeypatch):
        runs, run = "s3://runs/many", "s3://runs/many/a"

        def there() -> History:
            return read_history(open_run(run))

        launch("--cluster", "lab-tpu,lab-gpu", "tiny-lm", "--run", "a", "--runs", runs)
        until(lambda: there().step >= 5, 60, "steps", there)
        first = there().attempts[0].where.split()[0]
        light_lab.preempt(*{"lab-tpu": ("tpu", 2), "lab-gpu": ("gpu", 1)}[first])
        until(lambda: there().state == "SUCCEEDED", 120, "the end", there)
        until(lambda: open_run(run).owner() is None, 60, "the supervisor has left", there)
        seen = open_run(run)
        assert [row["step"] for row in seen.curve()] == list(range(1, 61))
        assert [e["outcome"] for e in seen.events("left")] == ["preempted", "done"]
        landed = [e["cluster"] for e in seen.events("landed")]
        assert landed[0] == first != landed[1] and there().trained_again == 0
        until(lambda: len(light_lab.jobs()) == 1, 60, "only the one that preempted", light_lab.jobs)
        assert not Path("runs").exists()
