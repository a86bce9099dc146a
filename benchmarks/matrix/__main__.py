"""`make matrix`: run the cells that have no result yet, and write them as a table into docs/measured/parity.md.

options: --only WORDS runs the groups of which backend, mesh or row has these words in its name (may be given again);
--again runs cells that have a result too; --minutes N starts no group after N minutes; --table writes the table alone.
Interrupt it at any time: finished cells are kept in docs/measured/parity.json, and the next call continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.matrix.cells import BACKENDS, MESHES, ROWS, installed
from benchmarks.matrix.run import Found, run_group
from benchmarks.matrix.table import problems, table

RESULTS, DOC = Path("docs/measured/parity.json"), Path("docs/measured/parity.md")


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    results: dict[str, Found] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    folder = Path("runs/matrix") / _sources()  # baselines of other sources do not count
    began_s = time.monotonic()
    groups = [] if args.table else [(b, m) for b in BACKENDS for m in MESHES]
    for number, (backend, mesh) in enumerate(groups, start=1):
        rows = [
            row
            for row in ROWS
            if all(any(word == name for name in (backend, mesh, row)) for word in args.only)
            and (args.again or f"{backend} | {mesh} | {row}" not in results)
        ]
        if not rows or not installed(backend):
            continue
        if time.monotonic() - began_s > args.minutes * 60:
            print("matrix: the minutes are over; the next call continues", flush=True)
            break
        print(f"matrix: {number} of {len(groups)}: {backend} on {mesh}: {', '.join(rows)} ...", flush=True)
        for row, found in run_group(backend, mesh, rows, folder).items():
            results[f"{backend} | {mesh} | {row}"] = {**found, "commit": _commit()}
            print(f"matrix:   {row}: {found}"[:300], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    DOC.write_text(table(results))
    bad = problems(results)
    print("\n".join(bad) or f"matrix: {len(results)} cells, all within their bounds or refused", flush=True)
    return 1 if bad else 0


def _sources() -> str:
    """Return a name for the sources that make the baselines."""
    digest = hashlib.sha256()
    for root in ("portatrain", "recipes", "benchmarks/matrix"):
        for path in sorted(Path(root).rglob("*.py")):
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
