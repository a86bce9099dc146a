"""Show plans as tables on a terminal, and as a plot of cost against time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

from portatrain.plan.cost import efficiency
from portatrain.plan.cost.interval import LEVEL
from portatrain.plan.result import CONVENTION, Plan
from portatrain.system.svg import COLOURS, Scale, document, frame

GIB = 2**30


def show(plans: Sequence[Plan], console: Console, *, details: bool) -> None:
    """Print one table over all clusters; with ``details``, then all tables of each cluster."""
    console.print(_overview(plans))
    for plan in plans:
        for note in plan.notes:
            console.print(f"{plan.cluster.name}: {note}", soft_wrap=True)
        if not plan.best:
            console.print(f"{plan.cluster.name}: {_misfit(plan)}", soft_wrap=True)
    for plan in plans if details else ():
        _details(plan, console)
    console.print(_legend(plans), style="dim")


def _overview(plans: Sequence[Plan]) -> Table:
    shape = plans[0].asked
    title = f"{shape.name}: {_count(shape.parameters)} parameters, batch {shape.batch} x {shape.seq_len}"
    table = Table(title=title)
    left = ("cluster", "mesh", "microbatch", "remat")
    for name in (
        *left[:1],
        "fits",
        *left[1:],
        "GiB",
        "step s",
        f"{100 * LEVEL:.0f} %",
        "tok/s/chip",
        "MFU",
        "days",
        "$/Btok",
        "k$",
        "kWh/Btok",
    ):
        loose = name in ("mesh", "remat")
        table.add_column(
            name, justify="left" if name in left else "right", overflow="fold", min_width=9 if loose else None
        )
    for plan in plans:
        one = plan.chosen
        if one is None:
            short = f"{plan.short_bytes / GIB:.1f} GiB short" if plan.short_bytes else "no"
            table.add_row(plan.cluster.name, short, *["-"] * 12)
            continue
        marks = plan.estimates()
        table.add_row(
            plan.cluster.name,
            "yes" if plan.fits else f"batch {plan.shape.batch}",
            _mesh(one.mesh_text),
            f"{one.rows} x {one.accumulation}",
            one.remat + (f", {one.precision}" if one.precision != "bf16" else ""),
            _mark(f"{one.memory.total / GIB:.1f}/{plan.device_bytes / GIB:.0f}", marks["memory"]),
            _mark(_number(one.step_s), marks["time"]),
            _between(plan),
            _number(plan.tokens_per_s / plan.cluster.chips),
            f"{100 * plan.mfu:.0f} %",
            _number(plan.days),
            _mark(_number(plan.usd_per_billion), marks["usd"]),
            _number(plan.usd_per_run and plan.usd_per_run / 1000),
            _mark(_number(plan.kwh_per_billion), marks["kwh"]),
        )
    return table


def _misfit(plan: Plan) -> str:
    if plan.unplanned:
        return f"not planned: {plan.unplanned}"
    if plan.short_bytes is None:
        return f"no mesh divides the sizes of the recipe. Possible changes: {'; '.join(plan.hints)}."
    near = next((r.nearest for r in plan.refused if r.reason.startswith("does not fit")), "")
    return (
        f"does not fit by {plan.short_bytes / GIB:.1f} GiB a device ({near}, with one sample a microbatch and blocks "
        f"recomputed if that helps). Changes with which it would fit: {'; '.join(plan.hints)}."
    )


def _details(plan: Plan, console: Console) -> None:
    best = plan.chosen
    if best is not None:
        console.print(_terms(plan))
        where = Table(
            "mesh axis", "where", title=f"{plan.cluster.name} ({plan.used.topology}): how the mesh maps to the hardware"
        )
        for axis, path in zip(("replica", "fsdp", "expert", "context", "tensor"), best.placement.paths, strict=True):
            if path.size > 1:
                inside = f"; {path.rate / 1e9:.0f} GB/s a device inside" if path.inner > 1 else ""
                outside = f"; {path.egress / 1e9:.3g} GB/s a device between" if path.outer > 1 else ""
                where.add_row(f"{axis} = {path.size}", path.where + inside + outside)
        console.print(where)
        table = Table("mesh", "microbatch", "remat", "GiB", "step s", "why", title=f"{plan.cluster.name}: the best")
        for one in plan.best:
            table.add_row(
                one.mesh_text,
                f"{one.rows} x {one.accumulation}",
                one.remat,
                f"{one.memory.total / GIB:.1f}",
                _number(one.step_s),
                one.why(best),
            )
        console.print(table)
    table = Table("meshes", "reason", "nearest", title=f"{plan.cluster.name}: why not the others")
    for refused in plan.refused:
        table.add_row(str(refused.count), refused.reason, refused.nearest)
    if plan.refused:
        console.print(table)


def _terms(plan: Plan) -> Table:
    best = plan.best[0]
    table = Table("memory", "GiB", "time", "s", title=f"{plan.cluster.name}: by term, per device and step")
    memory = [(name, f"{size / GIB:.2f}") for name, size in best.memory.terms().items()]
    time = [(name, _number(seconds)) for name, seconds in best.time.terms().items() if seconds]
    for row in range(max(len(memory), len(time))):
        table.add_row(*(memory[row] if row < len(memory) else ("", "")), *(time[row] if row < len(time) else ("", "")))
    table.add_section()
    table.add_row("in all", f"{best.memory.total / GIB:.2f}", "in all", _number(best.step_s))
    if (said := plan.interval) is not None:
        table.add_row("", "", f"{100 * said.level:.0f} % interval, from {said.why}", _between(plan))
    table.add_row("of", f"{plan.device_bytes / GIB:.1f}", "efficiency factor", f"{plan.efficiency.value:.3f}")
    if best.kernel:
        table.add_row("", "", "attention kernel", best.kernel)
    if best.grouped:
        table.add_row("", "", "grouped matmul kernel", best.grouped)
    return table


def _legend(plans: Sequence[Plan]) -> str:
    bases = sorted({f"{p.cluster.chip.name}: {p.efficiency.basis}" for p in plans if p.efficiency.estimate})
    typical, worst = 100 * efficiency.TYPICAL_ERROR, 100 * efficiency.WORST_ERROR
    lines = [
        f"MFU: {CONVENTION}; over the nominal peak of the chips in use. kWh: chips at rated power alone.",
        f"Times: {typical:.0f} % off in the middle and {worst:.0f} % at most on published runs, leave-one-out; "
        f"{100 * LEVEL:.0f} %: the step times that hold so many of them (docs/measured/plan-published.md). "
        "~ rests on an estimate.",
    ]
    if not (asked := plans[0].asked).vocab:
        lines.append(f"{asked.name} has no tokens: tok counts the {asked.seq_len} positions of a sample.")
    if bases:
        lines.append(f"Efficiency factors that are estimates: {'; '.join(bases)}.")
    return "\n".join(lines)


def _between(plan: Plan) -> str:
    """Return the interval of the best candidate's step time."""
    said = plan.interval
    return "-".join(_number(end) for end in said.around(plan.best[0].step_s)) if said else "-"


def plot(plans: Sequence[Plan], path: Path) -> None:
    """Write an SVG: the cost of the run against its days, one point a cluster."""
    points = [(p.days, p.usd_per_run, p.cluster.name) for p in plans if p.days and p.usd_per_run]
    title = f"{plans[0].asked.name}: predicted cost against time"
    parts = ['<text x="480" y="300" text-anchor="middle">no cluster has a price</text>']
    if points:
        days, costs = [when for when, _, _ in points], [usd for _, usd, _ in points]
        x = Scale(low=min(days) / 2, high=max(days) * 3, start=90, end=940, log=True)
        y = Scale(low=min(costs) / 2, high=max(costs) * 2, start=540, end=40, log=True)
        parts = frame(x, y, x_label="days per run", y_label="USD per run, list prices")
        for number, (when, usd, name) in enumerate(points):
            colour = COLOURS[number % len(COLOURS)]
            parts.append(f'<circle cx="{x(when):.1f}" cy="{y(usd):.1f}" r="5" fill="{colour}"/>')
            parts.append(f'<text x="{x(when) + 8:.1f}" y="{y(usd) - 5:.1f}">{escape(name)}</text>')
    path.write_text(document(title, 960, 600, parts), encoding="utf-8")


def _mesh(text: str) -> str:
    """Return the mesh with room to break after each axis."""
    return text.replace(",", ", ")


def _mark(text: str, estimates: tuple[str, ...]) -> str:
    return f"~{text}" if estimates and text != "-" else text


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def _number(value: float | None) -> str:
    """Return the value with three digits and without an exponent."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
