"""Compare the prediction with the compiled program: memory, FLOPs and bytes of collectives of one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from portatrain.plan.attending import priced
from portatrain.plan.compilers.job import Answer
from portatrain.plan.cost.memory import memory
from portatrain.plan.cost.policy import PRECISIONS, REMATS, TUNING, tuning_of
from portatrain.plan.cost.volumes import volumes
from portatrain.plan.cost.workload import on_mesh
from portatrain.plan.result import Candidate, Plan

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The planner's figures for one device and step, from before any compiler has run."""

    peak_bytes: float
    terms: Mapping[str, float]
    flops: float
    collectives: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "peak_bytes": self.peak_bytes,
            "memory_bytes": dict(self.terms),
            "flops": self.flops,
            "collective_bytes": dict(self.collectives),
        }


def predict(plan: Plan, chosen: Candidate, compiler: str) -> Predicted:
    """Return the figures of one candidate as ``compiler`` counts them: XLA's figures are for the jax backend, and a
    trace of torch has neither the runtime nor the allocator's fragments."""
    precision, tuning = PRECISIONS[chosen.precision], tuning_of(plan.cluster.chip.stack)
    if compiler in ("cuda", "rocm"):
        tuning = TUNING["jax-gpu"]
    elif compiler == "fsdp2":
        tuning = replace(tuning, runtime_bytes=0.0, fragmentation=0.0)
    work = on_mesh(plan.shape, chosen.mesh)
    tuning = priced(tuning, plan.shape, chosen.mesh, chosen.rows, precision)
    if compiler == "fsdp2":
        tuning = replace(tuning, skips_masked=False)  # the trace counts all pairs of positions
    remat, tokens = REMATS[chosen.remat], chosen.rows * work.seq
    amounts = volumes(work, tokens=tokens, remat=remat, precision=precision, tuning=tuning)
    need = memory(
        work,
        tokens=tokens,
        accumulation=chosen.accumulation,
        remat=remat,
        precision=precision,
        slot_bytes=plan.shape.slot_bytes,
        tuning=tuning,
    )
    return Predicted(
        peak_bytes=need.total,
        terms=need.terms(),
        flops=amounts.flops(chosen.accumulation),
        collectives=amounts.bytes(chosen.accumulation, precision),
    )


def rows(predicted: Predicted, found: Answer) -> list[tuple[str, float | None, float | None, float, str]]:
    """Return (what, predicted, compiled, divisor, unit) for every quantity."""
    compiled = found.peak_bytes if found.fits else found.needs_bytes
    made = [
        ("peak memory", predicted.peak_bytes, compiled, GIB, "GiB"),
        ("matmul FLOPs", predicted.flops, found.flops, 1e12, "TFLOP"),
    ]
    if asked := found.raw.get("traced_flops_fp8"):  # what the program asks for, beside what the compiler made of it
        made.append(("of them in 8 bits", asked, found.raw.get("flops_fp8"), 1e12, "TFLOP"))
    told = found.collectives
    for axes in sorted({*predicted.collectives, *(told or {})}):
        made.append(
            (
                f"collectives over {axes}",
                predicted.collectives.get(axes, 0.0),
                told.get(axes, 0.0) if told is not None else None,
                GIB,
                "GiB",
            )
        )
    return [(what, a, b, divisor, unit) for what, a, b, divisor, unit in made]


def table(name: str, predicted: Predicted, found: Answer) -> Table:
    how = "from the cache" if found.cached else f"in {found.seconds:.0f} s"
    made = Table(title=f"{name}: predicted beside compiled, a device and a step ({found.compiler}; {how})")
    for column in ("", "predicted", "compiled", "difference", "unit"):
        made.add_column(column, justify="left" if column in ("", "unit") else "right")
    for what, before, after, divisor, unit in rows(predicted, found):
        off = f"{100 * (before / after - 1):+.1f} %" if before is not None and after else "-"
        made.add_row(what, _text(before, divisor), _text(after, divisor), off, unit)
    return made


def as_json(predicted: Predicted, found: Answer) -> dict[str, Any]:
    return {
        "predicted": predicted.as_json(),
        "compiled": {
            "fits": found.fits,
            "peak_bytes": found.peak_bytes,
            "needs_bytes": found.needs_bytes,
            "flops": found.flops,
            "flops_fp8": found.raw.get("flops_fp8"),
            "dots": found.raw.get("dots"),
            "collective_bytes": dict(found.collectives) if found.collectives is not None else None,
            "collective_kinds": found.raw.get("collective_kinds"),
            "compiler": found.compiler,
            "seconds": found.seconds,
            "cached": found.cached,
        },
    }


def _text(value: float | None, divisor: float) -> str:
    return "unknown" if value is None else f"{value / divisor:,.3f}"
