"""Go on from a checkpoint of RUN in a new run, with another recipe if you say so. RUN stays as it is.

The new run begins after step STEP of RUN, with the state and the data position of that step; --set changes its recipe
from there on. Its record holds its parent, the step, and every field that differs with both values; its first attempt
adds what the change alone did to loss, gradient and update, measured on the state of that step. Without --set it goes
on as RUN did. `launch list` and `portatrain report` draw the tree.

A checkpoint holds tensors of fixed shapes, so sizes of the model stay. Slots of the optimizer are kept if its class
stays, mapped if every slot of the new class has its meaning in the old one, and else start as in a new run. The files
of the checkpoint are hard links where the file system has them, so a fork costs no storage until it saves.

This command trains nothing and needs no device: `launch resume NEW` trains the fork, here or on a cluster.

examples:
  portatrain fork tiny-lm --at 800 --set optimizer.lr=1e-4 --run tiny-lm-slow
  portatrain fork tiny-lm --at 800 --set schedule=WSD --set schedule.decay=200 --set steps=1000 --run tiny-lm-cooled
  portatrain fork tiny-lm --at 800 --set data.seq_len=1024 --set batch=2 --run tiny-lm-long --dry-run
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.commands import options
from portatrain.commands.recorded import check_data, goes_on, recipe_file, recorded_jobs
from portatrain.commands.submit import run_path
from portatrain.errors import UserError
from portatrain.recipe import Recipe, load_recipe
from portatrain.recipe.changing import Kind, changed, difference
from portatrain.runs import changes
from portatrain.runs.commits import BEGUN_FROM
from portatrain.runs.open import find, open_run
from portatrain.runs.run_dir import RunDir, code_sha256
from portatrain.system.text import si

if TYPE_CHECKING:
    from checkpoints_format import Store
    from portatrain.checkpoint.locations import Location

CHUNK = 64 << 20
SOURCE = ("backend", "mesh", "devices", "track")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    parser.add_argument(
        "--at", metavar="STEP", type=int, required=True, help="the step of a committed checkpoint of RUN to go on from"
    )
    options.add_changes(parser)
    parser.add_argument("--run", dest="new", metavar="NEW", required=True, help="the name of the new run, in --runs")
    parser.add_argument("--reason", metavar="TEXT", default="", help="why; it is recorded")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--dry-run", action="store_true", help="print what would change, without writing anything")


def run(args: argparse.Namespace) -> int:
    parent = find(args.run, args.runs)
    new = open_run(run_path(args.new, args.runs), work=True)
    if (there := new.entries()) is not None:
        raise UserError(
            f"run {args.new}",
            expected="a name for a new run",
            got=f"a folder that exists, with {', '.join(sorted(there)[:4]) or 'nothing in it'}",
            do="Choose another --run; nothing in it was changed.",
        )
    source = _at(parent, args.at)
    job = next(iter(reversed(recorded_jobs(parent))), None)
    if job is not None:  # the classes of a recipe file are found once it is loaded
        load_recipe(recipe_file(job), cwd=Path(job.cwd or "."))
    old = Recipe.from_json(changes.from_step(parent.path, args.at))
    recipe = changed(old, args.overrides, args.at)
    found = difference(old, recipe, args.at, since=changes.last_decided(parent.path))
    _check_left(recipe, args.at)
    state = goes_on(source, args.at, recipe, old)
    about: dict[str, Any] = {
        "run": parent.path.name,
        "where": parent.where,
        "id": parent.run_info().get("id"),
        "step": args.at,
        "fields": found.as_json(),
        "past": "kept" if not found.decides else found.unproved or "changed from here on",
        "reason": args.reason,
        "overrides": list(args.overrides),
        "state": state,
        "code_sha256": parent.run_info().get("code_sha256"),
        "recipe": old.to_json(),
    }
    if not args.dry_run:
        info = parent.run_info()
        more: dict[str, Any] = {
            changes.PARENT: about,
            BEGUN_FROM: {"fork": parent.where, "step": args.at},
            changes.GIVEN: info.get(changes.GIVEN) or info["recipe"],
        }
        if job is not None:
            # What a cluster's job was given says nothing of this machine; --cluster plans it anew.
            words = {name: getattr(job, name) for name in SOURCE if job.engine == "local" or name == "track"}
            words |= {"recipe": job.source or job.recipe, "overrides": list(job.overrides), "cwd": job.cwd}
            more[changes.SOURCE] = words
        keeps_corpus = not found.named(Kind.CORPUS)
        _write(parent, source, new, recipe, args.at, more, keeps_corpus=keeps_corpus)
    _print(about, args, new, same_code=about["code_sha256"] == code_sha256(recipe))
    return 0


def _print(about: dict[str, Any], args: argparse.Namespace, new: RunDir, *, same_code: bool) -> None:
    if args.json:
        shown = {name: value for name, value in about.items() if name != "recipe"}
        print(json.dumps({"fork": args.new, "run_dir": new.where, "parent": shown, "written": not args.dry_run}))
        return
    print(f"{args.new} goes on from step {about['step']} of {about['run']}")
    for name, (was, now) in sorted(about["fields"].items()):
        print(f"  {name}: {was!r} -> {now!r}")
    if not about["fields"]:
        print("  with the same recipe")
    print(f"  slots of the optimizer: {about['state']['optimizer']}")
    if about["fields"] and not about["state"]["probe"]:
        print("  the checkpoint has no probe (probe_every), so there will be no figures from before the change")
    if not same_code:
        print(f"  the code here is not the code that {about['run']} began with; the fork takes the code here")
    if not args.dry_run:
        name = args.new if args.runs == "runs" else new.where
        print(f"\nrun directory    {new.where}\nlaunch resume {name}   trains it")


def _at(parent: RunDir, step: int) -> Location:
    """Return the location of the checkpoints of `parent`; UserError unless it has a commit of `step`."""
    from portatrain.checkpoint.errors import explained
    from portatrain.checkpoint.locations import location_of

    with explained():
        location = location_of(parent.checkpoints())
        if step in location.steps() and location.committed(step):
            return location
        there = [s for s in location.steps() if location.committed(s)]
    kept = f"Those of step {', '.join(map(str, there))} are there" if there else "None is there"
    raise UserError(
        f"--at {step}",
        expected=f"the step of a committed checkpoint of {parent.path.name}",
        got="a step without one: it was not saved, or has been removed since",
        do=f"{kept}. checkpoint_keep_every and checkpoint_keep of the recipe say which ones a run keeps.",
    )


def _check_left(recipe: Recipe, step: int) -> None:
    if recipe.steps <= step:
        raise UserError(
            f"--at {step}",
            expected=f"a step before the last one, {recipe.steps}",
            got="a fork that has nothing left to train",
            do=f"Give it more steps: --set steps={2 * step}.",
        )


# ---- what is written


def _write(
    parent: RunDir,
    source: Location,
    new: RunDir,
    recipe: Recipe,
    step: int,
    more: dict[str, Any],
    *,
    keeps_corpus: bool,
) -> None:
    """Write the new run: run.json, the packed corpus, the checkpoint. COMMIT is last, so half a fork is no run."""
    from portatrain.checkpoint.errors import explained
    from portatrain.checkpoint.locations import location_of

    new.check(recipe)
    try:
        new.create(recipe, **more)
        if keeps_corpus and (packed := parent.data()).is_dir():
            shutil.copytree(packed, new.path / "data", copy_function=_linked)
            check_data(recipe, new.path / "data")
            new.share_data()
        with explained():
            copy_checkpoint(source, location_of(new.checkpoints()), step)
    except BaseException:
        if new.locks:  # a folder; what is in a store stays, and its COMMIT is missing
            shutil.rmtree(new.path, ignore_errors=True)
        raise


def copy_checkpoint(source: Location, target: Location, step: int) -> None:
    """Copy the checkpoint of `step`, COMMIT last. Files of one file system become hard links: no file of a checkpoint
    is ever written twice."""
    from checkpoints_format import LocalStore
    from checkpoints_format.store import read_small

    with contextlib.closing(source.open(step)) as old, contextlib.closing(target.open(step, create=True)) as new:
        sizes = {name: size for name in old.list() if name != "COMMIT" and (size := old.size(name)) is not None}
        say = _progress(sum(sizes.values()))
        for name, size in sizes.items():
            if not (isinstance(old, LocalStore) and isinstance(new, LocalStore)) or not _link(
                old.path / name, new.path / name
            ):
                with _Chunks(old, name, size, say) as chunks:
                    new.put(name, chunks, size)
        new.put_if_absent("COMMIT", read_small(old, "COMMIT", CHUNK))


class _Chunks:
    """The chunks of a file, read by a thread: a store that writes to the network cannot read from it in between."""

    def __init__(self, store: Store, name: str, size: int, say: Callable[[int], None]) -> None:
        self._ready: queue.Queue[memoryview | BaseException] = queue.Queue(maxsize=2)
        self._left, self._over = size, threading.Event()
        self._thread = threading.Thread(target=self._read, args=(store, name, size, say), name="portatrain-fork")
        self._thread.start()

    def _read(self, store: Store, name: str, size: int, say: Callable[[int], None]) -> None:
        for at in range(0, size, CHUNK):
            part: memoryview | BaseException = memoryview(bytearray(min(CHUNK, size - at)))
            try:
                store.read_into(name, at, [part])  # type: ignore[list-item]
                say(min(CHUNK, size - at))
            except BaseException as error:
                part = error
            while not self._over.is_set():
                with contextlib.suppress(queue.Full):
                    self._ready.put(part, timeout=0.1)
                    break
            if self._over.is_set() or isinstance(part, BaseException):
                return

    def __iter__(self) -> Iterator[memoryview]:
        while self._left > 0:
            part = self._ready.get()
            if isinstance(part, BaseException):
                raise part
            self._left -= len(part)
            yield part

    def __enter__(self) -> _Chunks:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target, follow_symlinks=False)
        return True
    except OSError:  # another file system, or one without hard links
        return False


def _linked(source: str, target: str) -> str:
    return target if _link(Path(source), Path(target)) else shutil.copy2(source, target)


def _progress(total: int) -> Callable[[int], None]:
    """Return a function that counts bytes, and prints a line every few seconds."""
    done, said_s = 0, time.monotonic()

    def say(nbytes: int) -> None:
        nonlocal done, said_s
        done += nbytes
        if time.monotonic() - said_s > 3.0:
            said_s = time.monotonic()
            print(f"copied {si(done)}B of {si(total)}B", file=sys.stderr)

    return say
