"""Checkpoints in S3 for real, on loopback: saved, committed once, restored, through errors and slow answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from checkpoints_format import (
    Box,
    FormatError,
    Layout,
    Mesh,
    NotCommittedError,
    Reader,
    Sharded,
    Tensor,
    Writer,
    commit,
)
from portatrain.backends.base import missing
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.recipe import apply_overrides, load_recipe
from portatrain.run_dir import RunDir
from portatrain.trainer import train
from tests.faults.s3 import Proxy, s3

obstore = pytest.importorskip("obstore")
object_store = pytest.importorskip("portatrain.object_store")

LAYOUT = Layout(
    tensors=(
        Tensor(
            name="params/w", dtype="float32", shape=(64, 4096), axes=("a", "b"), placement=Sharded(spec=(("fsdp",), ()))
        ),
        Tensor(name="opt/count", dtype="int32", shape=(), role="opt"),
    ),
    meshes=(Mesh(axes=(("fsdp", 2),)),), writers=2,
)  # fmt: skip
VALUES = {
    "params/w": np.arange(64 * 4096, dtype=np.float32).reshape(64, 4096),
    "opt/count": np.asarray(7, np.int32),
}


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
        rows = {
            "params/w": values["params/w"][32 * writer : 32 * writer + 32],
            "opt/count": values["opt/count"],
        }
        Writer(store, LAYOUT, save=name, writer=writer).write(rows)
    commit(store, LAYOUT, save=name, meta={"step": 1})
    return store


def good(url: str) -> None:
    reader = Reader(object_store.ObjectStore(url))
    assert reader.verify_all() == sum(v.nbytes for v in VALUES.values())
    for name, value in VALUES.items():
        assert np.array_equal(reader.read(name), value)
    assert np.array_equal(
        reader.read("params/w", Box((30, 100), (4, 50))), VALUES["params/w"][30:34, 100:150]
    )


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
def test_what_is_not_there_is_told(
    bucket: str, there: tuple[str, Proxy], capsys: pytest.CaptureFixture
) -> None:
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
    sizes = [
        "model.layers=1", "model.embed=32", "model.mlp=64", "data.seq_len=64", "batch=4", "steps=12", "eval_every=none",
        "hooks=()", "checkpoint_every=2", "schedule.warmup=2",
    ]  # fmt: skip
    recipe, run = apply_overrides(load_recipe("tiny-lm"), sizes), RunDir(tmp_path / "run")
    proxy.fault = lambda method, path, number: 500 if number % 5 == 0 else None
    assert train(recipe, run, backend=backend, stop_at=7, checkpoints=url) == 85
    assert not (tmp_path / "run/checkpoints").exists()
    assert main(["ckpt", "ls", str(run.path)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in listed if line.startswith("step ") and "committed" in line] == [
        "6",
        "7",
    ]
    with pytest.raises(UserError, match="the place that the run began with"):
        train(recipe, run, backend=backend, checkpoints=f"{url}-other")
    assert train(recipe, run, backend=backend) == 0  # it knows its place
    assert [(s["step"], s["verdict"]) for s in run.events("resumed")] == [(7, "continuous")]
    assert main(["ckpt", "verify", url]) == main(["ckpt", "show", url]) == 0
    assert "good" in capsys.readouterr().out
