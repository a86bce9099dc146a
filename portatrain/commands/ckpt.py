"""List, verify and compare checkpoints, and convert them to and from other formats.

PATH is a run directory (its newest committed checkpoint, or --step N), the folder of one checkpoint, or a URL
(s3://...). Exit codes: 0 good or equal, 1 damaged or different, 2 a user's mistake, 75 the storage does not answer.

examples:
  portatrain ckpt ls runs/first
  portatrain ckpt show runs/first --step 200
  portatrain ckpt verify runs/first
  portatrain ckpt diff runs/first/checkpoints/step-00000100 runs/first/checkpoints/step-00000200
  portatrain ckpt export runs/first exported --to huggingface
  portatrain ckpt import exported tiny-lm --run-dir runs/second --from huggingface
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from portatrain.commands import options
from portatrain.errors import StorageError, UserError
from portatrain.system.exit_codes import FOUND, OK

TO = ("huggingface", "orbax", "dcp", "torch", "nnx")
FROM = ("huggingface", "orbax", "dcp")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Without these, argparse would print this whole docstring for every subcommand.
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False)

    def path(made: argparse.ArgumentParser, name: str = "path") -> None:
        about = "a run directory, a checkpoint's folder, or the URL of either's checkpoints in an object store"
        made.add_argument(name, metavar=name.upper(), help=about)

    def step(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--step",
            metavar="N",
            type=int,
            help="step of the checkpoint in a run directory (default: the newest committed one)",
        )

    def as_json(made: argparse.ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help="print JSON")

    for name, about in (
        ("ls", "list the checkpoints of a run"),
        ("show", "show a checkpoint's metadata and tensors"),
        ("verify", "read every byte of every file, and name the damaged ones"),
    ):
        made = command(name, about)
        path(made)
        step(made)
        as_json(made)
    made = command("diff", "show which tensors of two checkpoints differ, and by how much")
    path(made, "first")
    path(made, "second")
    as_json(made)
    made = command("export", "write a checkpoint in another format")
    path(made)
    made.add_argument("out", metavar="OUT", type=options.folder, help="the folder to create")
    made.add_argument(
        "--to",
        required=True,
        choices=TO,
        help="huggingface: weights that transformers loads; orbax, "
        "dcp: the whole state; torch: a state_dict; nnx: a pure dict of the module's state",
    )
    made.add_argument("--ema", action="store_true", help="huggingface: export the averaged weights (EMA)")
    made.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="huggingface: the dtype of the weights, rounded to nearest (default: float32, which loses nothing)",
    )
    made.add_argument(
        "--recipe",
        metavar="FILE",
        help="the recipe file that defines the model (default: the one that the run recorded)",
    )
    step(made)
    made = command("import", "start a run from a checkpoint in another format")
    made.add_argument("source", metavar="SOURCE", type=options.folder, help="the folder to read")
    options.add_recipe(made)
    made.add_argument(
        "--run-dir", metavar="DIR", type=options.folder, required=True, help="the run directory to create"
    )
    made.add_argument(
        "--from",
        dest="format",
        required=True,
        choices=FROM,
        help="the format of SOURCE (dcp keeps its metadata as a pickle: import only what you trust)",
    )
    made.add_argument(
        "--accept-drift", metavar="REASON", help="import our own export although its recipe or its tensors differ"
    )


def run(args: argparse.Namespace) -> int:
    return {"ls": ls, "show": show, "verify": verify, "diff": diff, "export": export, "import": bring}[args.what](args)


def ls(args: argparse.Namespace) -> int:
    from checkpoints_format import FormatError, NewerFormatError, NotCommittedError, Reader, StoreError
    from portatrain.runs.find_checkpoints import places

    rows: list[dict[str, Any]] = []
    for place in places(args.path):
        if args.step not in (None, place.step):
            continue
        row: dict[str, Any] = {"step": place.step, "path": str(place.path)}
        try:
            with contextlib.closing(place.open()) as store:
                reader = Reader(store)
                files = [record for records in reader.root.packs for record in records]
                row |= {
                    "state": "committed",
                    "bytes": sum(r.length for r in files),
                    "packs": len(files),
                    "writers": reader.layout.writers,
                    "save": reader.root.save,
                    "probe": "probe" in reader.meta,
                }
        except NotCommittedError:
            row["state"] = "not committed: a save that did not finish"
        except NewerFormatError as error:
            row |= {"state": "of a newer format", "error": str(error)}
        except StoreError as error:
            row |= {"state": "could not be read", "error": str(error)}
        except FormatError as error:
            row |= {"state": "damaged", "error": str(error)}
        rows.append(row)
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        more = (
            f"  {_size(row['bytes'])} in {row['packs']} pack(s) by {row['writers']} writer(s)" if "bytes" in row else ""
        )
        print(f"step {row['step']}  {row['state']}{more}  {row.get('error', '')}".rstrip())
    return 0


def show(args: argparse.Namespace) -> int:
    from portatrain.runs.find_checkpoints import opened

    with opened(args.path, args.step) as reader:
        tensors = [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "axes": list(t.axes), "tile": list(t.tile or ())}
            for t in reader.layout.tensors
        ]
        meta = {k: v for k, v in reader.meta.items() if k not in ("recipe", "probe", "history")}
        if args.json:
            print(json.dumps({"meta": dict(reader.meta), "tensors": tensors}, indent=1))
            return 0
        for key, value in sorted(meta.items()):
            print(f"{key:14} {json.dumps(value)}")
        probe = reader.meta.get("probe")
        print(
            f"{'probe':14} {len(probe['losses'])} losses, {len(probe['norms'])} norms"
            if probe
            else f"{'probe':14} none"
        )
        total = sum(t.nbytes for t in reader.layout.tensors)
        print(f"{'tensors':14} {len(tensors)}, {_size(total)}\n")
        width = max((len(t["name"]) for t in tensors), default=0)
        for t in tensors:
            print(f"{t['name']:{width}}  {t['dtype']:9} {_dims(t)}")
    return 0


class _Told:
    """A line of progress every few seconds of a long read of `total` bytes."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.last_s = what, total, 0, time.monotonic()

    def read(self, nbytes: int) -> None:
        self.done += nbytes
        if time.monotonic() > self.last_s + 2:
            self.last_s = time.monotonic()
            print(f"{self.what}: {self.done / 2**30:.1f} of {self.total / 2**30:.1f} GiB", file=sys.stderr)


def verify(args: argparse.Namespace) -> int:
    from checkpoints_format import NewerFormatError, NotCommittedError, Reader, StoreError
    from portatrain.checkpoint.errors import explained
    from portatrain.checkpoint.format_layout import check_step, check_tiles
    from portatrain.runs.find_checkpoints import places

    found = [p for p in places(args.path) if args.step in (None, p.step)]
    if not found:
        raise UserError(
            f"checkpoint {args.path}", expected=f"step {args.step} among its checkpoints", got="none", do="See ckpt ls."
        )
    rows: list[dict[str, Any]] = []
    for place in found:
        row: dict[str, Any] = {"path": str(place.path), "step": place.step, "problems": []}
        rows.append(row)
        print(f"{place.path}: reading ...", file=sys.stderr)
        try:
            with explained(), contextlib.closing(place.open()) as store:
                try:
                    reader = Reader(store)
                    row["bytes"] = sum(r.length for records in reader.root.packs for r in records)
                    told = _Told(str(place.path), row["bytes"])
                    for problem in reader.problems(told.read):
                        if isinstance(problem, StoreError):
                            row["unread"] = str(problem)
                        else:
                            row["problems"].append(str(problem))
                    if place.step is not None:
                        check_step(reader, place.step, store.describe("COMMIT"))
                    check_tiles(reader)
                except NotCommittedError:
                    if len(found) == 1:
                        raise
                    row["uncommitted"] = True
                except NewerFormatError as error:
                    row |= {"problems": [str(error)], "newer": True}
        except StorageError as error:
            row["unread"] = str(error)
        except UserError as error:
            row["problems"] = [*row["problems"], str(error)]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            if row.get("uncommitted"):
                print(f"{row['path']}: not committed, a save that did not finish")
            elif "unread" in row and not row["problems"]:
                print(f"{row['path']}: could not be read\n  {row['unread']}")
            elif row["problems"]:
                print(
                    f"{row['path']}: {'of a newer format' if row.get('newer') else 'DAMAGED'}",
                    *row["problems"],
                    sep="\n  ",
                )
            else:
                print(f"{row['path']}: good, {_size(row['bytes'])} read")
    if any(row["problems"] for row in rows):
        return FOUND
    return StorageError.code if any("unread" in row for row in rows) else OK


def diff(args: argparse.Namespace) -> int:
    from portatrain.checkpoint.diff import differences, meta_differences
    from portatrain.checkpoint.errors import explained
    from portatrain.runs.find_checkpoints import opened

    with opened(args.first) as a, opened(args.second) as b, explained():
        found = list(differences(a, b))
        meta = [
            m
            for m in meta_differences(a.meta, b.meta)
            if not m.startswith(("probe.", "history", "recipe.", "fingerprints"))
        ]
        count = len({*a.names, *b.names})
    if args.json:
        print(json.dumps({"tensors": [vars(d) for d in found], "meta": meta}, indent=1))
        return int(bool(found))
    width = max((len(d.name) for d in found), default=0)
    for d in found:
        relative = f", {d.largest / d.scale:.2g} of its scale" if d.scale else ""
        how = d.why or f"{d.elements} of {d.size} elements, by at most {d.largest:.3g}{relative}"
        print(f"{d.name:{width}}  {how}")
    print(f"{len(found)} of {count} tensors differ{'; meta: ' + ', '.join(meta) if meta else ''}")
    return int(bool(found))


def export(args: argparse.Namespace) -> int:
    from portatrain.checkpoint.interop.export_import import export_to
    from portatrain.runs.find_checkpoints import opened

    load_recipe_file(args.path, args.recipe)
    with opened(args.path, args.step) as reader:
        names = export_to(reader, args.to, args.out, role="ema" if args.ema else "params", dtype=args.dtype)
    print(f"{args.out}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}")
    return 0


def load_recipe_file(path: Path | str, given: str | None) -> None:
    """Load the recipe file that defines the classes of a checkpoint: `given`, or the one that its run recorded."""
    from portatrain.recipe import load_recipe
    from portatrain.runs import jobs
    from portatrain.runs.run_dir import RunDir
    from portatrain.system import json_files
    from portatrain.system.urls import is_remote

    if given is not None:
        load_recipe(given, cwd=Path.cwd())
        return
    if is_remote(path):
        return
    near = Path(path).absolute()
    folder = next((f for f in (near, *near.parents[:2]) if (f / "run.json").is_file()), None)
    if folder is None:
        return
    found: list[tuple[str, str]] = []
    with contextlib.suppress(UserError):  # a damaged record names no file; the export says what it lacks
        found += [(job.recipe, job.cwd) for job in jobs.of(folder)]
    for number in RunDir(folder).attempt_numbers():
        with contextlib.suppress(UserError):
            source = json_files.read_object(folder / "attempts" / str(number) / "attempt.json").get("source")
            if isinstance(source, dict):
                found.append((str(source.get("recipe", "")), str(source.get("cwd") or ".")))
    for recipe, cwd in reversed(found):
        if recipe.endswith(".py"):
            with contextlib.suppress(UserError):
                load_recipe(recipe, cwd=Path(cwd))
                return


def bring(args: argparse.Namespace) -> int:
    from checkpoints_format import LocalStore
    from portatrain.checkpoint.interop.export_import import import_from
    from portatrain.checkpoint.interop.huggingface import hub_of, left_out
    from portatrain.checkpoint.locations import step_name
    from portatrain.commands import options
    from portatrain.runs.commits import BEGUN_FROM
    from portatrain.runs.run_dir import RunDir

    recipe, folder = options.resolved_recipe(args), Path(args.run_dir)
    made = not folder.exists()
    if not made and any(folder.iterdir()):
        raise UserError(
            f"run directory {folder}",
            expected="an unused name",
            got="a folder that is not empty",
            do="Choose another name; nothing in it was changed.",
        )
    run = RunDir(folder)
    run.check(recipe)
    try:
        # A run whose import was killed has run.json and no checkpoint, so that `train` does not take it for a new one.
        run.create(recipe, **{BEGUN_FROM: {"format": args.format, "path": str(args.source.absolute())}})
        step = import_from(
            args.source,
            args.format,
            recipe,
            lambda step: LocalStore(folder / "checkpoints" / step_name(step), create=True),
            accept_drift=args.accept_drift is not None,
        )
    except BaseException:  # without its checkpoint, the run would start from random weights
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "run.json").unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # somebody put a file there
                folder.rmdir()
        raise
    words = ["portatrain", "train", args.recipe, "--run-dir", str(args.run_dir)]
    words += [word for override in args.overrides for word in ("--set", override)]
    if args.accept_drift is not None:
        words += ["--accept-drift", args.accept_drift]
    if args.format == "huggingface" and (said := left_out(args.source, hub_of(recipe))):
        print(said)
    print(f"{args.run_dir}: a checkpoint of step {step}. Continue with: {shlex.join(words)}")
    return 0


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def _dims(tensor: dict[str, Any]) -> str:
    if not tensor["axes"]:
        return str(tensor["shape"])
    return " ".join(f"{axis}={size}" for axis, size in zip(tensor["axes"], tensor["shape"], strict=True))
