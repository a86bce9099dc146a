"""Exclusive use of a run directory: one attempt at a time writes to it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from portatrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a claim. The start time tells a process from a later one with the same number."""

    host: str
    pid: int
    process_start: str
    claimed_unix_s: float
    token: str

    @staticmethod
    def this_process() -> Owner:
        pid = os.getpid()
        return Owner(
            host=socket.gethostname(),
            pid=pid,
            process_start=process_start(pid) or "",
            claimed_unix_s=time.time(),
            token=secrets.token_hex(16),
        )

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended. Of another host nothing is known."""
        return self.host == socket.gethostname() and process_start(self.pid) != self.process_start


def process_start(pid: int) -> str | None:
    """When process ``pid`` of this host began, as an opaque text; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # The second field is the program's name, in brackets, and may hold anything.
        fields = stat.rpartition(")")[2].split()
        if fields[0] == "Z":  # ended, only not yet reaped by its parent
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{fields[19]}"
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


class Claim:
    """The file ``claim`` of a run directory, held by this process."""

    def __init__(self, path: Path, owner: Owner, *, taken_over: Owner | None) -> None:
        self.path, self.owner, self.taken_over = path, owner, taken_over

    @staticmethod
    def acquire(path: Path) -> Claim:
        """Take the claim; ``taken_over`` names the dead owner whose claim it was.

        Raises:
            UserError: another process holds it.
        """
        me = Owner.this_process()
        # The lock makes "look, remove the dead one's, put mine" one act among processes that do the same; the claim
        # itself is a file, because a lock ends with its process and tells a reader nothing.
        with _locked(path.parent):
            dead = holder(path)
            if dead is not None:
                if not dead.is_gone:
                    raise in_use(path, dead)
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
                raise in_use(path, other) from None
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
            raise in_use(self.path, holder(self.path))

    def release(self) -> None:
        with _locked(self.path.parent):
            if self.held:
                self.path.unlink()


def holder(path: Path) -> Owner | None:
    """Who holds the claim at ``path``; None where nobody does."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(
            str(path),
            expected="a claim that portatrain wrote",
            got=str(error),
            do="Remove the file if no process uses this run directory.",
        ) from error


def in_use(path: Path, owner: Owner | None) -> UserError:
    """The error for a run directory that somebody else is using."""
    who = f"process {owner.pid} on {owner.host}" if owner else "nobody (the claim is gone)"
    return UserError(
        f"run directory {path.parent}",
        expected="to be the only one that writes to it",
        got=f"a claim of {who}",
        do=f"Wait for it or end it. If it is known to be dead on another host, remove {path}.",
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
