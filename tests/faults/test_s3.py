"""Checkpoints in S3 for real, on loopback: saved, committed once, restored, through errors and slow answers."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from checkpoints_format import (
    Box,
    FormatError,
    NotCommittedError,
    Reader,
    SaveLayout,
    SaveMesh,
    Sharded,
    Tensor,
    Writer,
    commit,
)
from portatrain.backends.base import missing
from portatrain.cli import launch_main, main
from portatrain.errors import UserError
from portatrain.recipe import apply_overrides, load_recipe
from portatrain.runs.history import History, read_history
from portatrain.runs.open import open_run
from portatrain.runs.run_dir import RunDir
from portatrain.system.object_store import Objects
from portatrain.training.trainer import train
from tests.support.s3 import Proxy, s3

obstore = pytest.importorskip("obstore")
object_store = pytest.importorskip("portatrain.checkpoint.object_store")

LAYOUT = SaveLayout(
    tensors=(
        Tensor(
            name="params/w", dtype="float32", shape=(64, 4096), axes=("a", "b"), placement=Sharded(spec=(("fsdp",), ()))
        ),
        Tensor(name="opt/count", dtype="int32", shape=(), role="opt"),
    ),
    meshes=(SaveMesh(axes=(("fsdp", 2),)),),
    writers=2,
)
VALUES = {"params/w": np.arange(64 * 4096, dtype=np.float32).reshape(64, 4096), "opt/count": np.asarray(7, np.int32)}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Proxy]]:
    quick = {"init_backoff": timedelta(seconds=0.02), "max_backoff": timedelta(seconds=0.1), "base": 2}
    monkeypatch.setattr(
        object_store, "RETRY", {"max_retries": 6, "retry_timeout": timedelta(seconds=20), "backoff": quick}
    )
    with s3(monkeypatch) as found:
        yield found


def save(url: str, name: str, values: dict = VALUES) -> object_store.ObjectStore:
    store = object_store.ObjectStore(url)
    for writer in range(2):
        rows = {"params/w": values["params/w"][32 * writer : 32 * writer + 32], "opt/count": values["opt/count"]}
        Writer(store, LAYOUT, save=name, writer=writer).write(rows)
    commit(store, LAYOUT, save=name, meta={"step": 1})
    return store


def good(url: str) -> None:
    reader = Reader(object_store.ObjectStore(url))
    assert reader.verify_all() == sum(v.nbytes for v in VALUES.values())
    for name, value in VALUES.items():
        assert np.array_equal(reader.read(name), value)
    assert np.array_equal(reader.read("params/w", Box((30, 100), (4, 50))), VALUES["params/w"][30:34, 100:150])


def test_saved_and_restored(there: tuple[str, Proxy]) -> None:
    url, proxy = there
    save(url, "a1")
    good(url)
    last = [path.rpartition("/")[2] for method, path in proxy.seen if method == "PUT"][-1]
    assert last == "COMMIT"


def test_every_other_request_fails_at_first(there: tuple[str, Proxy]) -> None:
    url, proxy = there
    proxy.fault = lambda method, path, number: (500, 503, 429)[number % 3] if number % 2 else None
    save(url, "a1")
    good(url)


def test_answers_that_come_too_late_are_asked_for_again(
    there: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, proxy = there
    monkeypatch.setenv("PORTATRAIN_STORE_TIMEOUT_S", "1")
    late: set[str] = set()

    def fault(method: str, path: str, number: int) -> float | None:
        key = f"{method} {path.partition('?')[0]}"
        if key in late or not path.endswith(("COMMIT", ".safetensors")):
            return None
        late.add(key)
        return 2.5

    proxy.fault = fault
    save(url, "a1")
    good(url)
    assert len(late) >= 3


def test_a_conditional_put_that_nobody_answers_in_time_is_done_once(
    there: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be carried out long after it was given up: what is sent again then finds its own content."""
    url, proxy = there
    monkeypatch.setenv("PORTATRAIN_STORE_TIMEOUT_S", "1")
    waits: list[float] = []

    def fault(method: str, path: str, number: int) -> float | None:
        return waits.pop() if method == "PUT" and waits else None

    proxy.fault = fault
    objects = Objects(url)
    for late in ([1.5], [9.0], [9.0, 1.3]):
        waits[:] = late
        version = objects.create(f"claim-{late}", b"mine")
        assert version is not None
        waits[:] = late
        renewed = objects.replace(f"claim-{late}", b"mine still", version)
        assert renewed is not None
        waits[:] = late
        assert objects.replace(f"claim-{late}", b"another's", version) is None
        waits[:] = late
        assert objects.create(f"claim-{late}", b"another's") is None
        assert objects.get(f"claim-{late}") == (b"mine still", renewed)


def test_a_commit_whose_answer_was_lost_stands_and_is_ours(there: tuple[str, Proxy]) -> None:
    url, proxy = there
    lost: list[str] = []

    def fault(method: str, path: str, number: int) -> float | None:
        if method == "PUT" and path.endswith("COMMIT") and not lost:
            lost.append(path)
            return -1.0
        return None

    proxy.fault = fault
    save(url, "a1")  # tried again, it was there already: not taken for another's
    assert lost
    good(url)


def test_of_two_attempts_one_commits(there: tuple[str, Proxy]) -> None:
    url, _ = there
    outcomes: list[str] = []

    def attempt(name: str, values: dict) -> None:
        try:
            save(url, name, values)
            outcomes.append(name)
        except FormatError as error:
            outcomes.append(type(error).__name__)

    other = {**VALUES, "params/w": VALUES["params/w"] + 1}
    threads = [threading.Thread(target=attempt, args=a) for a in (("a1", VALUES), ("a2", other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) in (["AlreadyCommittedError", "a1"], ["AlreadyCommittedError", "a2"])
    reader = Reader(object_store.ObjectStore(url))
    reader.verify_all()
    expected = VALUES if "a1" in outcomes else other
    assert np.array_equal(reader.read("params/w"), expected["params/w"])


def test_a_store_that_stays_broken_is_told_in_one_paragraph(there: tuple[str, Proxy]) -> None:
    url, proxy = there
    save(f"{url}/one", "a1")
    proxy.fault = lambda method, path, number: 500 if method in ("PUT", "POST") else None
    with pytest.raises(FormatError) as caught:
        save(f"{url}/two", "a2")
    assert "already committed are untouched" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(NotCommittedError):
        Reader(object_store.ObjectStore(f"{url}/two"))
    good(f"{url}/one")


@pytest.mark.parametrize("bucket", ["s3://no-such-bucket/x", "s3://runs/nothing"])
def test_what_is_not_there_is_told(bucket: str, there: tuple[str, Proxy], capsys: pytest.CaptureFixture) -> None:
    assert main(["ckpt", "ls", bucket]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and error.count("\n") == 1


def test_a_run_saves_to_s3_is_swept_and_goes_on(
    there: tuple[str, Proxy], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    url, proxy = there
    backend = next((n for n in ("torch", "jax") if not missing(n)), None)
    if backend is None:
        pytest.skip("neither framework is installed")
    recipe, run = apply_overrides(load_recipe("tiny-lm"), SIZES), RunDir(tmp_path / "run")
    proxy.fault = lambda method, path, number: 500 if number % 5 == 0 else None
    assert train(recipe, run, backend=backend, stop_at=7, checkpoints=url) == 85
    assert not (tmp_path / "run/checkpoints").exists()
    assert main(["ckpt", "ls", str(run.path)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in listed if line.startswith("step ") and "committed" in line] == ["6", "7"]
    with pytest.raises(UserError, match="the location that the run began with"):
        train(recipe, run, backend=backend, checkpoints=f"{url}-other")
    assert train(recipe, run, backend=backend) == 0  # it knows its place
    assert [(s["step"], s["verdict"]) for s in run.events("resumed")] == [(7, "continuous")]
    assert main(["ckpt", "verify", url]) == main(["ckpt", "show", url]) == 0
    assert "good" in capsys.readouterr().out


# ---- a whole run there

SIZES = [
    "model.layers=1",
    "model.embed=32",
    "model.mlp=64",
    "data.seq_len=64",
    "batch=4",
    "steps=12",
    "eval_every=none",
    "hooks=()",
    "checkpoint_every=2",
    "schedule.warmup=2",
]


def words(command: str, url: str, *more: str) -> list[str]:
    return [*command.split(), "--run-dir", url, *(w for s in SIZES for w in ("--set", s)), *more]


def test_a_run_directory_in_s3_goes_on_on_another_machine(
    there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    url, proxy = there
    monkeypatch.chdir(tmp_path)
    backend = next((n for n in ("jax", "torch") if not missing(n)), None)
    if backend is None:
        pytest.skip("neither framework is installed")
    proxy.fault = lambda method, path, number: 500 if number % 7 == 0 else None
    monkeypatch.setenv("PORTATRAIN_SCRATCH", str(tmp_path / "one"))
    assert main(words("train tiny-lm", url, "--backend", backend, "--stop-at", "5")) == 85
    monkeypatch.setenv("PORTATRAIN_SCRATCH", str(tmp_path / "two"))
    capsys.readouterr()
    assert launch_main(["status", url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["committed"]) == ("STOPPED", 5, 5)
    assert main(words("train tiny-lm", url, "--backend", backend)) == 0
    assert main(words("train tiny-lm", url, "--backend", backend)) == 2
    assert "one that is finished" in capsys.readouterr().err
    run = open_run(url)
    assert [row["step"] for row in run.curve()] == list(range(1, 13))
    assert [(s["step"], s["verdict"]) for s in run.events("resumed")] == [(5, "continuous")]
    alone = str(tmp_path / "alone")
    assert main(words("train tiny-lm", alone, "--backend", backend)) == 0
    assert [row["loss"] for row in run.curve()] == [row["loss"] for row in RunDir(alone).curve()]
    assert main(["report", url]) == 0 and "continuous" in Path("one.html").read_text()
    assert main(["ckpt", "verify", url]) == 0
    assert not list(tmp_path.glob("s3:*"))


def _light_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, step_s: float) -> None:
    """Configure a cluster `here` whose training computes nothing (tests/support/fakes/train.py)."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    for key, value in {
        "PYTHONPATH": str(root),
        "REAL_PYTHON": sys.executable,
        "FAKES": str(root / "tests" / "support" / "fakes"),
        "FAKE_STEP_S": str(step_s),
        "PORTATRAIN_SCRATCH": str(tmp_path / "one"),
    }.items():
        monkeypatch.setenv(key, value)
    Path("clusters.toml").write_text(
        '[here]\nchip = "cpu"\ncount = 1\nengine = "local"\n'
        f'options = {{ python = "{root}/tests/support/fakes/python" }}\n'
    )


def test_launched_killed_and_gone_on_with_elsewhere(
    there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _light_cluster(tmp_path, monkeypatch, step_s=0.1)
    Path("mine.py").write_text("from recipes.tiny_lm import recipe\n")
    runs, run = "s3://runs/many", "s3://runs/many/a"
    assert launch_main(["--cluster", "here", "mine.py", "--detach", "--run", "a", "--runs", runs]) == 0

    def now() -> History:
        return read_history(open_run(run))

    until(lambda: (now().committed or 0) >= 20, "a commit", now)
    refused = launch_main(["--cluster", "here", "mine.py", "--detach", "--run", "a", "--runs", runs])
    assert refused == 2 and "a claim of process" in capsys.readouterr().err
    owner = open_run(run).owner()
    assert owner is not None
    os.killpg(owner.pid, signal.SIGKILL)
    until(lambda: now().state == "LOST", "lost", now)  # what it started ends by itself
    # Another machine: nothing of the recipe is there but what the run has taken along.
    Path("mine.py").unlink()
    monkeypatch.setenv("PORTATRAIN_SCRATCH", str(tmp_path / "two"))
    assert launch_main(["resume", run]) == 0
    until(lambda: now().state == "SUCCEEDED", "the end", now)
    until(lambda: open_run(run).owner() is None, "the supervisor has left", now)
    seen = open_run(run)
    assert [row["step"] for row in seen.curve()] == list(range(1, 61))
    assert len(now().attempts) == 2 and seen.events("landed")[1]["job"] == 2
    assert launch_main(["logs", run, "--attempt", "2"]) == 0
    assert launch_main(["reconcile", "--runs", runs]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_cancel_reaches_a_run_on_another_machine(
    there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _light_cluster(tmp_path, monkeypatch, step_s=0.5)
    run = "s3://runs/many/b"
    assert launch_main(["--cluster", "here", "tiny-lm", "--detach", "--run", "b", "--runs", "s3://runs/many"]) == 0
    until(lambda: read_history(open_run(run)).step >= 1, "a step", lambda: read_history(open_run(run)))
    monkeypatch.setenv("PORTATRAIN_SCRATCH", str(tmp_path / "two"))
    assert launch_main(["cancel", run]) == 0
    found = read_history(open_run(run))
    assert found.state == "CANCELLED" and found.committed == found.step >= 1 and found.owner is None
    assert "cancelled; newest checkpoint: step" in capsys.readouterr().out


def until(condition: Callable[[], object], what: str, see: Callable[[], object], seconds: float = 120) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, f"{what}: {see()}"
        time.sleep(0.5)
