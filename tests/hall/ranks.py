"""One of two gloo ranks: run faults one after another, and write what rank 0 found.

    python -m tests.hall.ranks RANK RANKS FOLDER CALL ...

A CALL is `MODULE:FUNCTION:ARGUMENT`; FUNCTION(ARGUMENT != "0", or the text itself) returns a verdict.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(folder: Path, calls: list[str], ranks: int = 2, limit_s: float = 150) -> dict[str, dict[str, Any]]:
    """Run the calls in one group of processes; return kinds and text of each verdict. The first failure ends all."""
    command, rest = [sys.executable, "-m", "tests.hall.ranks"], [str(ranks), str(folder), *calls]
    logs = [(folder / f"rank-{r}.log").open("w+") for r in range(ranks)]
    group = [subprocess.Popen([*command, str(r), *rest], cwd=ROOT, stderr=logs[r]) for r in range(ranks)]
    end = time.monotonic() + limit_s
    try:
        while any(p.poll() is None for p in group) and not any(p.poll() for p in group) and time.monotonic() < end:
            time.sleep(0.05)
        failed = [r for r, process in enumerate(group) if process.poll() != 0]
    finally:
        for process, log in zip(group, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    said = "\n".join(f"rank {r}: {(folder / f'rank-{r}.log').read_text()[-3000:]}" for r in failed)
    assert not failed, f"failed, or not done in {limit_s:.0f} s: {said}"
    return json.loads((folder / "found.json").read_text())


def main(rank: int, ranks: int, folder: Path, calls: list[str]) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {}
    for call in calls:
        module, function, argument = call.split(":")
        value: Any = {"0": False, "1": True}.get(argument, argument)
        verdict = getattr(importlib.import_module(module), function)(value)
        found[call] = {"kinds": sorted(verdict.kinds), "text": str(verdict)}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
