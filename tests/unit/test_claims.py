"""Who holds a run: what counts as this host, and a heartbeat that outlives a file system that is away."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from portatrain.errors import UserError
from portatrain.runs import claim
from portatrain.runs.claim import LEASE_S, Claim, Owner, holder, live_owner

NOBODY = 2**22 - 1
"""A number that no process here has."""


def write(path: Path, owner: Owner, *, silent_s: float = 0.0) -> None:
    path.write_text(json.dumps(asdict(owner)))
    then_s = time.time() - silent_s
    os.utime(path, (then_s, then_s))


def elsewhere(owner: Owner, **changes: object) -> Owner:
    """The same owner as another boot, or another namespace, of a machine of the same name would write it."""
    boot = changes.pop("boot", owner.process_start.partition("/")[0])
    start = f"{boot}/{owner.process_start.partition('/')[2]}"
    return replace(owner, process_start=start, **changes)  # type: ignore[arg-type]


OTHERS: dict[str, dict[str, object]] = {
    "another boot, one name": {"boot": "0000-other"},
    "another namespace, one name": {"namespace": "pid:[1]"},
    "another boot and namespace": {"boot": "0000-other", "namespace": "pid:[1]"},
    "an older claim without a namespace": {"namespace": ""},
}


@pytest.mark.parametrize("pid", ["ours", NOBODY])
@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_a_process_of_another_system_is_not_looked_up_here(other: dict, pid: object, tmp_path: Path) -> None:
    """Its number means nothing here: while it gives signs of life it lives, and after the lease it is gone."""
    path, me = tmp_path / "claim", Owner.this_process()
    owner = elsewhere(me, pid=me.pid if pid == "ours" else NOBODY, **other)
    assert not owner.is_here and not owner.is_gone
    write(path, owner)
    assert live_owner(path) == owner
    with pytest.raises(UserError, match="a claim of process"):
        Claim.acquire(path)
    assert holder(path) == owner
    write(path, owner, silent_s=LEASE_S + 5)
    assert live_owner(path) is None
    taken = Claim.acquire(path)
    assert taken.taken_over == owner
    taken.release()


def test_another_name_of_this_system_is_this_system(tmp_path: Path) -> None:
    """A pod that shares its host's processes has a name of its own."""
    path, me = tmp_path / "claim", replace(Owner.this_process(), host="pod-7")
    write(path, me, silent_s=LEASE_S + 5)
    assert me.is_here and live_owner(path) == me  # it is looked up, and lives
    write(path, replace(me, pid=NOBODY))
    assert live_owner(path) is None


def test_without_boot_ids_the_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "boot_id", lambda: "")
    monkeypatch.setattr(claim, "pid_namespace", lambda: "")
    me = replace(Owner.this_process(), process_start="", namespace="")
    assert me.is_here and not replace(me, host="another").is_here


def until(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    end_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


def beating() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name == "portatrain-claim"}


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOSPC])
def test_the_heartbeat_outlives_errors(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.02)
    before = beating()  # claims that tests of runs in this process left
    whole, failures, away = os.utime, [0], [True]

    def utime(*args: object, **options: object) -> None:
        if away[0]:
            failures[0] += 1
            raise OSError(number, os.strerror(number))
        whole(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "utime", utime)
    held = Claim.acquire(tmp_path / "claim")
    assert until(lambda: failures[0] > 3)
    whole(tmp_path / "claim", (1.0, 1.0))
    away[0] = False
    assert until(lambda: (tmp_path / "claim").stat().st_mtime > 1.0)
    held.release()
    assert until(lambda: not beating() - before)


def test_the_heartbeat_ends_when_the_claim_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.02)
    before, path = beating(), tmp_path / "claim"
    Claim.acquire(path)
    theirs = replace(Owner.this_process(), token="theirs")
    path.unlink()
    write(path, theirs, silent_s=30)

    def stale(*args: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "stale")

    before_s = path.stat().st_mtime
    monkeypatch.setattr(os, "utime", stale)
    assert until(lambda: not beating() - before)
    assert path.stat().st_mtime == before_s and holder(path) == theirs  # nothing of theirs was touched


@pytest.mark.parametrize("act", ["lock", "link"])
def test_another_error_of_a_lock_or_a_link_is_not_its_own_cause(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(*((fcntl, "flock") if act == "lock" else (os, "link")), fails)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as found:
        Claim.acquire(tmp_path / "claim")
    assert found.value.__cause__ is None
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
