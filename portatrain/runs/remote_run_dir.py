"""A run directory in an object store: s3://bucket/runs/NAME, gs://, az://.

The store has the record. Every process works on a copy in a folder of its machine (`scratch`), so code that reads or
appends to files is the same as on a file system. The objects that must be atomic (the claim, run.json, the numbers of
jobs) are written directly to the store with conditional puts. DONE and CANCELLED are uploaded at once. The process with
the claim uploads the files of its attempt every few seconds and before every commit, so that no checkpoint is newer
than its metrics.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs import code_snapshot, remote_claim, tasks
from portatrain.runs.claim import BEAT_S, ClaimHandle, Owner
from portatrain.runs.run_dir import RunDir
from portatrain.system import environment, json_files
from portatrain.system.exit_codes import MISTAKE
from portatrain.system.object_store import Objects
from portatrain.system.paths import cache_folder
from portatrain.system.urls import is_remote

SEND_S = 10.0
SHARE = 20.0
"""Seconds between uploads, or SHARE times the duration of an upload if that is longer: a store cannot append, so each
upload sends whole files."""
TAGS = ".tags.json"
PACK = "pack.json"
"""The file that makes a packed corpus whole: it is sent and fetched after all the others."""
MARKS = ("DONE", "CANCELLED")


class RemoteRun(RunDir):
    """See `RunDir`. `path` is the copy on this machine.

    work: True in a process that trains the run, or starts one that does. Otherwise the process only reads: it has a
    separate copy, which is as old as this object or as the last `refresh`.
    """

    def __init__(self, url: str, *, work: bool = False) -> None:
        self.url = url.rstrip("/")
        name = self.url.rpartition("/")[2]
        if not name or self.url.count("/") < 3:
            raise UserError(
                f"run directory {url}",
                expected="a bucket and a name below it, as in s3://bucket/runs/NAME",
                got="no name",
                do="Add one.",
            )
        kind = "work" if work else "view"
        super().__init__(scratch() / kind / hashlib.sha256(self.url.encode()).hexdigest()[:12] / name)
        self.objects, self._work = Objects(self.url), work
        self._sent: dict[str, tuple[int, int]] = {}
        self._sending, self._next_s, self._attempt = threading.Lock(), 0.0, ""
        if work:
            self._forget_another_run()
        else:
            self.refresh()

    # ---- what the store has

    @property
    def where(self) -> str:
        return self.url

    @property
    def locks(self) -> bool:
        return False  # see portatrain/runs/remote_claim.py

    def entries(self) -> list[str] | None:
        objects, folders = self.objects.top()
        found = [*(o.name for o in objects), *(f for f in folders if f != "clock")]
        return found or None

    def refresh(self, *, logs: bool = False) -> None:
        """Update the copy from the store; `logs`: with the output of processes."""
        top, folders = self.objects.top()
        there = {o.name: o.tag for o in top if o.name != remote_claim.NAME}
        for folder in ("attempts", "jobs", tasks.FOLDER):
            if folder in folders:
                there |= {o.name: o.tag for o in self.objects.below(folder)}
        wanted = {n: tag for n, tag in there.items() if _is_record(n) or (logs and n.endswith((".log", ".txt")))}
        self.path.mkdir(parents=True, exist_ok=True)
        index, known = self.path / TAGS, {}
        with contextlib.suppress(UserError):  # a damaged index of a copy: all is fetched again
            known = json_files.read_object(index) if index.exists() else {}
        for name in set(known) - set(there):
            (self.path / name).unlink(missing_ok=True)
        kept = {n: tag for n, tag in known.items() if n in there}
        for name, tag in sorted(wanted.items()):
            # A crash may have left less of a file than the index says.
            if kept.get(name) != tag or not _has(self.path / name, _size(tag)):
                self._fetch(name)
                written_s = float(tag.rpartition(" ")[2])
                os.utime(self.path / name, (written_s, written_s))
                kept[name] = tag
        json_files.write_json(index, kept)

    def _forget_another_run(self) -> None:
        """Remove the copy on this machine if it is of a run that was deleted in the store.

        Another one may have been begun there under its name since: `run.json` tells, by its id.
        """
        if not self.path.exists():
            return
        found, here = self.objects.get("run.json"), self.path / "run.json"
        if found is not None and not here.exists():  # a copy of before the run was begun, or of its code alone
            return
        with contextlib.suppress(UserError, ValueError, AttributeError):
            if found is not None and json_files.loads(found[0]).get("id") == json_files.read_object(here).get("id"):
                return
        if found is None and not here.exists() and not (self.path / "attempts").exists():
            return
        # Renamed first, so that a second process of this host finds all of it or nothing.
        forgotten = self.path.with_name(f".forgotten-{secrets.token_hex(6)}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(forgotten)
            shutil.rmtree(forgotten)

    def create(self, recipe: Recipe, **more: object) -> None:
        if not self.objects.exists("run.json"):  # whatever a copy on this machine says
            (self.path / "run.json").unlink(missing_ok=True)
        super().create(recipe, **more)

    def _fetch(self, name: str) -> None:
        path = self.path / name
        if ".." in path.parts:
            raise UserError(
                f"object {self.url}/{name}",
                expected="a name that portatrain wrote",
                got="one that points outside the run directory",
                do="Check which other program writes there.",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".fetched-{secrets.token_hex(6)}")
        try:
            self.objects.fetch(name, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def owner(self) -> Owner | None:
        return remote_claim.live_owner(self.objects)

    def marked(self, name: str) -> bool:
        return self.objects.exists(name)

    def default_checkpoints(self) -> Path | str:
        return f"{self.url}/checkpoints"

    def looked_at(self) -> RunDir:
        return RemoteRun(self.url) if self._work else self

    def _writable(self, what: str) -> None:
        """Do nothing: only the first write shows if the store can be written to."""

    # ---- what is written

    def put(self, name: str, data: object, *, once: bool = False) -> bool:
        text = (json.dumps(json_files.strict(data), indent=2, allow_nan=False) + "\n").encode()
        if once:
            if self.objects.create(name, text) is None:
                return False
        else:
            self.objects.put(name, text)
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        json_files.write_json(path, data)
        return True

    def put_text(self, name: str, text: str) -> None:
        self.objects.put(name, text.encode())
        super().put_text(name, text)

    def remove(self, name: str) -> None:
        self.objects.delete(name)
        (self.path / name).unlink(missing_ok=True)

    def acquire(self) -> ClaimHandle:
        over = threading.Event()
        claim = remote_claim.RemoteClaim.acquire(self.objects, over.set)
        if not claim.adopted:  # an adopted claim: this process shares the supervisor's copy
            try:
                for name in ("attempts", TAGS, *MARKS):  # files here that were never uploaded are not in the record
                    path = self.path / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                self.refresh()
            except BaseException:
                claim.release()
                raise
            threading.Thread(target=self._serve, args=(over,), name="portatrain-record", daemon=True).start()
        return claim

    def _serve(self, over: threading.Event) -> None:
        """Upload files and look for a cancellation until the claim is released."""
        while not over.wait(BEAT_S):
            with contextlib.suppress(UserError, OSError):  # retried in the next round
                if not (self.path / "CANCELLED").exists() and self.objects.exists("CANCELLED"):
                    self._fetch("CANCELLED")  # the watchdog looks for this file
                if time.monotonic() >= self._next_s:
                    self.send()

    def began(self, folder: Path) -> None:
        self._attempt = str(folder.relative_to(self.path))
        self.send()

    def send(self) -> None:
        began_s = time.monotonic()
        with self._sending:
            attempt = self.path / (self._attempt or "attempts/0")
            profiles = attempt.glob("plugins/**/*")
            for path in [*attempt.glob("*"), *profiles, *self.path.glob("jobs/*.log")]:
                if not path.is_file() or path.name[0] == ".":
                    continue
                stat = path.stat()
                name, now = str(path.relative_to(self.path)), (stat.st_mtime_ns, stat.st_size)
                if self._sent.get(name) != now:
                    self.objects.put(name, path.read_bytes())
                    self._sent[name] = now
        now_s = time.monotonic()
        self._next_s = now_s + max(SEND_S, SHARE * (now_s - began_s))

    # ---- data and code

    def data(self) -> Path:
        # On a host that begins no attempt, nothing else downloads these.
        for name in ("run.json", "checkpoints.json"):
            if not (self.path / name).exists() and self.objects.exists(name):
                self._fetch(name)
        there = {o.name: _size(o.tag) for o in self.objects.below("data")}
        for name in sorted(there, key=_pack_json_last):
            # A pack without its pack.json was cut while it was sent: it is packed again here.
            if f"{name.rpartition('/')[0]}/{PACK}" in there and not _has(self.path / name, there[name]):
                self._fetch(name)
        return self.path / "data"

    def share_data(self) -> None:
        there = {o.name for o in self.objects.below("data")}
        files = [p for p in (self.path / "data").rglob("*") if p.is_file() and p.name[0] != "."]
        for name in sorted((str(p.relative_to(self.path)) for p in files), key=_pack_json_last):
            # What another process sent and did not finish may come from other files of the source.
            if name not in there or f"{name.rpartition('/')[0]}/{PACK}" not in there:
                self.objects.put(name, self.path / name)

    def share_code(self, folder: Path) -> str:
        name = f"code/{folder.name}.tar"
        if not self.objects.exists(name):
            with tempfile.TemporaryDirectory() as scratch_dir:
                tar = Path(scratch_dir, "code.tar")
                code_snapshot.archive(folder, tar)
                self.objects.put(name, tar)
        return f"{self.url}/code/{folder.name}"


def scratch() -> Path:
    """Return the folder for this machine's copies; create it if it is missing."""
    given = environment.SCRATCH.get()
    folder = given if given is not None else cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.absolute()
    except OSError as error:
        raise UserError(
            f"folder {folder}",
            expected="a writable folder for this machine's copy of a run in an object store",
            got=str(error),
            do=f"Set {environment.SCRATCH.name} to a writable folder.",
        ) from error


def run_names(where: str) -> list[str]:
    """Return the names of the runs below a URL."""
    there = Objects(where)
    return sorted(n for n in there.top()[1] if there.exists(f"{n}/run.json"))


def local_code(url: str) -> Path:
    """Return the folder with a run's code, downloaded if necessary; `url` is the result of `share_code`."""
    base, _, name = url.rpartition("/code/")
    run = RemoteRun(base, work=True)
    folder = run.path / "code" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".code-", dir=folder.parent) as scratch_dir:
            tar, made = Path(scratch_dir, "code.tar"), Path(scratch_dir, "code")
            run.objects.fetch(f"code/{name}.tar", tar)
            code_snapshot.extract(tar, made, name)
            with contextlib.suppress(OSError):  # another process of this machine has just created it
                made.rename(folder)
    return folder


def localized(words: Iterable[str], code: str | None) -> list[str]:
    """Replace the URL of a run's code in the words of a command by its folder on this machine."""
    if code is None or not is_remote(code):
        return list(words)
    folder = str(local_code(code))
    return [folder + w[len(code) :] if w.startswith(code) else w for w in words]


def _pack_json_last(name: str) -> tuple[bool, str]:
    return name.endswith(f"/{PACK}"), name


def _size(tag: str) -> int:
    """Return the bytes of an object with this tag."""
    return int(tag.rsplit(" ", 2)[1])


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_record(name: str) -> bool:
    parts = name.split("/")
    if len(parts) == 1:
        return name.endswith(".json") or name in MARKS
    return name.endswith((".json", ".jsonl")) and len(parts) == (3 if parts[0] == "attempts" else 2)


def main() -> None:
    """Run `python -m portatrain.runs.remote_run_dir CODE COMMAND...`: COMMAND with a run's code from a store."""
    code, *words = sys.argv[1:]
    try:
        folder = local_code(code)
        words = localized(words, code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    os.execvpe(words[0], words, env)


if __name__ == "__main__":
    main()
