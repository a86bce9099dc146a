"""The run directory: the record of a run, over all its attempts.

run.json            the resolved recipe and its hash; written once
changes.json        the recipes that the run was changed to on purpose (`portatrain.runs.changes`)
claim               the process that writes now; its modification time is the heartbeat
attempts/1/         attempt.json, metrics.jsonl, events.jsonl, rank-0.log ...; then 2/, 3/ ...
jobs/1.json         a job that was submitted to a scheduler; then 2.json ... (`portatrain.runs.jobs`)
checkpoints/        step-00000010/ ... (`portatrain.checkpoint.saver`)
data/               the packed corpus
summary.json        the results, at the end
DONE                written last
CANCELLED           a user or a scheduler cancelled the run
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portatrain.checkpoint.locations import location_of, newest_committed
from portatrain.errors import StorageError, UserError, storage_error
from portatrain.recipe import Recipe
from portatrain.runs import changes, code_snapshot, trust
from portatrain.runs import rows as typed
from portatrain.runs.attempt import Attempt
from portatrain.runs.claim import Claim, ClaimHandle, Owner, in_use, live_owner
from portatrain.runs.events import Kind
from portatrain.system import environment, json_files
from portatrain.system.urls import is_remote

FORMAT = 1


class RunDir:
    """A run directory on a local or shared file system. Creating this object does not touch the disk.

    `portatrain.runs.remote_run_dir.RemoteRun` is a run directory in an object store; `open_run` returns either.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def is_done(self) -> bool:
        """True if the run has finished successfully; reads the record each time."""
        return self.marked("DONE")

    # ---- overridden by `RemoteRun`, for which `path` is a local copy of the record

    @property
    def where(self) -> str:
        """The path or URL, for messages and commands."""
        return str(self.path)

    @property
    def locks(self) -> bool:
        """True if no other process can take the run over inside `Attempt.guard`."""
        return True

    def entries(self) -> list[str] | None:
        """Return the names of the files and folders in the run directory; None if it does not exist."""
        return [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else None

    def refresh(self, *, logs: bool = False) -> None:
        """Fetch the writes of other processes; `logs`: with the output of processes."""

    def looked_at(self) -> RunDir:
        """Return the same run in its current state, for reading."""
        return self

    def owner(self) -> Owner | None:
        """Return the owner of the claim if it appears to be alive; otherwise None."""
        return live_owner(self.path / "claim")

    def acquire(self) -> ClaimHandle:
        """Take the claim; UserError if another process holds it. The directory must exist."""
        return Claim.acquire(self.path / "claim")

    def marked(self, name: str) -> bool:
        """Return True if the run has the mark `name`: DONE or CANCELLED."""
        return (self.path / name).exists()

    def put(self, name: str, data: object, *, once: bool = False) -> bool:
        """Write a JSON file of the run atomically. With `once`, return False and do nothing if the file exists."""
        if once and (self.path / name).exists():
            return False
        json_files.write_json(self.path / name, data)
        return True

    def put_text(self, name: str, text: str) -> None:
        """Write a text file of the run atomically."""
        json_files.write_text(self.path / name, text)

    def remove(self, name: str) -> None:
        """Remove a mark; do nothing if it does not exist."""
        if (self.path / name).exists():
            (self.path / name).unlink(missing_ok=True)
            json_files.sync_folder(self.path)

    def began(self, folder: Path) -> None:
        """Record that this process owns the attempt in `folder`."""

    def send(self) -> None:
        """Upload this attempt's files; return when they are stored."""

    def default_checkpoints(self) -> Path | str:
        """Return the location of checkpoints if none was given."""
        return self.path / "checkpoints"

    def data(self) -> Path:
        """Return the folder of the packed corpus, filled from the record."""
        return self.path / "data"

    def share_data(self) -> None:
        """Upload the packed corpus; return when it is stored."""

    def share_code(self, folder: Path) -> str:
        """Upload the copy of the code in `folder`; return the path or URL by which a job finds it."""
        return str(folder)

    def _writable(self, what: str) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(what, expected="a folder, or an unused name", got="a file", do="Choose another name.")
        _check_writable(what, existing_ancestor(self.path))

    # ---- the same for a folder and an object store

    def check(self, recipe: Recipe, *, cancelled_too: bool = False) -> None:
        """Raise UserError if no attempt at ``recipe`` may begin here. Writes nothing.

        ``cancelled_too``: accept a cancelled run.
        """
        what = f"run directory {self.where}"
        self._writable(what)
        there = self.entries()
        if there is None:
            return
        run = self.looked_at()
        if "run.json" not in there:
            # Left by an attempt that died before it wrote run.json: the corpus is packed first.
            ours = {"claim", "attempts", "data", "jobs", "code"}
            others = sorted(name for name in there if name not in ours and name[0] != ".")
            if others:
                raise UserError(
                    what,
                    expected="an empty folder or a run of portatrain (with a run.json)",
                    got=f"a folder with {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}",
                    do="Choose another name; nothing in it was changed.",
                )
        else:
            changes.wanted(run.path, self.where, recipe, run.committed)
        if not cancelled_too:
            self.check_open(run.goes_on(recipe))
        owner = self.owner()
        if owner is not None and not owner.is_ours:
            raise in_use(self.where, owner)

    def check_open(self, goes_on: bool = False) -> None:
        """Raise UserError if the run is finished or cancelled. `goes_on`: it may be finished, and be trained longer."""
        for mark, state in (("DONE", "finished"), ("CANCELLED", "cancelled")):
            if self.marked(mark) and not (goes_on and mark == "DONE"):
                raise UserError(
                    f"run directory {self.where}",
                    expected="a run that is not over",
                    got=f"one that is {state}",
                    do="Choose another name (launch --run NAME, train --run-dir DIR) to train again."
                    + (
                        " `launch resume` continues a cancelled run."
                        if mark == "CANCELLED"
                        else " More steps (--set steps=N) continue a finished run."
                    ),
                )

    def goes_on(self, recipe: Recipe) -> bool:
        """Return True if `recipe` has more steps than the run, which may be finished."""
        return (self.path / "run.json").exists() and recipe.steps > (changes.current(self.path).get("steps") or 0)

    def committed(self) -> int | None:
        """Return the step of the newest committed checkpoint that is trusted, or None. Only the restore verifies its
        files."""
        return newest_committed(location_of(self.checkpoints()), self.doubted())

    def doubted(self) -> dict[int, str]:
        """Return the checkpoints that are not trusted, with the reasons (`runs/trust.py`)."""
        return trust.doubted(trust.disagreements(self), location_of(self.checkpoints()))

    def change(self, change: changes.Change) -> None:
        """Record a change of the recipe. If it has more steps than a finished run, that run is no longer finished. The
        caller holds the claim."""
        if change.recipe["steps"] > (changes.current(self.path).get("steps") or 0):
            self.remove("DONE")
        self.put(changes.NAME, changes.rows_with(self.path, change))

    def begin(self, recipe: Recipe, info: Mapping[str, Any] | None = None) -> Attempt:
        """Create the directory if it is missing, claim it, and begin the next attempt at ``recipe``.

        ``info`` (backend, mesh, devices ...) goes into attempt.json. Call it when everything else has been validated,
        because it makes the first write.
        """
        self.check(recipe)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            claim = self.acquire()
            try:
                self.check_open(self.goes_on(recipe))  # it may have ended while this process waited for the claim
                return self._begin(recipe, info or {}, claim)
            except BaseException:
                claim.release()
                raise
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UserError:
        kind = UserError if storage_error(error) is None else StorageError
        return kind(
            f"run directory {self.where}",
            expected="a writable folder",
            got=str(error),
            do="Choose another folder, or free some space.",
        )

    def create(self, recipe: Recipe, **more: object) -> None:
        """Write run.json, with the fields `more`, unless it exists. Call `check` first."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        if (self.path / "run.json").exists():
            return
        run = {
            "format": FORMAT,
            "name": self.path.name,
            "id": uuid.uuid4().hex[
                :16
            ],  # identifies the run in a tracker: another folder may have a run of the same name
            "created_unix_s": time.time(),
            "recipe_sha256": recipe.sha256,
            "code_sha256": code_sha256(recipe),
            "recipe": recipe.to_json(),
            **more,
        }
        self.put("run.json", run, once=True)

    def new_attempt(self, claim: ClaimHandle) -> Attempt:
        """Create the folder and the empty record of the next attempt."""
        number = max(self.attempt_numbers(), default=0) + 1
        folder = self.path / "attempts" / str(number)
        folder.mkdir(parents=True)
        self.began(folder)
        return Attempt(self, number, folder, claim)

    def _begin(self, recipe: Recipe, info: Mapping[str, Any], claim: ClaimHandle) -> Attempt:
        self.create(recipe)
        if (change := changes.wanted(self.path, self.where, recipe, self.committed)) is not None:
            self.change(change)
        if claim.adopted:  # the supervisor has created the folder, for its logs
            number = environment.ATTEMPT.get() or max(self.attempt_numbers(), default=1)
            attempt = Attempt(self, number, self.path / "attempts" / str(number), claim)
            self.began(attempt.folder)
        else:
            attempt = self.new_attempt(claim)
        try:
            self._note_begin(attempt, recipe, info, claim)
        except BaseException:
            attempt.abandon()
            raise
        return attempt

    def _note_begin(self, attempt: Attempt, recipe: Recipe, info: Mapping[str, Any], claim: ClaimHandle) -> None:
        number, folder = attempt.number, attempt.folder
        about = {
            "attempt": number,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began_unix_s": time.time(),
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": code_snapshot.versions(),
            "code_sha256": code_sha256(recipe),
        }
        json_files.write_json(folder / "attempt.json", {**about, **environment.CLUSTER.get(), **info})
        if self.run_info().get("code_sha256") != about["code_sha256"]:
            attempt.event(Kind.CODE_DIFFERS, why="it is not the code that the run began with")
        if claim.taken_over is not None:
            dead = claim.taken_over
            attempt.event(Kind.CLAIM_TAKEN_OVER, host=dead.host, pid=dead.pid, claimed_unix_s=dead.claimed_unix_s)
        told = len(self.events(Kind.RECIPE_CHANGED))
        for change in changes.of(self.path)[told:]:
            attempt.event(Kind.RECIPE_CHANGED, step=change.step, fields=change.fields, why=change.reason)
        self.send()

    def checkpoints(self, url: str | None = None) -> Path | str:
        """Return the location of the checkpoints: ``checkpoints`` in the run directory, or the URL in checkpoints.json.

        The first attempt that is given a URL binds it to this run and writes checkpoints.json. Raises UserError for a
        different URL later, and for one that is bound to another run.
        """
        note = self.path / "checkpoints.json"
        stored = json_files.read_object(note).get("url", "") if note.exists() else None
        if stored is not None and not (isinstance(stored, str) and is_remote(stored)):
            raise typed.damaged(note, "no URL of an object store")
        if url is None or url == stored:
            return stored or self.default_checkpoints()
        if stored is not None or "checkpoints" in (self.entries() or ()):
            raise UserError(
                f"--checkpoints {url}",
                expected="the location that the run began with",
                got=f"another one ({stored or self.default_checkpoints()})",
                do="Leave --checkpoints out: the run has stored its location.",
            )
        self._bind(url)
        self.put("checkpoints.json", {"url": url})
        return url

    def check_location(self, url: str | None) -> None:
        """Raise UserError if `url`, or the URL of checkpoints.json, is bound to another run: two runs at one URL would
        replace and remove each other's checkpoints. Call it before the first write."""
        given = url or self.checkpoints()
        if not isinstance(given, str) or given == self.default_checkpoints():
            return
        from portatrain.checkpoint.locations import bound_to

        known = (self.path / "checkpoints.json").exists()
        owner = bound_to(given, fresh=not known)
        if owner is not None and owner.get("run") != self._identity():
            raise _taken(given, owner)

    def _bind(self, url: str) -> None:
        from portatrain.checkpoint.locations import bind

        owner = bind(url, {"run": self._identity(), "name": self.path.name, "run_dir": self.where})
        if owner.get("run") != self._identity():
            raise _taken(url, owner)

    def _identity(self) -> str | None:
        """Return the id of the run, or of a run of an earlier release what else tells it from others."""
        if not (self.path / "run.json").exists():
            return None
        info = self.run_info()
        return str(info.get("id") or f"{info.get('name')} of {info.get('created_unix_s')}")

    def run_info(self) -> dict[str, Any]:
        """Return the content of run.json."""
        return typed.run_info(self.path / "run.json")

    def recipe(self) -> Recipe:
        """Return the resolved recipe that the run has now."""
        return Recipe.from_json(changes.current(self.path))

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json; empty before the end of the run."""
        path = self.path / "summary.json"
        return json_files.read_object(path) if path.exists() else {}

    def attempt_numbers(self) -> list[int]:
        folder = self.path / "attempts"
        names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
        return sorted(n for name in names if (n := json_files.digits(name)) is not None and str(n) == name)

    def rows(self, number: int, name: str) -> list[dict[str, Any]]:
        """Return the rows of one attempt: its ``metrics`` or its ``events``."""
        check = {"metrics": typed.metric, "events": typed.event}[name]
        return json_files.read_lines(self.path / "attempts" / str(number) / f"{name}.jsonl", check)

    def curve(self) -> list[dict[str, Any]]:
        """Return one row for each step, in order, over all attempts; each row has its ``attempt``.

        If an attempt resumes from an earlier step than the last one reached, its rows replace all rows from there on.
        """
        return merge({number: self.rows(number, "metrics") for number in self.attempt_numbers()})

    def events(self, kind: Kind | str | None = None) -> list[dict[str, Any]]:
        """Return the events of all attempts in order, or the events of one kind; each has its ``attempt``."""
        found = [{**row, "attempt": n} for n in self.attempt_numbers() for row in self.rows(n, "events")]
        return [row for row in found if kind in (None, row.get("event"))]


def _taken(url: str, owner: Mapping[str, Any]) -> UserError:
    return UserError(
        f"--checkpoints {url}",
        expected="a URL for this run alone",
        got=f"that of {owner.get('run_dir') or 'another run'}",
        do="Give each run a URL of its own, such as that one with the name of the run added.",
    )


def merge(attempts: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the curve (see ``RunDir.curve``) of rows already read: attempt number -> its rows."""
    curve: list[dict[str, Any]] = []
    for number in sorted(attempts):
        rows = attempts[number]
        if rows:
            first = min(row["step"] for row in rows)
            curve = [row for row in curve if row["step"] < first]
            curve += [{**row, "attempt": number} for row in rows]
    return curve


def code_sha256(recipe: Recipe) -> str:
    """Return the SHA-256, in hex, of the source of this package and of the modules with the recipe's classes."""
    package = Path(str(importlib.resources.files("portatrain")))
    sources = {f"portatrain/{path.relative_to(package)}": path for path in package.rglob("*.py")}
    for value in (recipe.model, recipe.data, recipe.optimizer, recipe.schedule, *recipe.hooks):
        module = sys.modules.get(getattr(value, "__module__", ""))
        file = getattr(module, "__file__", None)
        if module is not None and file and not module.__name__.startswith("portatrain."):
            sources[module.__name__] = Path(file)
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + hashlib.sha256(sources[name].read_bytes()).digest())
    return digest.hexdigest()


def existing_ancestor(path: Path) -> Path:
    """Return `path`, or the nearest folder or file above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _check_writable(what: str, folder: Path) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            what,
            expected="a writable folder",
            got=f"no permission to write in {folder}" if folder.is_dir() else f"{folder}, which is a file",
            do="Choose another folder, or change the permissions.",
        )
