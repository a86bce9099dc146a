"""Turn a plan into plain data: ``portatrain plan --json`` prints one object for each cluster."""

from __future__ import annotations

from typing import Any

from portatrain.model.layout import MESH_AXES
from portatrain.plan.cost import efficiency
from portatrain.plan.result import CONVENTION, Candidate, Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data.

    ``status`` is 'fits', 'fits-with' (another batch, which ``notes`` give), 'does-not-fit' or 'not-planned'.
    """
    best = plan.chosen
    found: dict[str, Any] = {
        "cluster": plan.cluster.name,
        "recipe": plan.asked.name,
        "status": status(plan),
        "chips": plan.cluster.chips,
        "chips_used": plan.used.chips,
        "devices_used": plan.used.devices,
        "topology": plan.cluster.topology,
        "batch": plan.shape.batch,
        "seq_len": plan.shape.seq_len,
        "device_memory_bytes": plan.device_bytes,
        "notes": list(plan.notes),
        "would_fit": list(plan.hints),
        "short_bytes": plan.short_bytes,
        "refused": [{"reason": r.reason, "meshes": r.count, "nearest": r.nearest} for r in plan.refused],
        "work": {"meshes": plan.counts.meshes, "memories": plan.counts.memories, "times": plan.counts.times},
    }
    if best is None:
        return found
    price = plan.cluster.price
    return found | {
        "plan": candidate(best),
        "others": [candidate(one) | {"why_not": one.why(best)} for one in plan.best[1:]],
        **between(plan),
        "tokens_per_s": plan.tokens_per_s,
        "tokens_per_s_per_chip": plan.tokens_per_s / plan.cluster.chips,
        "mfu": plan.mfu,
        "mfu_convention": CONVENTION,
        "mfu_peak_flops": plan.peak,
        "days_per_run": plan.days,
        "usd_per_billion_tokens": plan.usd_per_billion,
        "usd_per_run": plan.usd_per_run,
        "price": {"list": price[0], **price[1].as_json()} if price else None,
        "kwh_per_billion_tokens": plan.kwh_per_billion,
        "kwh_per_run": plan.kwh_per_run,
        "confidence": confidence(plan),
    }


def between(plan: Plan) -> dict[str, Any]:
    """Return the interval of the best candidate's step time, and of tokens a second and chip."""
    said = plan.interval
    if said is None:
        return {}
    low, high = said.around(plan.best[0].step_s)
    each = plan.shape.tokens_per_step / plan.cluster.chips
    return {
        "step_s_low": low,
        "step_s_high": high,
        "tokens_per_s_per_chip_low": each / high,
        "tokens_per_s_per_chip_high": each / low,
        "interval": {"holds": said.level, "factor": said.factor, "from": said.why},
    }


def candidate(one: Candidate) -> dict[str, Any]:
    return {
        "mesh": dict(zip(MESH_AXES, one.mesh, strict=True)),
        "rows": one.rows,
        "accumulation": one.accumulation,
        "remat": one.remat,
        "precision": one.precision,
        "attention_kernel": one.kernel,
        "grouped_matmul_kernel": one.grouped,
        "step_s": one.step_s,
        "memory_bytes": one.memory.terms(),
        "memory_total_bytes": one.memory.total,
        "time_s": one.time.terms(),
        "collectives_busy_s": dict(zip(MESH_AXES, one.time.busy, strict=True)),
        "placement": {
            axis: path.where for axis, path in zip(MESH_AXES, one.placement.paths, strict=True) if path.size > 1
        },
        "torus_order": [
            {"mesh_axis": axis, "torus_axis": piece.dim, "length": piece.length, "stride": piece.stride}
            for axis, pieces in zip(MESH_AXES, one.placement.order or ((),) * 5, strict=True)
            for piece in pieces
        ],
    }


def status(plan: Plan) -> str:
    if plan.best:
        return "fits" if plan.fits else "fits-with"
    return "not-planned" if plan.unplanned else "does-not-fit"


def confidence(plan: Plan) -> dict[str, Any]:
    """Return the estimates behind memory, time, usd and kwh; for time also the error seen on published runs."""
    found: dict[str, Any] = {name: {"estimates": list(marks)} for name, marks in plan.estimates().items()}
    found["time"] |= {
        "efficiency": plan.efficiency.value,
        "efficiency_from": plan.efficiency.basis,
        "typical_error": efficiency.TYPICAL_ERROR,
        "worst_error": efficiency.WORST_ERROR,
    }
    return found
