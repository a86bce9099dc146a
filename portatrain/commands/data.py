"""Pack data into a store that runs read where it is; show, count, check and verify what is packed.

`pack` tokenises the data of a recipe once, in parallel. `show` and `stats` read what a store says of itself. `plan`
shows what each source gives over a run. `check` looks for documents that are twice, and for text of evaluation sets in
what is trained on. `verify` reads every byte of a store, or of the packed data of a run, and names what is damaged.
Exit codes: 0 good, 1 damaged or shared, 2 a user's mistake, 75 storage failed (give the same command again).

examples:
  portatrain data pack my_text.py stores/text --workers 8
  portatrain data plan my_text.py
  portatrain data stats stores/text
  portatrain data check stores/text --against stores/questions
  portatrain data verify stores/text
  portatrain data verify runs/first
  portatrain data verify runs/first/data --json
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from portatrain.commands import data_check, data_plan, packed
from portatrain.errors import StorageError, UserError
from portatrain.system.exit_codes import FOUND, OK
from portatrain.system.paths import expand
from portatrain.system.urls import is_remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    packed.add_pack(commands)
    packed.add_show(commands)
    data_check.add_check(commands)
    data_plan.add_plan(commands)
    about = "read every byte of packed data, and name what is damaged"
    made = commands.add_parser("verify", help=about, description=f"{about.capitalize()}.", allow_abbrev=False)
    made.add_argument("path", metavar="PATH", help="a packed store, a run directory (folders or URLs), or a run's data")
    made.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.what != "verify":
        parts = {"pack": packed.pack, "show": packed.show, "stats": packed.stats}
        return (parts | {"check": data_check.check, "plan": data_plan.plan})[args.what](args)
    from portatrain.data import pack

    rows: list[dict[str, Any]] = packed.verify_rows(args.path) if packed.is_store(args.path) else []
    for folder in () if rows else _packs(args.path):
        row: dict[str, Any] = {"path": str(folder)}
        rows.append(row)
        try:
            found = pack.verify(folder)
            row["bytes"] = sum(array.nbytes for array in found.arrays.values())
            row["passed_over"] = list(found.facts.get("passed_over", ()))
        except StorageError as error:
            row["unread"] = str(error)
        except UserError as error:
            row["problem"] = str(error)
    if args.json:
        print(json.dumps(rows, indent=1))
    for row in () if args.json else rows:
        said = f"good, {row.get('bytes')} bytes read"
        if "unread" in row:
            said = f"could not be read\n  {row['unread']}"
        elif "problem" in row:
            said = f"DAMAGED\n  {row['problem']}"
        print(f"{row['path']}: {said}")
        for sentence in row.get("passed_over", ()):
            print(f"  {sentence}")
    if any("problem" in row for row in rows):
        return FOUND
    return StorageError.code if any("unread" in row for row in rows) else OK


def _packs(given: str) -> list[Path]:
    """Return the folders of packed corpora at a path. Raises UserError if there is none."""
    if is_remote(given):
        from portatrain.runs.open import open_run

        run = open_run(given)
        if (kept := run.path / "data").is_dir():  # from a call before this one: the bytes of the store are in question
            shutil.rmtree(kept)
        folder = run.data()
    else:
        folder = expand(given)
    found = sorted(path.parent for path in folder.rglob("pack.json")) if folder.is_dir() else []
    if not found:
        raise UserError(
            f"data {given}",
            expected="a run directory with packed data, or a packed corpus",
            got="no pack.json there" if folder.exists() else "no such folder",
            do="Check the path. A run on images, on arrays of your own or on a packed store has no packed data: "
            "give the path of the store.",
        )
    return found
