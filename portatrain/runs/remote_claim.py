"""The claim on a run in an object store: the object `claim`, changed only by conditional puts.

The owner replaces it every BEAT_S as a heartbeat. Each put names the version that the owner wrote last, so the owner
notices at once if another process has replaced it. A claim without a heartbeat for LEASE_S, by the store's clock, is
taken over in the same way; if two processes try, one succeeds. A released claim is overwritten instead of removed,
because a removal cannot be conditional.

No store can put two objects in one atomic step, so `guard()` is not a lock: it renews the claim, which is then valid
for LEASE_S, and checks afterwards that the claim was not lost in the meantime. A process that takes a run over removes
the unfinished checkpoints of the previous owner (`Checkpoints.remove_unfinished`), so a COMMIT that the previous owner
writes later refers to files that no longer exist.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from portatrain.errors import UserError
from portatrain.runs.claim import BEAT_S, LEASE_S, Owner, in_use, owner_of
from portatrain.system import json_files
from portatrain.system.object_store import Objects, Version

NAME = "claim"


class RemoteClaim:
    """See `portatrain.runs.claim.ClaimHandle`. `released()` is called once, just before the release."""

    def __init__(
        self,
        objects: Objects,
        owner: Owner,
        version: Version,
        *,
        taken_over: Owner | None,
        adopted: bool,
        released: Callable[[], None],
    ) -> None:
        self.objects, self.owner, self.taken_over, self.adopted = objects, owner, taken_over, adopted
        self._version, self._released, self._until_s, self._lost = (version, released, _now_s() + LEASE_S, False)
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="portatrain-claim", daemon=True)
        self._thread.start()

    @staticmethod
    def acquire(objects: Objects, released: Callable[[], None]) -> RemoteClaim:
        """Take the claim; UserError if another process holds it."""
        me, dead, began_s = Owner.this_process(), None, _now_s()
        found = objects.get(NAME)
        if found is None:
            version = objects.create(NAME, _body(me))
        else:
            dead = _owner(found[0], objects)
            if dead is not None:
                if dead.is_ours:
                    return RemoteClaim(objects, dead, found[1], taken_over=None, adopted=True, released=released)
                if not is_over(objects, dead):
                    raise in_use(objects.url, dead)
            version = objects.replace(NAME, _body(me), found[1])
        if version is None:
            raise in_use(objects.url, holder(objects))
        claim = RemoteClaim(objects, me, version, taken_over=dead, adopted=False, released=released)
        claim._until_s = began_s + LEASE_S
        return claim

    @property
    def held(self) -> bool:
        """True if this process still holds the claim."""
        owner = holder(self.objects)
        return owner is not None and owner.token == self.owner.token

    def fence(self) -> None:
        """Raise UserError if the claim has been lost. Asks the store only if the lease has expired."""
        if self._lost or _now_s() > self._until_s:
            self._renew()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Hold the claim for writes that are short and final.

        Raises:
            UserError: the claim was lost before the writes or during them.
        """
        self._renew()
        yield
        if _now_s() > self._until_s:
            self._renew()

    def _renew(self) -> None:
        with self._lock:
            while True:
                began_s, body = _now_s(), _body(self.owner)
                version = self.objects.replace(NAME, body, self._version)
                if version is None:  # the supervisor or its child has renewed it, or it is lost
                    found = self.objects.get(NAME)
                    owner = None if found is None else _owner(found[0], self.objects)
                    if found is None or owner is None or owner.token != self.owner.token:
                        self._lost = True
                        raise in_use(self.objects.url, owner)
                    self._version = found[1]
                    continue
                self._version, self._until_s = version, began_s + LEASE_S
                return

    def _watch(self) -> None:
        while not self._stop.wait(BEAT_S):
            # A failed renewal is retried; if all retries fail, the lease expires.
            with contextlib.suppress(UserError):
                if self.adopted:
                    began_s = _now_s()
                    if self.held:
                        self._until_s = began_s + LEASE_S
                    else:
                        self._until_s = 0.0
                else:
                    self._renew()

    def release(self) -> None:
        """Release the claim, unless it is adopted: then the supervisor keeps it."""
        self._stop.set()
        self._released()
        if self._thread is not threading.current_thread():
            self._thread.join()
        if not self.adopted and not self._lost:
            with self._lock:
                self.objects.replace(NAME, json.dumps({"released": secrets.token_hex(8)}).encode(), self._version)


def holder(objects: Objects) -> Owner | None:
    """Return the owner of the claim; None if there is no claim."""
    found = objects.get(NAME)
    return None if found is None else _owner(found[0], objects)


def is_over(objects: Objects, owner: Owner, *, writable: bool = True) -> bool:
    """Return True if the claim may be taken over from `owner`."""
    return owner.is_gone or (not owner.is_here and objects.age_s(NAME, writable=writable) > LEASE_S)


def live_owner(objects: Objects) -> Owner | None:
    """Return the owner of the claim if it appears to be alive; otherwise None. Writes nothing."""
    owner = holder(objects)
    return None if owner is None or is_over(objects, owner, writable=False) else owner


def _body(owner: Owner) -> bytes:
    # Some stores identify a version by its content, so every write needs different content.
    return json.dumps({**asdict(owner), "beat": secrets.token_hex(8)}).encode()


def _owner(data: bytes, objects: Objects) -> Owner | None:
    try:
        row: dict[str, Any] = json_files.loads(data)
        if "released" in row:
            return None
        return owner_of(row)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"object {objects.url}/{NAME}",
            expected="a claim that portatrain wrote",
            got=str(error),
            do="Remove it if no process uses this run directory.",
        ) from error


def _now_s() -> float:
    """Return the time of a clock that also runs while the machine is suspended, if there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
