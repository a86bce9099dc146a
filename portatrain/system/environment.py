"""Every environment variable that portatrain reads, each with a sentence, a default and a typed reader.

`GRACE_S.get()` returns a value, or raises UserError if it is invalid. An empty variable counts as unset. Code that sets
a variable for another process takes its name from `GRACE_S.name`. `python -m portatrain.system.environment` prints
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
    """One variable. `kind`: a description of valid values, for messages; `otherwise`: the behaviour if it is unset."""

    name: str
    about: str
    kind: str
    read: Callable[[str], T]
    """Converts the text; raises ValueError if it is not a valid value."""
    default: T
    otherwise: str
    set_by: str

    def get(self, env: Mapping[str, str] | None = None) -> T:
        """Return the value in `env`, by default this process's environment; UserError if it is not valid."""
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
        """Return the value and remove the variable from this process's environment, so that no child inherits it."""
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
    about="Seconds from the first signal of a preemption to the kill. A process that is still saving shortly before "
    "the kill exits, and the run keeps its previous checkpoint.",
    kind="a number of seconds, at least 0",
    read=_amount,
    default=None,
    otherwise="the trainer takes as long as the save needs",
    set_by="launchers that know it, or you",
)
HANG_S = Variable[float | None](
    name="PORTATRAIN_HANG_S",
    about="Seconds without progress after which an attempt ends with a resumable exit code; 0: never.",
    kind="a number of seconds, at least 0",
    read=_amount,
    default=None,
    otherwise="an hour before the first step is done, then 20 times the slowest step and at least 10 minutes",
    set_by="you, or `hang_s` of a Slurm cluster",
)
TRACEBACK = Variable[bool](
    name="PORTATRAIN_TRACEBACK",
    about="1: before the paragraph on a mistake in your own code (a model, a hook, a recipe), print its traceback. A "
    "run keeps the traceback in any case, in `attempts/K/error.txt`.",
    kind="0 or 1",
    read=lambda text: text != "0",
    default=False,
    otherwise="the paragraph is printed alone",
    set_by=YOU,
)
NOTICES = Variable[str](
    name="PORTATRAIN_NOTICES",
    about="The cloud whose metadata server is asked for notices: `gcp` or `aws`, with `=URL` for another address of "
    "the server. A notice of a preemption or of maintenance counts as SIGTERM.",
    kind="gcp, aws, gcp=URL or aws=URL",
    read=str,
    default="",
    otherwise="no metadata server is asked",
    set_by="launchers, or you",
)
READ_ONCE = Variable[bool | None](
    name="PORTATRAIN_READ_ONCE",
    about="1: if the mesh has several copies of a tensor, processes read it from storage once and exchange it; 0: each "
    "process reads all of its shards.",
    kind="one of 0, 1",
    read=_flag,
    default=None,
    otherwise="1 for an object store and for a run on several hosts, else 0",
    set_by=YOU,
)
CHECK = Variable[bool](
    name="PORTATRAIN_CHECK",
    about="0: `launch` does not run `portatrain check` for recipes that it has not seen, nor `train` a part of it.",
    kind="one of 0, 1",
    read=_flag,
    default=True,
    otherwise="1",
    set_by=YOU,
)
SAVE_MEMORY_GIB = Variable[float | None](
    name="PORTATRAIN_SAVE_MEMORY_GIB",
    about="Host memory, in GiB, for the copies of the state that a process keeps while a save is being written.",
    kind="a number of GiB, such as 2.5",
    read=_amount,
    default=None,
    otherwise="half of the free memory, over the processes on this host; the limits of its cgroups count",
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
DATA_CACHE = Variable[Path | None](
    name="PORTATRAIN_DATA_CACHE",
    about="The folder, on a disk of this machine, for the pieces of packed stores that are read from an object store.",
    kind="a folder",
    read=Path,
    default=None,
    otherwise="`portatrain/data` in the user's cache folder",
    set_by=YOU,
)
DATA_CACHE_GIB = Variable[float](
    name="PORTATRAIN_DATA_CACHE_GIB",
    about="The most that `PORTATRAIN_DATA_CACHE` holds, in GiB, for all processes of this machine; 0: keep nothing.",
    kind="a number of GiB, such as 2.5",
    read=_amount,
    default=20.0,
    otherwise="20",
    set_by=YOU,
)
PACK_CACHE = Variable[str](
    name="PORTATRAIN_PACK_CACHE",
    about="The folder for packed corpora of text, which other runs of this machine copy instead of packing; `off`: "
    "keep none.",
    kind="a folder, or off",
    read=str,
    default="",
    otherwise="`portatrain/packs` in the user's cache folder",
    set_by=YOU,
)
COMPILE_CACHE = Variable[str](
    name="PORTATRAIN_COMPILE_CACHE",
    about="The folder for compiled programs, which later attempts reuse; `off`: keep none. JAX_COMPILATION_CACHE_DIR "
    "and TORCHINDUCTOR_CACHE_DIR come first.",
    kind="a folder, or off",
    read=str,
    default="",
    otherwise="`portatrain/compiled` in the user's cache folder",
    set_by="`compile_cache` of a cluster, or you",
)
STORE_TIMEOUT_S = Variable[float](
    name="PORTATRAIN_STORE_TIMEOUT_S",
    about="Seconds after which a request to an object store is retried.",
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
    otherwise="the process itself begins an attempt",
    set_by=OURSELVES,
)
CLAIM = Variable[str](
    name="PORTATRAIN_CLAIM",
    about="The token of the claim that the supervisor holds for this process.",
    kind="a token",
    read=str,
    default="",
    otherwise="the process itself takes the claim",
    set_by=OURSELVES,
)
CLUSTER = Variable[dict[str, Any]](
    name="PORTATRAIN_CLUSTER",
    about="JSON for attempt.json with the job, engine, cluster and host of the attempt.",
    kind="a JSON object",
    read=_object,
    default={},
    otherwise="attempt.json names only the host",
    set_by=OURSELVES,
)
HOSTS = Variable[int](
    name="PORTATRAIN_HOSTS",
    about="The number of hosts of a JobSet, over all its slices.",
    kind="a whole number, at least 1",
    read=_count,
    default=1,
    otherwise="1",
    set_by=LAUNCHERS,
)
SLICE_HOSTS = Variable[int | None](
    name="PORTATRAIN_SLICE_HOSTS",
    about="The number of hosts of one slice of a JobSet.",
    kind="a whole number, at least 1",
    read=_count,
    default=None,
    otherwise="all hosts of the JobSet",
    set_by=LAUNCHERS,
)
HOST_PROCESSES = Variable[int](
    name="PORTATRAIN_HOST_PROCESSES",
    about="The number of processes that a host needs, if its scheduler starts only one.",
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
    otherwise="process 0 writes to the terminal; the others show only errors",
    set_by=OURSELVES,
)
PARENT = Variable[int | None](
    name="PORTATRAIN_PARENT",
    about="The process that started this one; when it ends, this process ends too.",
    kind="the PID of a process",
    read=_count,
    default=None,
    otherwise="the process does not watch another one",
    set_by=OURSELVES,
)
REPORTS = Variable[Path | None](
    name="PORTATRAIN_REPORTS",
    about="The folder in which a process stores its error.",
    kind="a folder",
    read=Path,
    default=None,
    otherwise="the process prints its error",
    set_by=OURSELVES,
)
XLA_PYTHON = Variable[Path | None](
    name="PORTATRAIN_XLA_PYTHON",
    about="The Python of an environment with torch-xla, for the benchmarks and the parity matrix.",
    kind="a file",
    read=Path,
    default=None,
    otherwise="their torch-xla cells are skipped",
    set_by="`make test-xla`, or you",
)
GOLDEN = Variable[str](
    name="PORTATRAIN_GOLDEN",
    about="With `write`, the tests write the golden job files again.",
    kind="write",
    read=str,
    default="",
    otherwise="the tests compare",
    set_by="you, for a change of portatrain itself",
)
RANK = Variable[int](
    name="RANK",
    about="The rank of this process among all processes of the run.",
    kind="a whole number, at least 0",
    read=_number,
    default=0,
    otherwise="0",
    set_by=TORCHRUN,
)
WORLD_SIZE = Variable[int | None](
    name="WORLD_SIZE",
    about="The number of processes of the run; it is used only together with RANK.",
    kind="a whole number, at least 1",
    read=_count,
    default=None,
    otherwise="this process is the only one",
    set_by=TORCHRUN,
)
LOCAL_RANK = Variable[int](
    name="LOCAL_RANK",
    about="The rank of this process among the processes of its host.",
    kind="a whole number, at least 0",
    read=_number,
    default=0,
    otherwise="0",
    set_by=TORCHRUN,
)
LOCAL_WORLD_SIZE = Variable[int](
    name="LOCAL_WORLD_SIZE",
    about="The number of processes on this host.",
    kind="a whole number, at least 1",
    read=_count,
    default=1,
    otherwise="1",
    set_by=TORCHRUN,
)

VARIABLES: tuple[Variable[Any], ...] = tuple(v for v in list(globals().values()) if isinstance(v, Variable))
"""All variables, in the order of their definitions."""


def whole_number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a number that a scheduler has set in `env`; UserError if it is invalid, or missing without a default."""
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
            do="Check which other program sets it, or start the run with `launch`, which sets the variables it needs.",
        ) from None


def page() -> str:
    """Return docs/run/environment.md."""
    out = [
        "# Environment variables",
        "",
        "Written by `python -m portatrain.system.environment > docs/run/environment.md` from the one table in",
        "`portatrain/system/environment.py`. An empty variable counts as unset; an invalid value ends the command with",
        "one paragraph and exit code 2.",
        "",
        "| variable | meaning | value | if unset | set by |",
        "|---|---|---|---|---|",
    ]
    out += [f"| `{v.name}` | {v.about} | {v.kind} | {v.otherwise} | {v.set_by} |" for v in VARIABLES]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    print(page(), end="")
