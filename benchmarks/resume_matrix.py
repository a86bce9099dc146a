"""Run the resume matrix: every pair of backends, with a new mesh and another number of devices at the move.

    python -m benchmarks.resume_matrix [--write]        # half an hour; --write: into docs/measured/moves.md

tiny-lm with AdamW, accumulation 2, dropout and averages. For every pair: 10 steps on the first backend and mesh, then
to step 30 on the second. Printed: the verdict at the move, the largest relative difference of the losses of steps 11 to
30 from the run that never moved (jax, one device), and whether the state goes from the first to the second and back bit
for bit. With a row out of bounds the exit code is 1. Rows that have ended are kept in docs/measured/resume-matrix.json,
with the commit: an interrupted call continues with the next row, `--again` runs all anew. A backend that cannot share
environment runs in its own where PORTATRAIN_XLA_PYTHON names the Python of one (`make test-xla` makes it); one that is
not installed stands in the table with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portatrain.backends.base import missing
from portatrain.system import environment

STEP, STEPS, BOUND = 10, 30, 1e-6
SIZES = (
    "model.layers=2",
    "model.embed=32",
    "model.mlp=64",
    "model.dropout=0.1",
    "data.seq_len=64",
    "batch=8",
    "accumulation=2",
    f"steps={STEPS}",
    "schedule.warmup=4",
    "eval_every=none",
    "hooks=()",
    "ema_decay=0.9",
)
KINDS = {
    "jax": ("fsdp=2", "fsdp=2,tensor=2"),
    "torch": ("fsdp=2", "fsdp=2,tensor=2"),
    "deepspeed-3": ("fsdp=2", "fsdp=4"),
    "torch-xla": ("fsdp=2", "fsdp=2,tensor=2"),
}
"""Backend -> (mesh before the move, mesh after it): two devices, then four."""
ELSEWHERE = {"torch-xla": environment.XLA_PYTHON.name}
LEG_S = 600
MARKS = ("<!-- resume matrix -->", "<!-- end of resume matrix -->")
ROOT = Path(__file__).parents[1]

Row = dict[str, Any]


def python_of(kind: str) -> str | None:
    """Return the Python that runs a backend; None if there is none."""
    return sys.executable if not missing(kind) else os.environ.get(ELSEWHERE.get(kind, ""))


def run(kind: str, module: str, words: list[str]) -> tuple[int, str]:
    """Return (exit code, last line of output) of a Python module in the environment of backend `kind`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if kind in ELSEWHERE:
        env.setdefault("PJRT_DEVICE", "CPU")
    try:
        done = subprocess.run(
            [python_of(kind) or sys.executable, "-m", module, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=LEG_S,
            env=env,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired:
        return -1, f"not done in {LEG_S} s"
    return done.returncode, (done.stderr.strip().splitlines() or ["no word"])[-1]


def train(
    at: Path, kind: str, mesh: str, *more: str, recipe: str = "tiny-lm", given: Sequence[str] = SIZES
) -> tuple[int, str]:
    """Train a recipe with the fields `given`; return (exit code, last line of output)."""
    sizes = [word for size in given for word in ("--set", size)]
    words = ["train", recipe, "--run-dir", str(at), "--backend", kind, "--mesh", mesh, *sizes, *more]
    return run(kind, "portatrain.cli", words)


def carry(
    source: Path, target: Path, kind: str, mesh: str, *, recipe: str = "tiny-lm", given: Sequence[str] = SIZES
) -> str | None:
    """Restore the checkpoint `source` on a backend and save its state at `target`; return the error, or None."""
    shutil.rmtree(target, ignore_errors=True)
    words: Row = {"source": str(source), "target": str(target), "backend": kind, "mesh": mesh}
    words |= {"recipe": recipe, "given": list(given)}
    code, error = run(kind, "benchmarks.resume_matrix", ["--carry", json.dumps(words)])
    return None if code == 0 else f"failed: {error}"


def carrying(words: dict[str, Any]) -> int:
    from portatrain.backends.base import process_per_device
    from portatrain.model.layout import Mesh
    from portatrain.system.processes import run_processes

    n = Mesh.parse(words["mesh"]).devices
    if n > 1 and process_per_device(words["backend"]):
        return run_processes(n, "benchmarks.resume_matrix:worker", words)
    return worker(argparse.Namespace(**words))


def worker(args: argparse.Namespace) -> int:
    from checkpoints_format import LocalStore, Reader
    from portatrain.backends.base import backend_class, simulate_devices
    from portatrain.backends.program import make_program
    from portatrain.checkpoint.restore import Restoring, boxes_of
    from portatrain.checkpoint.saver import Checkpoints
    from portatrain.model.layout import Mesh
    from portatrain.recipe import apply_overrides, load_recipe

    program = make_program(apply_overrides(load_recipe(args.recipe), args.given), mesh=args.mesh)
    simulate_devices(args.backend, Mesh.parse(args.mesh).devices)
    backend = backend_class(args.backend)(program)
    with LocalStore(args.source) as store:
        reader = Reader(store)
        with Restoring(reader, boxes_of(program, backend.process, backend.processes)) as restoring:
            state = backend.restore_state(restoring.read)
        saving = Checkpoints(
            Path(args.target), save_name="carried", process=backend.process, processes=backend.processes
        )
        saving.save(reader.meta["step"], backend, state, dict(reader.meta))
        saving.wait()
    backend.agree(0)
    return 0


def same(a: Path, b: Path) -> str:
    from checkpoints_format import LocalStore, Reader
    from portatrain.checkpoint.diff import differences

    with LocalStore(a) as one, LocalStore(b) as two:
        first, second = Reader(one), Reader(two)
        found = list(differences(first, second))
        return "same bits" if not found else f"{len(found)} of {len(first.names)} tensors differ"


def move(first: str, second: str, scratch: Path) -> Row:
    """Return the result of a move between two backends: verdict, worst, back; or failed; or not_run."""
    from portatrain.runs.run_dir import RunDir

    for kind in (first, second):
        if python_of(kind) is None:
            hint = f"; {ELSEWHERE[kind]} is not set" if kind in ELSEWHERE else ""
            return {"not_run": f"{', '.join(missing(kind))} not installed{hint}"}
    baseline = losses(scratch, "whole", "jax", "")
    left = scratch / f"left-{first}"
    if not (left / "left").exists():
        shutil.rmtree(left, ignore_errors=True)
        code, error = train(left, first, KINDS[first][0], "--stop-at", str(STEP))
        if code != 85:
            return {"failed": f"before the move: {error}"}
        (left / "left").touch()
    at = scratch / f"{first}-{second}"
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(left, at)
    code, error = train(at, second, KINDS[second][1])
    if code != 0:
        return {"failed": f"after the move: {error}"}
    curve = [row["loss"] for row in RunDir(at).curve()]
    name = f"step-{STEP:08d}"
    out, back = scratch / f"out-{first}-{second}", scratch / f"back-{first}-{second}"
    start = left / "checkpoints" / name
    wrong = carry(start, out, second, KINDS[second][1]) or carry(out / name, back, first, KINDS[first][0])
    return {
        "verdict": RunDir(at).events("resumed")[0]["verdict"],
        "worst": max(abs(a - b) / a for a, b in zip(baseline[STEP:], curve[STEP:], strict=True)),
        "back": wrong or same(start, back / name),
    }


def losses(
    scratch: Path, name: str, kind: str, mesh: str, *, recipe: str = "tiny-lm", given: Sequence[str] = SIZES
) -> list[float]:
    """Return the curve of a run that never moved."""
    from portatrain.runs.run_dir import RunDir

    at = scratch / name
    if not (at / "DONE").exists():
        code, error = train(at, kind, mesh, recipe=recipe, given=given)
        if code:
            raise SystemExit(f"resume matrix: the run that never moves failed: {error}")
    return [row["loss"] for row in RunDir(at).curve()]


def wrong(row: Row) -> bool:
    """Return whether a row is out of bounds."""
    if "not_run" in row:
        return False
    return "failed" in row or row["verdict"] != "continuous" or not row["worst"] <= BOUND or row["back"] != "same bits"


def table(found: dict[str, Row]) -> str:
    rows = [("move after step 10", "devices", "verdict", "losses of steps 11 to 30", "there and back"), ("---",) * 5]
    for first in KINDS:
        for second in KINDS:
            before, after = KINDS[first][0], KINDS[second][1]
            row = found.get(f"{first} {second}", {"not_run": "not yet"})
            told = (
                (f"not run: {row['not_run']}", "", "")
                if "not_run" in row
                else (f"**failed**: {row['failed']}", "", "")
                if "failed" in row
                else (row["verdict"], f"{row['worst']:.1e}", row["back"])
            )
            rows.append((f"{first} {before} to {second} {after}", "2 to 4", *told))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def sources() -> str:
    """Return a name for the code that makes the runs under runs/."""
    digest = hashlib.sha256()
    for root in ("portatrain", "checkpoints_format", "recipes", "benchmarks/resume_matrix.py"):
        for path in sorted((ROOT / root).rglob("*.py")) or [ROOT / root]:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/measured/moves.md")
    parser.add_argument(
        "--only",
        metavar="KIND",
        action="append",
        default=[],
        choices=KINDS,
        help="only rows from or to this backend; given twice, only those of both",
    )
    parser.add_argument("--again", action="store_true", help="run rows that have a result, too")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--carry", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.carry:
        return carrying(json.loads(args.carry))
    scratch = ROOT / "runs" / "resume-matrix" / sources()
    scratch.mkdir(parents=True, exist_ok=True)
    kept, began_s = ROOT / "docs" / "measured" / "resume-matrix.json", time.monotonic()
    found: dict[str, Row] = json.loads(kept.read_text()) if kept.exists() else {}
    pairs = [(a, b) for a in KINDS for b in KINDS]
    for number, (first, second) in enumerate(pairs, start=1):
        name = f"{first} {second}"
        if not set(args.only) <= {first, second} or (name in found and not args.again):
            continue
        if time.monotonic() - began_s > args.minutes * 60:
            print("resume matrix: the minutes are over; the next call continues", flush=True)
            break
        print(f"resume matrix: {number} of {len(pairs)}: {first} to {second} ...", flush=True)
        row_began_s = time.monotonic()
        row = move(first, second, scratch)
        print(f"resume matrix:   {row} in {time.monotonic() - row_began_s:.0f} s", flush=True)
        if "not_run" not in row:
            found[name] = {**row, "commit": commit()}
            kept.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(table(found))
    if args.write:
        path = ROOT / "docs" / "measured" / "moves.md"
        before, _, rest = path.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        path.write_text(f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{after}")
    bad = [name for name, row in found.items() if wrong(row)]
    print(f"resume matrix: {len(found)} of {len(pairs)} rows run, {len(bad)} out of bounds {bad or ''}".rstrip())
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
