"""Hold generated cells (model, options, mesh, backend) to the derived bound, and print how near they come to it.

    python -m benchmarks.generated_parity [--cells 500] [--seed 16] [--folder docs/measured/parity-soak] [--minutes 30]

It can be interrupted at any time: finished cells are kept in the file seed-N.jsonl of the folder, and the next call
goes on with the others. The exit code is 1 if a cell is beyond its bound. --minutes N starts no further models after N
minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.generated_parity.cells import PLACES, Cell, placed
from benchmarks.generated_parity.held import Held, Reference, traces

CHUNK = 5 * PLACES
"""Cells whose processes are started together."""


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.generated_parity", description=__doc__)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("docs/measured/parity-soak"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    cells = placed(args.seed, args.cells)
    args.folder.mkdir(parents=True, exist_ok=True)
    record, began_s = args.folder / f"seed-{args.seed}.jsonl", time.monotonic()
    found = {row["number"]: Held(**row["held"]) for row in map(json.loads, _lines(record))}
    for first in range(0, len(cells), CHUNK):
        due = [n for n in range(first, min(first + CHUNK, len(cells))) if n not in found]
        if not due:
            continue
        if time.monotonic() - began_s > args.minutes * 60:
            print("generated_parity: the minutes are over; the next call continues", flush=True)
            break
        for number, held in _chunk(cells, first, args.folder / f"traces-{args.seed}-{first}").items():
            found[number] = held
            row = {"number": number, "held": dataclasses.asdict(held)}
            with record.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(f"{number}: {cells[number]}: {held}", flush=True)
        print(_summary(cells, found, args.seed), flush=True)
    print(_summary(cells, found, args.seed))
    return 1 if any(h.failures for h in found.values()) else 0


def _chunk(cells: list[Cell], first: int, work: Path) -> dict[int, Held]:
    """Hold the cells from `first` on. An interrupted chunk goes on from the traces in `work`."""
    numbers = range(first, min(first + CHUNK, len(cells)))
    work.mkdir(exist_ok=True)
    mine = dict(traces([(n, cells[n]) for n in numbers], work))
    found = {}
    for model in range(first, numbers.stop, PLACES):
        reference = Reference(cells[model])
        reference.one = mine[model]
        found.update({n: reference.held(mine[n]) for n in range(model, min(model + PLACES, numbers.stop))})
    shutil.rmtree(work)
    return found


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; an interrupted write may have left a part of one."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return whole.splitlines()


def _summary(cells: list[Cell], found: dict[int, Held], seed: int) -> str:
    places = Counter(f"{cells[n].backend} on {cells[n].devices}" for n in found)
    beyond = [f"{cells[n]}: {f}" for n, h in sorted(found.items()) for f in h.failures]
    largest = max((h.gradient for h in found.values()), default=0.0)
    amplified = sum(h.amplified for h in found.values())
    models, most = len({n // PLACES for n in found}), max((h.loss for h in found.values()), default=0.0)
    return "\n".join(
        (
            f"seed {seed}: {len(found)} of {len(cells)} cells, {models} models: {dict(sorted(places.items()))}",
            f"  of the bound, gradients reach {largest:.2f}, losses {most:.2f}",
            f"  the bound is {1 / largest if largest else float('inf'):.1f} times the largest seen",
            *([f"  {amplified} judged by the drift of one device"] if amplified else []),
            *(beyond or [f"  {len(beyond)} beyond the bound"]),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
