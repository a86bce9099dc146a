"""The claim: the lock on a run directory. One attempt at a time writes to it; one that lost its claim writes nothing.

The file `claim` names its owner. It is created under a file lock; the lock alone would not do, because it ends with its
process and does not name it. The owner renews the file's modification time every BEAT_S as a heartbeat. An owner in the
same boot and the same PID namespace as the reader is looked up by PID; any other owner counts as dead when its last
heartbeat is older than LEASE_S. Writes that an attempt without the claim must never make (a checkpoint's commit, DONE)
happen inside `Claim.guard()`, under the same file lock as a change of owner.
"""

from __future__ import annotations

import contextlib
import errno
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
from portatrain.system import environment, json_files

BEAT_S = 5.0
LEASE_S = 60.0
LOCK_WITHIN_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a claim. Its start time distinguishes it from a later process with the same PID."""

    host: str
    pid: int
    process_start: str
    claimed_unix_s: float
    token: str
    namespace: str = ""
    """The PID namespace (each container has its own); '' on a system without them."""

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
        """True if the process can be looked up here: it has the boot and the PID namespace of this process.

        Host names cannot decide this, because machines of a pool, or containers, may share one name. They count only
        on a system without a boot id.
        """
        boot = boot_id()
        if not boot:
            return self.host == socket.gethostname() and "/" not in self.process_start
        return self.process_start.partition("/")[0] == boot and self.namespace == pid_namespace()

    @property
    def is_gone(self) -> bool:
        """True if the process is known to have ended; False for a process on another host."""
        return self.is_here and process_start(self.pid) != self.process_start

    @property
    def is_ours(self) -> bool:
        """True if the supervisor of this process holds the claim for it."""
        return environment.CLAIM.get() == self.token


def boot_id() -> str:
    """Return the id of this boot of this machine; '' on a system without one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Return the id of this process's PID namespace; '' on a system without them."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Return the start time of process ``pid`` of this host, as opaque text; None if the process does not exist."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # The second field is the program's name in brackets, and may contain any character.
        fields = stat.rpartition(")")[2].split()
        if fields[0] == "Z":  # a zombie: ended, but not yet reaped by its parent
            return None
        return f"{boot_id()}/{fields[19]}"
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc (macOS): only the PID can be checked
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


class ClaimHandle(Protocol):
    """A claim held by this process, or by the supervisor that started it (then `adopted` is true)."""

    owner: Owner
    taken_over: Owner | None
    """The previous owner, if its claim was taken over because it had died."""
    adopted: bool

    @property
    def held(self) -> bool:
        """True if this process still holds the claim."""
        ...

    def fence(self) -> None:
        """Raise UserError if the claim has been lost. Call it before every write."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """Hold the claim for writes that are final. Raises UserError if the claim has been lost."""
        ...

    def release(self) -> None:
        """Release the claim, unless it is adopted: then the supervisor keeps it."""
        ...


class Claim:
    """The file ``claim`` of a run directory, held by this process or by the supervisor that started it."""

    def __init__(self, path: Path, owner: Owner, *, taken_over: Owner | None, adopted: bool = False) -> None:
        self.path, self.owner, self.taken_over, self.adopted = path, owner, taken_over, adopted
        self._stop = threading.Event()
        if not adopted:
            # The handle stays with this very file, so a claim that replaces it is never touched.
            handle = os.open(path, os.O_RDONLY)
            threading.Thread(target=self._beat, args=(handle,), name="portatrain-claim", daemon=True).start()

    def _beat(self, handle: int | None) -> None:
        """Renew the heartbeat until the claim is released or lost.

        A failed renewal is retried with a new handle, because a file system may be unavailable for a while.
        """
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
        """Return a new handle of the claim file; None if the claim has been lost.

        Raises:
            OSError: the file system is unavailable.
        """
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if owner_of(json_files.loads(os.read(handle, 1 << 16))).token == self.owner.token:
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
        """Take the claim; ``taken_over`` is the previous owner if it had died.

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
            temporary = str(path.with_name(f".claim.{secrets.token_hex(6)}"))
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(asdict(me), file)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, path)  # fails if the name exists; a reader never sees a partial claim
            except FileExistsError:
                other = holder(path)
                raise in_use(path.parent, other) from None
            except OSError as error:
                if (told := _cannot(path.parent, "link a file", error)) is not None:
                    raise told from error
                raise
            finally:
                Path(temporary).unlink()
            return Claim(path, me, taken_over=dead)

    @property
    def held(self) -> bool:
        """True if this process still holds the claim."""
        owner = holder(self.path)
        return owner is not None and owner.token == self.owner.token

    def fence(self) -> None:
        """Raise UserError if the claim has been lost. Call it before every write."""
        if not self.held:
            raise in_use(self.path.parent, holder(self.path))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Hold the claim so that no other process can take it over. Use it for writes that are short and final.

        Raises:
            UserError: the claim has been lost.
        """
        with _locked(self.path.parent):
            self.fence()
            yield

    def release(self) -> None:
        """Release the claim, unless it is adopted: then the supervisor keeps it."""
        if self.adopted:
            return
        self._stop.set()
        with _locked(self.path.parent):
            if self.held:
                self.path.unlink()


def holder(path: Path) -> Owner | None:
    """Return the owner of the claim at ``path``; None if there is no claim."""
    try:
        return owner_of(json_files.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, IsADirectoryError) as error:
        raise UserError(
            str(path),
            expected="a claim that portatrain wrote",
            got=str(error),
            do="Remove the file if no process uses this run directory.",
        ) from error


def owner_of(row: Any) -> Owner:
    """Return the owner that a claim names. Raises ValueError, TypeError or KeyError if `row` is not a claim."""
    given = {f.name: row[f.name] for f in fields(Owner) if f.name in row}
    owner = Owner(**given)
    texts = (owner.host, owner.process_start, owner.token)
    if not all(isinstance(text, str) for text in texts) or type(owner.pid) is not int or not 0 < owner.pid < 2**31:
        raise ValueError("no owner")
    if type(owner.claimed_unix_s) not in (int, float) or not 0 <= owner.claimed_unix_s <= 1e11:
        raise ValueError("no time")
    return owner


def silent_s(path: Path) -> float:
    """Return the seconds since the owner's last heartbeat, by the clock of the shared file system."""
    try:
        then_s = path.stat().st_mtime
    except OSError:  # the claim was released in the meantime
        return 0.0
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - then_s
    except OSError:  # this process may read the folder but not write to it
        return time.time() - then_s


UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM)
"""What a system call says that a file system does not have."""


def is_over(path: Path, owner: Owner) -> bool:
    """Return True if the claim at ``path`` may be taken over from ``owner``."""
    return owner.is_gone or (not owner.is_here and silent_s(path) > LEASE_S)


def live_owner(path: Path) -> Owner | None:
    """Return the owner of the claim if it appears to be alive; otherwise None."""
    owner = holder(path)
    return None if owner is None or is_over(path, owner) else owner


def in_use(run_dir: Path | str, owner: Owner | None) -> UserError:
    """Return the error for a run directory that another process is using."""
    who = f"process {owner.pid} on {owner.host}" if owner else "nobody (the claim is gone)"
    return UserError(
        f"run directory {run_dir}",
        expected="no other process that writes to it",
        got=f"a claim of {who}",
        do=f"Wait for it or end it (launch cancel). The claim of a process on another host is taken over after "
        f"{LEASE_S:.0f} s without a heartbeat.",
    )


def _cannot(folder: Path, act: str, error: OSError) -> UserError | None:
    """Return the error for a file system without locks or links; None if `error` is about something else."""
    if error.errno not in UNSUPPORTED:
        return None
    return UserError(
        f"run directory {folder}",
        expected=f"a file system on which a process can {act}",
        got=error.strerror or str(error),
        do="Use another file system, or mount this one with locks (Lustre: -o flock). `launch doctor` checks it.",
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Network file systems lock across hosts only a writable file that is never removed.
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline_s = time.monotonic() + LOCK_WITHIN_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    if (told := _cannot(folder, "lock a file", error)) is not None:
                        raise told from error
                    raise
                if time.monotonic() > deadline_s:
                    raise UserError(
                        f"run directory {folder}",
                        expected=f"its lock within {LOCK_WITHIN_S:.0f} s",
                        got="another process that keeps it locked",
                        do=f"Look for a stopped process of this run: fuser {folder / '.lock'}.",
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)
