"""Check CLUSTER for problems that would break a run, and explain how to fix them. Leaves no changes behind.

examples:
  launch doctor local
  launch doctor lab-h100 --runs /shared/runs
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from portatrain.commands import options
from portatrain.errors import UserError
from portatrain.runs.run_dir import existing_ancestor
from portatrain.system.urls import is_remote

if TYPE_CHECKING:
    from launchers.targets import Target

Finding = tuple[str, str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cluster", metavar="CLUSTER", help="local, or a cluster of clusters.toml")
    options.add_runs(parser, "for")


def run(args: argparse.Namespace) -> int:
    from launchers import targets
    from launchers.base import launcher

    (target,) = targets.targets([args.cluster], "", mesh=None, devices=None, backend=None)
    if not target.engine:
        raise UserError(
            f"cluster {args.cluster}",
            expected="one of clusters.toml, with an engine",
            got="a name of the catalog",
            do="Configure it; `launch --cluster NAME RECIPE --dry-run` shows how.",
        )
    worst = 0
    remote = is_remote(args.runs)
    for what, level, text in [
        *software(),
        *(in_store(args.runs) if remote else in_folder(Path(args.runs))),
        *cluster_options(target),
        *launcher(target.engine).doctor(target.options, None if remote else Path(args.runs)),
    ]:
        print(f"{level:<5} {what}: {text}", flush=True)
        worst = max(worst, {"ok": 0, "warn": 0, "bad": 1}[level])
    return worst


def cluster_options(target: Target) -> Iterator[Finding]:
    """Check the options of the cluster, as `launch` does before it submits."""
    from launchers.base import Job, check_options, launcher

    job = Job(run_dir="", recipe="", cluster=target.name, engine=target.engine, options=target.options)
    try:
        check_options(job, launcher(target.engine).options)
    except UserError as error:
        yield "options", "bad", str(error)


def software() -> Iterator[Finding]:
    """Check the versions of Python and of the frameworks on this machine."""
    found = []
    for name in ("jax", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    level = "ok" if found else "bad"
    text = ", ".join(found) or "neither jax nor torch is installed: pip install 'portatrain[jax]'"
    yield "software", level, f"Python {sys.version.split()[0]}, {text}"


def in_store(url: str) -> Iterator[Finding]:
    """Check that conditional puts work at `url`: claims and commits need puts that fail if the object has changed."""
    from portatrain.system.object_store import Objects

    name = f".doctor-{secrets.token_hex(6)}"
    try:
        objects = Objects(url)
        first = objects.create(name, b"1")
        second = objects.replace(name, b"2", first) if first else None
        fenced = second and not objects.create(name, b"3") and not objects.replace(name, b"4", first or {})
        objects.delete(name)
        seen = not objects.exists(name)
    except UserError as error:
        yield "storage", "bad", str(error)
        return
    if fenced and seen:
        yield "storage", "ok", f"{url} is writable, and conditional puts work"
    else:
        yield (
            "storage",
            "bad",
            f"{url} accepts conditional puts that it should refuse; no run is safe there: use another store",
        )


def in_folder(runs: Path) -> Iterator[Finding]:
    """Check that the folder `runs` of this machine can have run directories."""
    folder = existing_ancestor(runs)
    if not os.access(folder, os.W_OK | os.X_OK):
        yield (
            "storage",
            "bad",
            f"no permission to write in {folder}: choose another --runs, or change the permissions",
        )
        return
    yield "storage", *_links(folder)
    free = shutil.disk_usage(folder).free
    yield "space", "ok" if free > 1 << 30 else "warn", f"{free / 2**30:.1f} GiB free in {folder}"


def _links(folder: Path) -> tuple[str, str]:
    """Check that claims and commits work in `folder`: they need locks, and links that fail if the name exists."""
    import fcntl

    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
        a, b = Path(scratch, "a"), Path(scratch, "b")
        a.write_text("a")
        try:
            with a.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.link(a, b)
        except OSError as error:
            return "bad", f"{folder} cannot lock or link ({error}): put --runs on another file system"
        try:
            os.link(a, b)
            return ("bad", f"{folder}: a link over a name that exists succeeded: put --runs on another file system")
        except FileExistsError:
            return "ok", f"files in {folder} can be written, locked and linked"
