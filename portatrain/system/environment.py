"""Every environment variable that portatrain reads, each with a sentence, a default and a typed reader.

`GRACE_S.get()` reads one; UserError where its value is not of its kind. A variable that is set to nothing counts as not
set. `GRACE_S.name` is for whoever sets it for another process. `python -m portatrain.system.environment` prints
docs/run/environment.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from portatrain.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Variable(Generic[T]):
    """One variable. `kind`: what a value is, for messages; `otherwise`: what holds where it is not set, in words."""

    name: str
    about: str
    kind: str
    read: Callable[[str], T]
    """Raises ValueError for a value that is not of that kind."""
    default: T
    otherwise: str
    set_by: str

    def get(self, env: Mapping[str, str] | None = None) -> T:
        """Return its value in `env`, by default this process's environment; UserError where that is not of its kind."""
        given = (os.environ if env is None else env).get(self.name)
        if not given:
            return self.default
        try:
            return self.read(given)
        except ValueError:
            raise UserError(
                f"environment variable {self.name}",
                expected=self.kind,
                got=repr(given),
                do=f"Correct it, or unset it; without it: {self.otherwise}.",
            ) from None

    def take(self) -> T:
        """Return its value and remove it from this process's environment, so that no child inherits it."""
        try:
            return self.get()
        finally:
            os.environ.pop(self.name, None)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.strip().lstrip("+-").isdigit()) or len(text) > 18:
        raise ValueError
    if int(text) < least:
        raise ValueError
    return int(text)


def _count(text: str) -> int:
    return _whole(text, 1)


def _number(text: str) -> int:
    return _whole(text, 0)


def _amount(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError
    return value


def _positive(text: str) -> float:
    value = _amount(text)
    if value == 0:
        raise ValueError
    return value


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text] if text in ("0", "1") else _refuse()


def _refuse() -> bool:
    raise ValueError


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError from None
    if not isinstance(found, dict):
        raise ValueError
    return found


YOU, LAUNCHERS, OURSELVES, TORCHRUN = "you", "launchers", "portatrain, for its own processes", "torchrun or launchers"

GRACE_S = Variable[float | None](
    name="PORTATRAIN_GRACE_S",
    about="Seconds from the first signal of a preemption to the kill. Shortly before they are over, a process that is "
    "still saving leaves with the checkpoint before.",
    kind="a number of seconds, at least 0",
    read=_amount,
    default=None,
    otherwise="the trainer takes the time that a save needs",
    set_by="launchers that know it, or you",
)
HANG_S = Variable[float | None](
    name="PORTATRAIN_HANG_S",
    about="Seconds without progress after which an attempt is ended, to be resumed; 0: never.",
    kind="a number of seconds, at least 0",
    read=_amount,
    default=None,
    otherwise="an hour before the first step is done, then 20 times the slowest step and at least 10 minutes",
    set_by="you, or `hang_s` of a Slurm cluster",
)
NOTICES = Variable[str](
    name="PORTATRAIN_NOTICES",
    about="The cloud that this machine is asked about: `gcp` or `aws`, with `=URL` for another address of its metadata "
    "server. A notice of a preemption or of maintenance counts as SIGTERM.",
    kind="gcp, aws, gcp=URL or aws=URL",
    read=str,
    default="",
    otherwise="no cloud is asked",
    set_by="launchers, or you",
)
READ_ONCE = Variable[bool | None](
    name="PORTATRAIN_READ_ONCE",
    about="1: whenever the mesh holds copies of a tensor, processes read it from storage once and exchange it; 0: each "
    "process reads what it holds.",
    kind="one of 0, 1",
    read=_flag,
    default=None,
    otherwise="they exchange from an object store, and from a file system when they are on several hosts",
    set_by=YOU,
)
SAVE_MEMORY_GIB = Variable[float | None](
    name="PORTATRAIN_SAVE_MEMORY_GIB",
    about="Host memory, in GiB, for the copies of the state that a process makes while a save is being written.",
    kind="a number of GiB, such as 2.5",
    read=_amount,
    default=None,
    otherwise="half of the free memory is taken",
    set_by=YOU,
)
SCRATCH = Variable[Path | None](
    name="PORTATRAIN_SCRATCH",
    about="The folder for this machine's copies of runs that are in an object store.",
    kind="a folder",
    read=Path,
    default=None,
    otherwise="`portatrain` in the user's cache folder",
    set_by=YOU,
)
STORE_TIMEOUT_S = Variable[float](
    name="PORTATRAIN_STORE_TIMEOUT_S",
    about="Seconds that one request to an object store may take before it is tried again.",
    kind="a number of seconds, more than 0",
    read=_positive,
    default=60.0,
    otherwise="60",
    set_by=YOU,
)
ATTEMPT = Variable[int | None](
    name="PORTATRAIN_ATTEMPT",
    about="The number of the attempt that the supervisor has begun for this process.",
    kind="a whole number, at least 1",
    read=_count,
    default=None,
    otherwise="the process begins an attempt itself",
    set_by=OURSELVES,
)
CLAIM = Variable[str](
    name="PORTATRAIN_CLAIM",
    about="The token of the claim that the supervisor holds for this process.",
    kind="a token",
    read=str,
    default="",
    otherwise="the process takes the claim itself",
    set_by=OURSELVES,
)
CLUSTER = Variable[dict[str, Any]](
    name="PORTATRAIN_CLUSTER",
    about="JSON for attempt.json that says where the attempt runs: job, engine, cluster, host.",
    kind="a JSON object",
    read=_object,
    default={},
    otherwise="attempt.json names the host alone",
    set_by=OURSELVES,
)
HOSTS = Variable[int](
    name="PORTATRAIN_HOSTS",
    about="How many hosts a JobSet has, over all its slices.",
    kind="a whole number, at least 1",
    read=_count,
    default=1,
    otherwise="1",
    set_by=LAUNCHERS,
)
SLICE_HOSTS = Variable[int | None](
    name="PORTATRAIN_SLICE_HOSTS",
    about="How many hosts a slice of a JobSet has.",
    kind="a whole number, at least 1",
    read=_count,
    default=None,
    otherwise="as many as there are hosts",
    set_by=LAUNCHERS,
)
HOST_PROCESSES = Variable[int](
    name="PORTATRAIN_HOST_PROCESSES",
    about="How many processes a host needs, where its scheduler starts one.",
    kind="a whole number, at least 1",
    read=_count,
    default=1,
    otherwise="1",
    set_by=LAUNCHERS,
)
LOGS = Variable[Path | None](
    name="PORTATRAIN_LOGS",
    about="The folder for the output of the processes, rank-R.log.",
    kind="a folder",
    read=Path,
    default=None,
    otherwise="process 0 writes to the terminal, and of the others only errors are shown",
    set_by=OURSELVES,
)
PARENT = Variable[int | None](
    name="PORTATRAIN_PARENT",
    about="The process that started this one, which ends when that one is gone.",
    kind="the number of a process",
    read=_count,
    default=None,
    otherwise="the process ends by itself",
    set_by=OURSELVES,
)
REPORTS = Variable[Path | None](
    name="PORTATRAIN_REPORTS",
    about="The folder in which a process leaves word of how it failed.",
    kind="a folder",
    read=Path,
    default=None,
    otherwise="it prints its error",
    set_by=OURSELVES,
)
XLA_PYTHON = Variable[Path | None](
    name="PORTATRAIN_XLA_PYTHON",
    about="The Python of an environment with torch-xla, for the benchmarks and the matrix of tests.",
    kind="a file",
    read=Path,
    default=None,
    otherwise="their cells of torch-xla are left out",
    set_by="`make test-xla`, or you",
)
GOLDEN = Variable[str](
    name="PORTATRAIN_GOLDEN",
    about="`write` has the tests write the golden job files anew.",
    kind="write",
    read=str,
    default="",
    otherwise="the tests compare",
    set_by="you, for a change of portatrain itself",
)
RANK = Variable[int](
    name="RANK",
    about="The number of this process among those of the run.",
    kind="a whole number, at least 0",
    read=_number,
    default=0,
    otherwise="0",
    set_by=TORCHRUN,
)
WORLD_SIZE = Variable[int | None](
    name="WORLD_SIZE",
    about="How many processes the run has; it counts only together with RANK.",
    kind="a whole number, at least 1",
    read=_count,
    default=None,
    otherwise="this process is the only one",
    set_by=TORCHRUN,
)
LOCAL_RANK = Variable[int](
    name="LOCAL_RANK",
    about="The number of this process among those of its host.",
    kind="a whole number, at least 0",
    read=_number,
    default=0,
    otherwise="0",
    set_by=TORCHRUN,
)
LOCAL_WORLD_SIZE = Variable[int](
    name="LOCAL_WORLD_SIZE",
    about="How many processes this host has.",
    kind="a whole number, at least 1",
    read=_count,
    default=1,
    otherwise="1",
    set_by=TORCHRUN,
)

VARIABLES: tuple[Variable[Any], ...] = tuple(v for v in list(globals().values()) if isinstance(v, Variable))
"""All of them, as they stand above."""


def whole_number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a number that a scheduler has put into `env`; UserError where it is none, or missing without a default."""
    given = env.get(name)
    if not given and default is not None:
        return default
    try:
        return _whole(given or "", 0)
    except ValueError:
        raise UserError(
            f"environment variable {name}",
            expected="a whole number, as the scheduler sets it",
            got=repr(given) if given is not None else "none",
            do="Look who else sets it; start the run by `launch`, which sets what it needs.",
        ) from None


def page() -> str:
    """Return docs/run/environment.md."""
    out = [
        "# Environment variables",
        "",
        "Written by `python -m portatrain.system.environment > docs/run/environment.md` from the one table in",
        "`portatrain/system/environment.py`. A variable that is set to nothing counts as not set; a value that is not",
        "of its kind ends the command with one paragraph and exit code 2.",
        "",
        "| variable | what it says | a value is | without it | set by |",
        "|---|---|---|---|---|",
    ]
    out += [f"| `{v.name}` | {v.about} | {v.kind} | {v.otherwise} | {v.set_by} |" for v in VARIABLES]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    print(page(), end="")
