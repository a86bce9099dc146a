"""Compare published training speeds with the planner's predictions: its errors, and the factors fitted to the speeds.

    python -m benchmarks.plan_published [--write]      # --write also writes docs/measured/plan-published.md

Each row of ``published_rows`` is predicted with its publisher's mesh, microbatch and remat policy. A row's own
factor is the efficiency at which the prediction equals what was published. A chip with several rows gets their
geometric mean, any other chip that of its vendor. Every error is leave-one-out: the row is predicted with a
factor fitted without it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.plan_published_rows import ROWS, Row
from portatrain.plan.cost import efficiency
from portatrain.plan.cost.efficiency import Efficiency
from portatrain.plan.cost.memory import memory
from portatrain.plan.cost.placement import assign_axes
from portatrain.plan.cost.policy import PRECISIONS, TUNING
from portatrain.plan.cost.timing import rates, step_time
from portatrain.plan.cost.workload import on_mesh
from portatrain.plan.result import Candidate
from portatrain.plan.search import plan

BOUND = 0.15
SAMPLES_PER_DEVICE = (1, 2, 4, 8)  # tried where the publisher's mesh cannot be planned


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A row with its own factor, the factor fitted without it, and the prediction by that factor."""

    row: Row
    own: float
    factor: float
    basis: str
    predicted: float
    chosen: Candidate

    @property
    def error(self) -> float:
        return self.predicted / self.row.tokens - 1


@cache
def predict(row: Row, factor: float) -> tuple[float, Candidate]:
    """Return tokens a second and chip at an efficiency factor, and the configuration."""
    if row.mesh is None:
        return searched(row, factor)
    cluster, precision = row.on, PRECISIONS[row.precision]
    tuning = replace(TUNING[cluster.chip.stack], skips_masked=True)  # publishers use kernels of their own
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
            tuning=replace(TUNING[cluster.chip.stack], skips_masked=True),
            hints=False,
        )
        if made.best and (best is None or made.tokens_per_s / cluster.chips > best[0]):
            best = made.tokens_per_s / cluster.chips, made.best[0]
    if best is None:
        raise ValueError(f"no plan for {row.model} on {row.cluster}")
    return best


@cache
def own_factor(row: Row) -> float:
    """Return the efficiency at which the prediction equals the published figure, to three digits."""
    low, high = 0.05, 2.0
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if predict(row, middle)[0] < row.tokens else (low, middle)
    return round((low + high) / 2, 3)


def fit(rows: Iterable[Row]) -> tuple[dict[str, float], dict[str, float], float]:
    """Return (by chip, by vendor, over all) factors of ``rows``: geometric means of their own."""
    known = list(rows)
    chips, vendors = sorted({r.chip for r in known}), sorted({r.vendor for r in known})
    by_chip = {c: _mean(r for r in known if r.chip == c) for c in chips if sum(r.chip == c for r in known) > 1}
    return by_chip, {v: _mean(r for r in known if r.vendor == v) for v in vendors}, _mean(known)


def _mean(rows: Iterable[Row]) -> float:
    return round(statistics.geometric_mean([own_factor(row) for row in rows]), 3)


def check(row: Row) -> Checked:
    """Return ``row`` predicted from all other rows: those of its chip if there are any, else those of its vendor."""
    others = [r for r in ROWS if r is not row]
    same = [r for r in others if r.chip == row.chip]
    basis = same or [r for r in others if r.vendor == row.vendor] or others
    factor = _mean(basis)
    tokens, chosen = predict(row, factor)
    label = f"{row.chip if same else row.vendor} ({len(basis)})"
    return Checked(row=row, own=own_factor(row), factor=factor, basis=label, predicted=tokens, chosen=chosen)


def report() -> str:
    """Return the page docs/measured/plan-published.md."""
    checked = [check(row) for row in ROWS]
    errors = [abs(c.error) for c in checked]
    counted = [abs(c.error) for c in checked if c.row.counted]
    by_chip, by_vendor, over_all = fit(ROWS)
    beyond = [c for c in checked if abs(c.error) > BOUND]
    return "\n".join(
        [
            *_HEAD,
            "| model | chips | precision | published tok/s/chip | predicted | error | own factor | factor used, from "
            "(rows) | mesh; remat; samples | who |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *[_line(one) for one in checked],
            "",
            f"The median leave-one-out error of the {len(checked)} rows is "
            f"**{100 * statistics.median(errors):.1f} %**, "
            f"the largest {100 * max(errors):.0f} %. {len(checked) - len(beyond)} of {len(checked)} are within "
            f"{100 * BOUND:.0f} %. For {len(counted)} rows the number of chips was published with the figure; their "
            f"median error is {100 * statistics.median(counted):.1f} %.",
            "",
            f"Rows with an error above {100 * BOUND:.0f} %:",
            "",
            *(
                [f"- {_name(c)}: {100 * c.error:+.0f} %. {_REASONS.get(_name(c), '')}".rstrip() for c in beyond]
                or ["- none"]
            ),
            "",
            "## Factors, fitted from all rows",
            "",
            "| for | factor |",
            "|---|---|",
            *[f"| {name} | {value:.3f} |" for name, value in by_chip.items()],
            *[f"| any other {name} chip | {value:.3f} |" for name, value in by_vendor.items()],
            f"| a vendor without a row | {over_all:.3f} |",
            "",
            *_TAIL,
        ]
    )


def _name(one: Checked) -> str:
    note = f", {one.row.note}" if one.row.note else ""
    return f"{one.row.model} on {one.row.cluster}, {one.row.precision}{note}"


def _line(one: Checked) -> str:
    row, best = one.row, one.chosen
    chips = f"{row.on.chips} x {row.chip}" + ("" if row.counted else " (of its configuration)")
    who = row.who + (f", {row.note}" if row.note else "") + (f"; {row.utilisation}" if row.utilisation else "")
    own = "" if row.mesh else " (the planner's)"
    how = f"{best.mesh_text}; {best.remat}; {best.rows} x {best.accumulation}{own}"
    return (
        f"| {row.model} | {chips} | {row.precision} | {row.tokens:.0f} | {one.predicted:.0f} "
        f"| {100 * one.error:+.1f} % | {one.own:.3f} | {one.factor:.3f}, {one.basis} | {how} | {who} |"
    )


_HEAD = (
    "# Published speeds beside predictions",
    "",
    "`python -m benchmarks.plan_published --write` writes this page by arithmetic; nothing was run. Each prediction",
    "is leave-one-out: the efficiency factor of a row is fitted from the other rows. Mesh, microbatch and remat",
    "policy come from the publisher's configuration files. The planner has no pipeline stages: if the publisher",
    "used them, the row shows the planner's own best configuration instead, the best of 1, 2, 4 and 8 samples a",
    "device. Offloading of activations is assumed to cost no time. torchtitan's rows ran on an H100 of 96 GB, 2.4",
    "TB/s and 500 W, which is a chip of its own here. A configuration file may belong to another release than the",
    "published figure.",
    "",
    "The constants in `portatrain/plan/cost/policy.py` were set before the first comparison and have not changed",
    "since. In the first comparison the planner searched for every configuration itself; its median error was 25 %.",
    "Since then the rows contain the configuration and the hardware that the publishers state, and remat policies",
    "are described by the activations that they keep.",
    "",
)
_REASONS = {
    "llama2-70b on tpu-v5p-512, bf16, 512 in the name: 256 chips": "It is predicted from the Mixtral row alone.",
    "mixtral-8x7b on tpu-v5p-128, bf16-weights": "It is predicted from the Llama 2 row alone, which has no experts: "
    "of routing and experts of unequal size the planner models only the matmuls.",
    "llama3-8b on h100-8, bf16, eager": "The planner plans compiled steps.",
    "llama3-70b on gb300-64, fp8": "It is predicted from six rows, five of them H100s; its bf16 and fp8 peaks are "
    "estimates.",
}
_TAIL = (
    "A factor is the share of the nominal peak that matmuls reach inside a step. For a vendor without a row, the",
    "planner takes the factor of another vendor, scaled by a figure that was published for both if there is one.",
    "Wherever the planner uses such a factor, it is marked as an estimate.",
    "",
)


def stale() -> list[str]:
    """Return how ``portatrain.plan.cost.efficiency`` differs from the rows; empty if it does not."""
    by_chip, by_vendor, over_all = fit(ROWS)
    have = (efficiency.BY_CHIP, efficiency.BY_VENDOR, efficiency.ALL)
    found = []
    for name, there, fitted in zip(("BY_CHIP", "BY_VENDOR", "ALL"), have, (by_chip, by_vendor, over_all), strict=True):
        if there != fitted:
            found.append(f"{name} is {there}, the rows say {fitted}")
    errors = [abs(check(row).error) for row in ROWS]
    said = (efficiency.TYPICAL_ERROR, efficiency.WORST_ERROR)
    if said != (round(statistics.median(errors), 3), round(max(errors), 3)):
        found.append(f"errors are {said}, the rows say {statistics.median(errors):.3f}, {max(errors):.3f}")
    return found


def main() -> int:
    text = report()
    print(text)
    for line in stale():
        print(f"efficiency.py: {line}", file=sys.stderr)
    if "--write" in sys.argv[1:]:
        page = Path(__file__).parents[1] / "docs" / "measured" / "plan-published.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(text, encoding="utf-8")
    return 1 if stale() else 0


if __name__ == "__main__":
    sys.exit(main())
