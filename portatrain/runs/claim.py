"""Exclusive use of a run directory: one attempt at a time writes to it, and one that lost its claim writes nothing.

`claim` is a file that names its owner. It is made under a lock, because a lock alone ends with its process and tells a
reader nothing. Its modification time is a sign of life, renewed every BEAT_S: an owner of this boot and this namespace
of processes is looked up by number, any other is taken for gone when the file has been silent for LEASE_S. What must
never come from a loser (a checkpoint's commit, DONE) happens inside `Claim.guard()`, under the same lock as a change of
owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from portatrain.errors import UserError
from portatrain.system import environment

BEAT_S = 5.0
LEASE_S = 60.0
LOCK_WITHIN_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a claim. The start time tells a process from a later one with the same number."""

    host: str
    pid: int
    process_start: str
    claimed_unix_s: float
    token: str
    namespace: str = ""
    """Of its process numbers (containers have their own); '' on a system without them."""

    @staticmethod
    def this_process() -> Owner:
        pid = os.getpid()
        return Owner(
            host=socket.gethostname(),
            pid=pid,
            process_start=process_start(pid) or "",
            claimed_unix_s=time.time(),
            token=secrets.token_hex(16),
            namespace=pid_namespace(),
        )

    @property
    def is_here(self) -> bool:
        """Whether its process can be looked up here: it is, or was, one of this boot and this namespace of processes.

        Names of hosts do not tell: machines of a pool, and containers, may have one name. They count only on a system
        that tells no boot.
        """
        boot = boot_id()
        if not boot:
            return self.host == socket.gethostname() and "/" not in self.process_start
        return self.process_start.partition("/")[0] == boot and self.namespace == pid_namespace()

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended. Of another host nothing is known."""
        return self.is_here and process_start(self.pid) != self.process_start

    @property
    def is_ours(self) -> bool:
        """Whether it is the claim that this process's supervisor holds for it."""
        return environment.CLAIM.get() == self.token


def boot_id() -> str:
    """What tells this boot of this machine from every other; '' on a system that does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """What tells this namespace of process numbers from others of this boot; '' on a system without them."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """When process ``pid`` of this host began, as an opaque text; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # The second field is the program's name, in brackets, and may hold anything.
        fields = stat.rpartition(")")[2].split()
        if fields[0] == "Z":  # ended, only not yet reaped by its parent
            return None
        return f"{boot_id()}/{fields[19]}"
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc (macOS): the number alone
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


class ClaimHandle(Protocol):
    """A claim that this process holds, or the supervisor that started it (`adopted`)."""

    owner: Owner
    taken_over: Owner | None
    """The owner that was gone, and whose claim it was."""
    adopted: bool

    @property
    def held(self) -> bool:
        """Whether it is still this process's."""
        ...

    def fence(self) -> None:
        """Raise UserError unless the claim is still held; to be called before anything is written."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """To be entered for writes that are final; UserError where the claim has been lost."""
        ...

    def release(self) -> None:
        """Give it up; one that was adopted stays its supervisor's."""
        ...


class Claim:
    """The file ``claim`` of a run directory, held by this process, or by the supervisor that started it."""

    def __init__(self, path: Path, owner: Owner, *, taken_over: Owner | None, adopted: bool = False) -> None:
        self.path, self.owner, self.taken_over, self.adopted = path, owner, taken_over, adopted
        self._stop = threading.Event()
        if not adopted:
            # Of this very file: after another owner has replaced it, nothing of theirs is touched.
            handle = os.open(path, os.O_RDONLY)
            threading.Thread(target=self._beat, args=(handle,), name="portatrain-claim", daemon=True).start()

    def _beat(self, handle: int | None) -> None:
        """Renew the sign of life until the claim is given up or lost. What fails is tried again, as a file system may
        be away for a while, and come back with another handle."""
        while not self._stop.wait(BEAT_S):
            try:
                if handle is None:
                    handle = self._reopened()
                    if handle is None:
                        return
                os.utime(handle)
            except OSError:
                if handle is not None:
                    with contextlib.suppress(OSError):
                        os.close(handle)
                handle = None
        if handle is not None:
            os.close(handle)

    def _reopened(self) -> int | None:
        """A new handle of the claim; None where it is not ours any more. OSError where the file system is away."""
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if owner_of(json.loads(os.read(handle, 1 << 16))).token == self.owner.token:
                return handle
        except (ValueError, TypeError, KeyError):
            pass
        except OSError:
            os.close(handle)
            raise
        os.close(handle)
        return None

    @staticmethod
    def acquire(path: Path) -> Claim:
        """Take the claim; ``taken_over`` names the owner that is gone and whose claim it was.

        Raises:
            UserError: another process holds it.
        """
        me = Owner.this_process()
        with _locked(path.parent):
            dead = holder(path)
            if dead is not None:
                if dead.is_ours:
                    return Claim(path, dead, taken_over=None, adopted=True)
                if not is_over(path, dead):
                    raise in_use(path.parent, dead)
                path.unlink()
            handle, temporary = tempfile.mkstemp(prefix=".claim.", dir=path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(asdict(me), file)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.link(temporary, path)  # fails where the name exists; a reader never sees half a claim
            except FileExistsError:
                other = holder(path)
                raise in_use(path.parent, other) from None
            finally:
                Path(temporary).unlink()
            return Claim(path, me, taken_over=dead)

    @property
    def held(self) -> bool:
        """Whether it is still this process's."""
        owner = holder(self.path)
        return owner is not None and owner.token == self.owner.token

    def fence(self) -> None:
        """Raise UserError unless the claim is still held; to be called before anything is written."""
        if not self.held:
            raise in_use(self.path.parent, holder(self.path))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """While entered the claim is held and nobody can take it over; for writes that are short and final.

        Raises:
            UserError: it has been lost.
        """
        with _locked(self.path.parent):
            self.fence()
            yield

    def release(self) -> None:
        """Give it up; one that was adopted stays its supervisor's."""
        if self.adopted:
            return
        self._stop.set()
        with _locked(self.path.parent):
            if self.held:
                self.path.unlink()


def holder(path: Path) -> Owner | None:
    """Who holds the claim at ``path``; None where nobody does."""
    try:
        return owner_of(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError, IsADirectoryError) as error:
        raise UserError(
            str(path),
            expected="a claim that portatrain wrote",
            got=str(error),
            do="Remove the file if no process uses this run directory.",
        ) from error


def owner_of(row: Any) -> Owner:
    """The owner that a claim names. Raises ValueError, TypeError or KeyError for what is no claim."""
    given = {f.name: row[f.name] for f in fields(Owner) if f.name in row}
    owner = Owner(**given)
    texts = (owner.host, owner.process_start, owner.token)
    if not all(isinstance(text, str) for text in texts) or type(owner.pid) is not int or not 0 < owner.pid < 2**31:
        raise ValueError("no owner")
    if type(owner.claimed_unix_s) not in (int, float) or not 0 <= owner.claimed_unix_s <= 1e11:
        raise ValueError("no time")
    return owner


def silent_s(path: Path) -> float:
    """Seconds since the last sign of life of the owner, by the clock of the file system that both write to."""
    try:
        then_s = path.stat().st_mtime
    except OSError:  # released meanwhile
        return 0.0
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - then_s
    except OSError:  # a reader that may not write
        return time.time() - then_s


def is_over(path: Path, owner: Owner) -> bool:
    """Whether the claim at ``path`` may be taken over from ``owner``."""
    return owner.is_gone or (not owner.is_here and silent_s(path) > LEASE_S)


def live_owner(path: Path) -> Owner | None:
    """Who holds the claim and is, as far as can be known, alive."""
    owner = holder(path)
    return None if owner is None or is_over(path, owner) else owner


def in_use(run_dir: Path | str, owner: Owner | None) -> UserError:
    """The error for a run directory that somebody else is using."""
    who = f"process {owner.pid} on {owner.host}" if owner else "nobody (the claim is gone)"
    return UserError(
        f"run directory {run_dir}",
        expected="to be the only one that writes to it",
        got=f"a claim of {who}",
        do=f"Wait for it or end it (launch cancel). A claim of another host that has given no sign of life for "
        f"{LEASE_S:.0f} s is taken over by itself.",
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # A file that can be written, and is never removed: network file systems lock nothing else across hosts.
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline_s = time.monotonic() + LOCK_WITHIN_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise UserError(
                        f"run directory {folder}",
                        expected=f"its lock within {LOCK_WITHIN_S:.0f} s",
                        got="a process that keeps it",
                        do=f"Look for a stopped process of this run: fuser {folder / '.lock'}.",
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)
