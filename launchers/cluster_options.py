"""The options of a cluster in clusters.toml: what each means, and how a launcher reads and checks them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from portatrain.errors import UserError, choice
from portatrain.runs.jobs import Job
from portatrain.system import environment


@dataclass(frozen=True)
class Option:
    """One option of a cluster. The reference page of all options is made from these."""

    meaning: str
    kinds: tuple[type, ...] = (str,)
    """The types of a valid value."""
    default: object = ""
    """The value, or words for it, if the option is left out; '': nothing is asked for then."""
    example: str = ""
    """A value as it is written in TOML, for an option that a cluster cannot do without."""


GENERAL: dict[str, Option] = {
    "backend": Option("the backend", default="the backend of the chip's software"),
    "mesh": Option("the mesh, as in fsdp=8,tensor=2", default="the planned mesh"),
    "devices": Option("the number of devices", (int,), "the devices of the cluster"),
    "hosts": Option("the number of hosts", (int,), "the hosts of the cluster"),
    "processes": Option(
        "the number of processes, over all hosts", (int,), "one for each device on torch and DeepSpeed, else one a host"
    ),
}
"""Options of a cluster that are not for its engine: they replace what the plan says."""
SHARED: dict[str, Option] = {
    "compile_cache": Option(
        "the folder for compiled programs, or off", default="portatrain/compiled in the user's cache"
    )
}
"""Options for the engine that every launcher has."""


def option(job: Job, name: str, kind: type, default: Any = None) -> Any:
    """Return an option of the job's cluster; UserError if it has another type."""
    value = job.options.get(name, default)
    if value is None or _is(value, kind):
        return value
    raise _wrong_type(job, name, value, kind)


def variables(job: Job) -> dict[str, str]:
    """Return the environment variables of the job's processes: the options `env` and `compile_cache` of its cluster.

    Raises:
        UserError: a name that no variable can have, or values that are not in the record.
    """
    found = option(job, "env", dict, {})
    for name, value in found.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)) or "\0" in str(value):
            raise UserError(
                f"cluster {job.cluster}: option env",
                expected="names of letters, digits and _, and values without a byte 0",
                got=repr(name),
                do="Correct it in clusters.toml.",
            )
        if value is None:
            raise UserError(
                f"cluster {job.cluster}: variable {name} of option env",
                expected="a value: only the account and the machine that submitted the job have it",
                got="none in the record",
                do=f"Read the values from your clusters.toml: launch resume {job.run} --cluster {job.cluster}",
            )
    cache = option(job, "compile_cache", str)
    placed = {environment.COMPILE_CACHE.name: cache} if cache else {}
    return {**placed, **{name: str(value) for name, value in found.items()}}


def check_options(job: Job, known: Mapping[str, Option | str]) -> None:
    """Check the options of the job's cluster. `known` has the launcher's own, each with its meaning.

    Raises:
        UserError: an option that neither the launcher nor every launcher knows, one of another type, one that is
            missing, or a variable in `env` that cannot be set.
    """
    known = {**known, **SHARED}
    for name, value in job.options.items():
        if name not in known:
            raise choice(f"cluster {job.cluster}: option {name!r} of {job.engine}", name, known)
        one = known[name]
        if isinstance(one, Option) and value is not None and not any(_is(value, kind) for kind in one.kinds):
            raise _wrong_type(job, name, value, *one.kinds)
    for name, one in known.items():
        if isinstance(one, Option) and one.example and job.options.get(name) is None:
            raise missing(job, name, one.meaning, one.example)
    variables(job)


def missing(job: Job, name: str, meaning: str, example: str) -> UserError:
    """Return the error for an option that the cluster does not have and the job needs."""
    return UserError(
        f"cluster {job.cluster}: option {name}",
        expected=meaning,
        got="none",
        do=f"Add it in clusters.toml: options = {{ {name} = {example} }}.",
    )


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))


def _wrong_type(job: Job, name: str, value: object, *kinds: type) -> UserError:
    return UserError(
        f"cluster {job.cluster}: option {name}",
        expected=f"a {' or '.join(kind.__name__ for kind in kinds)}",
        got=repr(value),
        do="Correct it in clusters.toml.",
    )
