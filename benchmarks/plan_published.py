"""Compare published training speeds with the planner's predictions: its errors, and the factors fitted to the speeds.

    python -m benchmarks.plan_published [--write]      # --write also writes docs/measured/plan-published.md

Each row of ``plan_published_rows`` is predicted with its publisher's mesh, microbatch and remat policy. A row's own
factor is the efficiency at which the prediction equals what was published. A chip with several rows gets their
geometric mean, any other chip that of its vendor. Experts that sort their tokens have one more number: how long that
takes. A row's own is that at which its prediction, by the factor of its chip's other rows, equals what was published.
Every error is leave-one-out: the row is predicted with numbers fitted without it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import log
from pathlib import Path

from benchmarks.plan_held_out import ENTERED
from benchmarks.plan_published_rows import ROWS as FIRST
from benchmarks.plan_published_rows import Row
from portatrain.plan.cost import efficiency, interval
from portatrain.plan.cost.efficiency import Efficiency
from portatrain.plan.cost.memory import memory
from portatrain.plan.cost.placement import assign_axes
from portatrain.plan.cost.policy import PRECISIONS, REMATS, SORTING, TUNING
from portatrain.plan.cost.timing import rates, step_time
from portatrain.plan.cost.workload import on_mesh
from portatrain.plan.result import Candidate
from portatrain.plan.search import plan

ROWS = (*FIRST, *ENTERED)
SAMPLES_PER_DEVICE = (1, 2, 4, 8)  # tried where the publisher's mesh cannot be planned


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A row with its own factor, the factor fitted without it, and the prediction by that factor. ``far``: the group of
    ``portatrain.plan.cost.interval`` that the rows of the fit are for it."""

    row: Row
    own: float
    factor: float
    basis: str
    predicted: float
    chosen: Candidate
    far: int

    @property
    def error(self) -> float:
        return self.predicted / self.row.tokens - 1

    @property
    def log(self) -> float:
        return log(self.predicted / self.row.tokens)


@cache
def predict(row: Row, factor: float, sorting: float | None = None) -> tuple[float, Candidate]:
    """Return tokens a second and chip at an efficiency factor and a time of sorting, and the configuration."""
    row = planned(row) if row.mesh is None else row
    assert row.mesh is not None
    cluster, precision = row.on, PRECISIONS[row.precision]
    # Publishers use kernels of their own.
    takes = SORTING[row.gathers] if sorting is None else sorting
    tuning = replace(TUNING[cluster.chip.stack], skips_masked=True, block=row.block, sorting=takes)
    places = row.mesh[0] * row.mesh[1] * row.mesh[2]
    shape = replace(row.shape, batch=places * row.rows * row.accumulation, capacity=row.capacity)
    work = on_mesh(shape, row.mesh)
    assert row.remat is not None
    tokens = row.rows * work.seq
    need = memory(
        work,
        tokens=tokens,
        accumulation=row.accumulation,
        remat=row.remat,
        precision=precision,
        slot_bytes=shape.slot_bytes,
        tuning=tuning,
    )
    placements = assign_axes(cluster, row.mesh, cluster.devices)
    if isinstance(placements, str):
        raise ValueError(f"{row.model} on {row.cluster}: {placements}")
    ways = [
        Candidate(
            mesh=row.mesh,
            rows=row.rows,
            accumulation=row.accumulation,
            remat=row.remat.name,
            precision=row.precision,
            placement=placement,
            memory=need,
            time=step_time(
                work,
                placement,
                tokens=tokens,
                accumulation=row.accumulation,
                remat=row.remat,
                precision=precision,
                slot_bytes=shape.slot_bytes,
                rate=rates(cluster.chip, precision, factor),
                tuning=tuning,
            ),
        )
        for placement in placements
    ]
    best = min(ways, key=lambda one: one.step_s)
    return shape.tokens_per_step / best.step_s / cluster.chips, best


@cache
def planned(row: Row) -> Row:
    """Return ``row`` with the planner's own configuration at the factor that the planner takes, in place of one that it
    cannot plan."""
    _, best = searched(row, efficiency.published(row.on.chip).value)
    return replace(row, mesh=best.mesh, rows=best.rows, accumulation=best.accumulation, remat=REMATS[best.remat])


@cache
def searched(row: Row, factor: float) -> tuple[float, Candidate]:
    """Return the planner's own best configuration, at the best of several batches."""
    best: tuple[float, Candidate] | None = None
    for samples in SAMPLES_PER_DEVICE:
        cluster = row.on
        shape = replace(row.shape, batch=samples * cluster.devices)
        made = plan(
            shape,
            cluster,
            precisions=(row.precision,),
            efficiency=Efficiency(value=factor, basis="given"),
            tuning=replace(
                TUNING[cluster.chip.stack], skips_masked=True, block=row.block, sorting=SORTING[row.gathers]
            ),
            hints=False,
        )
        if made.best and (best is None or made.tokens_per_s / cluster.chips > best[0]):
            best = made.tokens_per_s / cluster.chips, made.best[0]
    if best is None:
        raise ValueError(f"no plan for {row.model} on {row.cluster}")
    return best


@cache
def own_factor(row: Row, sorting: float | None = None) -> float:
    """Return the efficiency at which the prediction equals the published figure, to three digits."""
    factor = 0.6
    for _ in range(20):
        off = row.tokens / predict(row, factor, sorting)[0]
        factor *= off
        if abs(off - 1) < 2e-4:
            break
    return round(factor, 3)


def sorts(row: Row) -> bool:
    """Return whether the row has experts that sort their tokens."""
    return row.shape.experts > 0 and row.capacity == 1.0


@cache
def own_sorting(row: Row, factor: float) -> float:
    """Return the time of sorting at which the prediction at ``factor`` equals the published figure, to one digit."""
    low, high = 0.0, 200.0
    while high - low > 0.05:
        middle = (low + high) / 2
        low, high = (low, middle) if predict(row, factor, middle)[0] < row.tokens else (middle, high)
    return max(0.1, round((low + high) / 2, 1))


@cache
def sorting_of(rows: tuple[Row, ...]) -> dict[str, float]:
    """Return the times of sorting by where gathers run: geometric means of the rows' own; over all rows where no row
    tells."""
    plain = [row for row in rows if not sorts(row)]
    found: dict[str, list[float]] = {}
    for row in rows:
        if sorts(row):
            same = [r for r in plain if r.chip == row.chip] or [r for r in plain if r.vendor == row.vendor] or plain
            factor = statistics.geometric_mean([own_factor(r) for r in same])
            found.setdefault(row.gathers, []).append(own_sorting(row, round(factor, 3)))
    everything = [value for values in found.values() for value in values] or [8.0]
    return {where: round(statistics.geometric_mean(found.get(where, everything)), 1) for where in SORTING}


def _own(row: Row, sorting: dict[str, float]) -> float:
    return own_factor(row, sorting[row.gathers]) if sorts(row) else own_factor(row)


def fit(rows: Iterable[Row]) -> tuple[dict[str, float], dict[str, float], float, dict[str, float]]:
    """Return (by chip, by vendor, over all) factors of ``rows``, geometric means of their own, and the times of
    sorting."""
    known = tuple(rows)
    sorting = sorting_of(known)
    chips, vendors = sorted({r.chip for r in known}), sorted({r.vendor for r in known})
    several = [c for c in chips if sum(r.chip == c for r in known) > 1]
    by_chip = {c: _mean((r for r in known if r.chip == c), sorting) for c in several}
    by_vendor = {v: _mean((r for r in known if r.vendor == v), sorting) for v in vendors}
    return by_chip, by_vendor, _mean(known, sorting), sorting


def _mean(rows: Iterable[Row], sorting: dict[str, float]) -> float:
    return round(statistics.geometric_mean([_own(row, sorting) for row in rows]), 3)


@cache
def check(row: Row, far: int = 0) -> Checked:
    """Return ``row`` predicted from other rows: of its chip if there are any, else of its vendor, else all. ``far``: 1
    leaves out all rows of its chip, 2 all of its vendor."""
    left_out = (lambda r: r is row, lambda r: r.chip == row.chip, lambda r: r.vendor == row.vendor)[far]
    others = tuple(r for r in ROWS if not left_out(r))
    same = [r for r in others if r.chip == row.chip]
    related = [r for r in others if r.vendor == row.vendor]
    basis = same or related or others
    sorting = sorting_of(others)
    factor = _mean(basis, sorting)
    tokens, chosen = predict(row, factor, sorting[row.gathers] if sorts(row) else None)
    alone = sorts(row) and not any(sorts(r) and r.gathers == row.gathers for r in others)
    label = f"{row.chip if same else row.vendor if related else 'others'} ({len(basis)})"
    return Checked(
        row=row,
        own=_own(row, sorting),
        factor=factor,
        basis=label,
        predicted=tokens,
        chosen=chosen,
        far=min(2, alone + (0 if same else 1 if related else 2)),
    )


def errors(far: int) -> dict[Row, float]:
    """Return the logarithms of the errors of the rows that others predict from so far away."""
    made = [check(row, at) for row in ROWS for at in range(far + 1)]
    return {one.row: one.log for one in made if one.far == far}


def held(rows: Sequence[Row]) -> list[tuple[Row, float, bool]]:
    """Return every row with the width of its interval, made of the errors of other rows, and whether it lies in it."""
    found = []
    for row in rows:
        one = check(row)
        width = interval.quantile([error for other, error in errors(one.far).items() if other is not row])
        found.append((row, width, abs(one.log) <= width))
    return found


def seen() -> dict[str, interval.Seen]:
    """Return what was published of each chip and vendor."""
    found = {}
    for key in (*sorted({r.chip for r in ROWS}), *sorted({r.vendor for r in ROWS})):
        rows = [r for r in ROWS if key in (r.chip, r.vendor)]
        numbers = [float(f"{r.shape.active / 1e9:.1f}e9") for r in rows]
        peaks = frozenset(PRECISIONS[r.precision].peak for r in rows)
        found[key] = interval.Seen(
            peaks=peaks, smallest=min(numbers), largest=max(numbers), experts=any(sorts(r) for r in rows)
        )
    return found


def stale() -> list[str]:
    """Return how the constants of ``efficiency`` and ``interval`` differ from the rows; empty if they do not."""
    by_chip, by_vendor, over_all, sorting = fit(ROWS)
    sizes = [abs(check(row).error) for row in ROWS]
    says: dict[str, tuple[object, object]] = {
        "BY_CHIP": (efficiency.BY_CHIP, by_chip),
        "BY_VENDOR": (efficiency.BY_VENDOR, by_vendor),
        "ALL": (efficiency.ALL, over_all),
        "SORTING": (SORTING, sorting),
        "TYPICAL_ERROR": (efficiency.TYPICAL_ERROR, round(statistics.median(sizes), 3)),
        "WORST_ERROR": (efficiency.WORST_ERROR, round(max(sizes), 3)),
        "SPREADS": (interval.SPREADS, tuple(round(interval.quantile(list(errors(n).values())), 3) for n in range(3))),
        "SEEN": (interval.SEEN, seen()),
    }
    return [f"{name} is {there}, the rows say {said}" for name, (there, said) in says.items() if there != said]


def main() -> int:
    from benchmarks.plan_published_page import report

    text = report()
    print(text)
    for line in stale():
        print(f"portatrain/plan/cost: {line}", file=sys.stderr)
    if "--write" in sys.argv[1:]:
        page = Path(__file__).parents[1] / "docs" / "measured" / "plan-published.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(text, encoding="utf-8")
    return 1 if stale() else 0


if __name__ == "__main__":
    sys.exit(main())
