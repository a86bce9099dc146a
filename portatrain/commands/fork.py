"""Go on from a checkpoint of RUN in a new run, with another recipe if you say so. RUN stays as it is.

The new run begins after step STEP of RUN, with the state and the data position of that step; --set changes its recipe
from there on. Its record holds its parent, the step, and every field that differs with both values; its first attempt
adds what the change alone did to loss, gradient and update, measured on the state of that step. Without --set it goes
on as RUN did. `launch list` and `portatrain report` draw the tree.

A checkpoint holds tensors of fixed shapes, so sizes of the model stay, unless --surgery says how the tensors of the
model that --set gives are made of those that are there: vocabulary, layers, width (feed-forward, heads), embed (whole
multiples), experts (of a dense feed-forward part), qk-norm, rope, merge-lora, drop-lora, or a function of yours as
FILE.py:FUNCTION. Both models are then computed in float64 on the next samples of RUN; the largest difference of their
logits is printed and recorded, and a surgery that keeps the function is refused if they differ by more than 1e-12 of
the largest one.

Slots of the optimizer are kept if its class stays, mapped if every slot of the new class has its meaning in the old
one, and else start as in a new run. The files of the checkpoint are hard links where the file system has them, so a
fork without surgery costs no storage until it saves.

This command trains nothing and needs no device: `launch resume NEW` trains the fork, here or on a cluster.

examples:
  portatrain fork tiny-lm --at 800 --set optimizer.lr=1e-4 --run tiny-lm-slow
  portatrain fork tiny-lm --at 800 --set schedule=WSD --set schedule.decay=200 --set steps=1000 --run tiny-lm-cooled
  portatrain fork tiny-lm --at 800 --set data.seq_len=1024 --set batch=2 --run tiny-lm-long --dry-run
  portatrain fork tiny-lm --at 800 --set model.layers=6 --set steps=1200 --surgery layers --run tiny-lm-deep
  portatrain fork tiny-lm --at 800 --set lora=none --surgery merge-lora --run tiny-lm-merged
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portatrain.commands import options
from portatrain.commands.recorded import check_data, goes_on, recipe_file, recorded_jobs, saved_under
from portatrain.commands.submit import run_path
from portatrain.commands.surgery import Done, operating, progress
from portatrain.errors import UserError
from portatrain.recipe import Recipe, load_recipe
from portatrain.recipe.changing import Difference, Kind, changed, difference
from portatrain.runs import changes
from portatrain.runs.commits import BEGUN_FROM
from portatrain.runs.open import find, open_run
from portatrain.runs.run_dir import RunDir, code_sha256

if TYPE_CHECKING:
    from checkpoints_format import Store
    from portatrain.checkpoint.locations import Location
    from portatrain.runs.jobs import Job

CHUNK = 64 << 20
SOURCE = ("backend", "mesh", "devices", "track")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    parser.add_argument(
        "--at", metavar="STEP", type=int, required=True, help="the step of a committed checkpoint of RUN to go on from"
    )
    options.add_changes(parser)
    parser.add_argument("--run", dest="new", metavar="NEW", required=True, help="the name of the new run, in --runs")
    parser.add_argument(
        "--surgery",
        metavar="NAME",
        help="make the tensors of another model: vocabulary, layers, width, embed, experts, qk-norm, rope, merge-lora, "
        "drop-lora, or FILE.py:FUNCTION (docs/run/surgery.md)",
    )
    parser.add_argument(
        "--no-proof", action="store_true", help="do not compute both models of a surgery in float64; it is recorded"
    )
    parser.add_argument("--reason", metavar="TEXT", default="", help="why; it is recorded")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--dry-run", action="store_true", help="print what would change, without writing anything")


def run(args: argparse.Namespace) -> int:
    if args.no_proof and args.surgery is None:
        expected = "--surgery NAME, which has a proof"
        raise UserError("--no-proof", expected=expected, got="none", do="Leave --no-proof out.")
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
    saved = saved_under(parent, source, args.at)
    recipe = changed(old, args.overrides, args.at, shapes=args.surgery is None)
    found = difference(old, recipe, args.at, since=changes.last_decided(parent.path))
    _check_left(recipe, args.at)
    with contextlib.ExitStack() as stack:
        done = None
        if args.surgery is not None:
            opened = operating(parent, source, args.at, saved, recipe, args.surgery, proved=not args.no_proof)
            done = stack.enter_context(opened)
        about = _about(parent, old, found, args)
        about["state"] = goes_on(source, args.at, recipe, saved) if done is None else done.state()
        if done is not None:
            about |= {changes.SURGERY: done.as_json(), changes.SAVED: done.saved.to_json()}
        elif saved != old:
            about[changes.SAVED] = saved.to_json()
        if not args.dry_run:
            more = _more(parent, about, job)
            keeps_corpus = not found.named(Kind.CORPUS)
            _write(parent, source, new, recipe, args.at, more, keeps_corpus=keeps_corpus, done=done)
    _print(about, args, new, same_code=about["code_sha256"] == code_sha256(recipe), done=done)
    return 0


def _about(parent: RunDir, old: Recipe, found: Difference, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the record of the fork says of its parent."""
    info = parent.run_info()
    return {
        "run": parent.path.name,
        "where": parent.where,
        "id": info.get("id"),
        "step": args.at,
        "fields": found.as_json(),
        "past": "kept" if not found.decides else found.unproved or "changed from here on",
        "reason": args.reason,
        "overrides": list(args.overrides),
        "code_sha256": info.get("code_sha256"),
        "recipe": old.to_json(),
    }


def _more(parent: RunDir, about: dict[str, Any], job: Job | None) -> dict[str, Any]:
    """Return the fields of the fork's run.json beside those that every run has."""
    info = parent.run_info()
    more: dict[str, Any] = {
        changes.PARENT: about,
        BEGUN_FROM: {"fork": parent.where, "step": about["step"]},
        changes.GIVEN: info.get(changes.GIVEN) or info["recipe"],
    }
    if job is not None:
        # What a cluster's job was given says nothing of this machine; --cluster plans it anew.
        words = {name: getattr(job, name) for name in SOURCE if job.engine == "local" or name == "track"}
        words |= {"recipe": job.source or job.recipe, "overrides": list(job.overrides), "cwd": job.cwd}
        more[changes.SOURCE] = words
    return more


def _print(about: dict[str, Any], args: argparse.Namespace, new: RunDir, *, same_code: bool, done: Done | None) -> None:
    if args.json:
        shown = {name: value for name, value in about.items() if name not in ("recipe", changes.SAVED)}
        print(json.dumps({"fork": args.new, "run_dir": new.where, "parent": shown, "written": not args.dry_run}))
        return
    print(f"{args.new} goes on from step {about['step']} of {about['run']}")
    for name, (was, now) in sorted(about["fields"].items()):
        print(f"  {name}: {was!r} -> {now!r}")
    if not about["fields"]:
        print("  with the same recipe")
    for line in [] if done is None else done.lines():
        print(line)
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
    done: Done | None = None,
) -> None:
    """Write the new run: run.json, the packed corpus, the checkpoint. COMMIT is last, so half a fork is no run."""
    from portatrain.checkpoint.errors import explained
    from portatrain.checkpoint.locations import location_of

    new.check(recipe)
    try:
        new.create(recipe, **more)
        if keeps_corpus and (packed := parent.data()).is_dir():
            _copy_folder(packed, new.path / "data")
            check_data(recipe, new.path / "data")
            new.share_data()
        with explained():
            target = location_of(new.checkpoints())
            copy_checkpoint(source, target, step) if done is None else done.write(target, step)
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
        say = progress("copied", sum(sizes.values()))
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


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of files, by hard links where there are any. The first error of the file system is raised as it is;
    `shutil.copytree` would gather them in an error without a number."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _copy_folder(path, target / path.name)
        elif not _link(path, target / path.name):
            shutil.copy2(path, target / path.name)
