"""The resume matrix: every pair of backends, with a change of mesh and of devices at the move.

    python -m benchmarks.resume_matrix [--write]        # minutes; --write: into docs/resume.md

tiny-lm with AdamW, accumulation 2, dropout and averages. For every pair: 10 steps on the first backend and mesh, then
to step 30 on the second. Printed: the verdict at the move, the largest relative difference of the losses of steps 11 to
30 from the run that never moved (jax, one device), and whether the state goes from the first to the second and back bit
for bit. A backend that is not installed, or cannot go there, stands in the table with the reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from portatrain.backends.base import _entry_points, missing

STEP, STEPS = 10, 30
SIZES = (
    "model.layers=2", "model.embed=32", "model.mlp=64", "model.dropout=0.1", "data.seq_len=64", "batch=8",
    "accumulation=2", f"steps={STEPS}", "schedule.warmup=4", "eval_every=none", "hooks=()", "ema_decay=0.9",
)  # fmt: skip
KINDS = {
    "jax": ("jax", "fsdp=2", "fsdp=2,tensor=2"),
    "torch": ("torch", "fsdp=2", "tensor=2"),
    "deepspeed-3": ("deepspeed-3", "fsdp=2", "fsdp=2"),
    "torch-xla": ("torch-xla", "fsdp=2", "fsdp=4"),
}
"""Name in the table -> (backend, mesh before the move, mesh after it)."""
MARKS = ("<!-- resume matrix -->", "<!-- end of resume matrix -->")


def there(kind: str) -> str | None:
    """Why a backend is not in the matrix; None where it is."""
    name = KINDS[kind][0]
    if name not in _entry_points():
        return "no such backend here"
    gone = missing(name)
    return f"{', '.join(gone)} not installed" if gone else None


def train(run: Path, kind: str, mesh: str, *more: str) -> tuple[int, str]:
    sizes = [word for size in SIZES for word in ("--set", size)]
    words = ["tiny-lm", "--run-dir", str(run), "--backend", kind, "--mesh", mesh, *sizes, *more]
    done = subprocess.run(
        [sys.executable, "-m", "portatrain.cli", "train", *words], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def carry(source: Path, target: Path, kind: str, mesh: str) -> str | None:
    """Restore the checkpoint `source` on a backend and save what it then holds at `target`; an error, or None."""
    words = {"source": str(source), "target": str(target), "backend": kind, "mesh": mesh}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.resume_matrix", "--carry", json.dumps(words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def carrying(words: dict[str, Any]) -> int:
    from portatrain.commands.train import PROCESS_A_DEVICE
    from portatrain.layout import Mesh
    from portatrain.processes import run_processes

    n = Mesh.parse(words["mesh"]).devices
    if n > 1 and words["backend"] in PROCESS_A_DEVICE:
        return run_processes(n, "benchmarks.resume_matrix:worker", words)
    return worker(argparse.Namespace(**words))


def worker(args: argparse.Namespace) -> int:
    from checkpoints_format import LocalStore, Reader
    from portatrain.backends.base import backend_class, simulate_devices
    from portatrain.checkpoint import Checkpoints
    from portatrain.layout import Mesh
    from portatrain.recipe import apply_overrides, load_recipe
    from portatrain.restoring import Restoring, boxes_of
    from portatrain.trainer import make_program

    program = make_program(apply_overrides(load_recipe("tiny-lm"), SIZES), mesh=args.mesh)
    simulate_devices(args.backend, Mesh.parse(args.mesh).devices)
    backend = backend_class(args.backend)(program)
    with LocalStore(args.source) as store:
        reader = Reader(store)
        with Restoring(reader, boxes_of(program, backend.process, backend.processes)) as restoring:
            state = backend.restore_state(restoring.read)
        saving = Checkpoints(
            Path(args.target), save_name="carried", process=backend.process, processes=backend.processes
        )
        saving.save(STEP, backend, state, dict(reader.meta))
        saving.wait()
    backend.agree(0)
    return 0


def same(a: Path, b: Path) -> str:
    from checkpoints_format import LocalStore, Reader
    from portatrain.exchange.differences import differences

    with LocalStore(a) as one, LocalStore(b) as two:
        first, second = Reader(one), Reader(two)
        found = list(differences(first, second))
        return "same bits" if not found else f"{len(found)} of {len(first.names)} tensors differ"


def cell(first: str, second: str, scratch: Path, baseline: list[float]) -> tuple[str, ...]:
    """(pair, verdict, largest difference, there and back)."""
    pair = f"{first} {KINDS[first][1]} to {second} {KINDS[second][2]}"
    for kind in (first, second):
        if why := there(kind):
            return pair, f"not run: {why}", "", ""
    from portatrain.run_dir import RunDir

    left = scratch / f"left-{first}"
    if not left.exists():
        code, error = train(left, KINDS[first][0], KINDS[first][1], "--stop-at", str(STEP))
        if code != 85:
            return pair, f"failed: {error.strip().splitlines()[-1]}", "", ""
    run = scratch / f"{first}-{second}"
    shutil.copytree(left, run)
    code, error = train(run, KINDS[second][0], KINDS[second][2])
    if code != 0:
        return pair, f"failed: {error.strip().splitlines()[-1]}", "", ""
    losses = [row["loss"] for row in RunDir(run).curve()]
    worst = max(abs(a - b) / a for a, b in zip(baseline[STEP:], losses[STEP:], strict=True))
    verdict = RunDir(run).events("resumed")[0]["verdict"]
    name = f"step-{STEP:08d}"
    out, back = scratch / f"out-{first}-{second}", scratch / f"back-{first}-{second}"
    wrong = carry(left / "checkpoints" / name, out, KINDS[second][0], KINDS[second][2])
    wrong = wrong or carry(out / name, back, KINDS[first][0], KINDS[first][1])
    return pair, verdict, f"{worst:.1e}", wrong or same(left / "checkpoints" / name, back / name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/resume.md")
    parser.add_argument("--carry", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.carry:
        return carrying(json.loads(args.carry))
    from portatrain.run_dir import RunDir

    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        scratch = Path(folder)
        code, error = train(scratch / "whole", "jax", "")
        if code:
            print(error)
            return 1
        baseline = [row["loss"] for row in RunDir(scratch / "whole").curve()]
        rows = []
        for first in KINDS:
            for second in KINDS:
                rows.append(cell(first, second, scratch, baseline))
                print(*rows[-1], sep=" | ", flush=True)
    head = ("move after step 10", "verdict", "losses of steps 11 to 30", "there and back")
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * 4, *rows))
    if args.write:
        path = Path(__file__).parents[1] / "docs" / "resume.md"
        before, _, rest = path.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        path.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")
    return int(any("failed" in r[1] or "differ" in r[3] or r[1] == "broken" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
