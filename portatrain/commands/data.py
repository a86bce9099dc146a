"""Verify the packed data of a run: every byte, whatever the size.

PATH is a run directory (a folder or a URL) or the folder of one packed corpus. Exit codes: 0 good, 1 damaged, 2 a
user's mistake.

examples:
  portatrain data verify runs/first
  portatrain data verify runs/first/data --json
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.system.paths import expand
from portatrain.system.urls import is_remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    about = "read every byte of the packed data, and name what is damaged"
    made = commands.add_parser("verify", help=about, description=f"{about.capitalize()}.", allow_abbrev=False)
    made.add_argument("path", metavar="PATH", help="a run directory, a URL of one, or the folder of a packed corpus")
    made.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from portatrain.data import pack

    rows: list[dict[str, Any]] = []
    for folder in _packs(args.path):
        row: dict[str, Any] = {"path": str(folder)}
        rows.append(row)
        try:
            found = pack.verify(folder)
            row["bytes"] = sum(array.nbytes for array in found.arrays.values())
            row["passed_over"] = list(found.facts.get("passed_over", ()))
        except UserError as error:
            row["problem"] = str(error)
    if args.json:
        print(json.dumps(rows, indent=1))
    for row in () if args.json else rows:
        said = f"DAMAGED\n  {row['problem']}" if "problem" in row else f"good, {row['bytes']} bytes read"
        print(f"{row['path']}: {said}")
        for sentence in row.get("passed_over", ()):
            print(f"  {sentence}")
    return int(any("problem" in row for row in rows))


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
            do="Check the path. A run on images or on arrays of your own has no packed data.",
        )
    return found
