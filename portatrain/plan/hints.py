"""Suggest changes if a recipe does not fit: more chips, state in bf16, other chips, another optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from portatrain.errors import UserError
from portatrain.plan.attending import priced, refusal
from portatrain.plan.clusters import names
from portatrain.plan.clusters.catalog import CHIPS
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.cost import meshes
from portatrain.plan.cost.memory import memory
from portatrain.plan.cost.policy import PRECISIONS, REMATS, tuning_of
from portatrain.plan.cost.shapes import ADAM_BYTES, ModelShape
from portatrain.plan.cost.workload import on_mesh

MOST_CHIPS = 8192
SHOWN = 5


def least_bytes(shape: ModelShape, cluster: Cluster, precision: str) -> float | None:
    """Return the least memory per device over all meshes, with blocks recomputed and one row per microbatch;
    None if no mesh divides."""
    found = None
    tuning, kind = tuning_of(cluster.chip.stack), PRECISIONS[precision]
    per_domain = cluster.domain * cluster.chip.devices_per_chip
    for mesh in meshes.legal(shape, cluster.devices, per_domain, {}):
        work = on_mesh(shape, mesh)
        rows = shape.batch // work.rows
        need = memory(
            work,
            tokens=work.seq,
            accumulation=rows,
            remat=REMATS["block"],
            precision=kind,
            slot_bytes=shape.slot_bytes,
            tuning=priced(tuning, shape, mesh, 1, kind),
        ).total
        found = need if found is None else min(found, need)
    return found


def could_fit(shape: ModelShape, cluster: Cluster, precision: str) -> bool:
    kind, room = PRECISIONS[precision], cluster.chip.memory_bytes / cluster.chip.devices_per_chip
    if cluster.chip.unplanned or refusal(cluster.chip, kind, tuning_of(cluster.chip.stack)) is not None:
        return False
    # Evenly divided, weights, gradients and optimizer state need this much. Most questions end here.
    each = shape.parameters * (kind.param + kind.grad + shape.slot_bytes * kind.slots) / cluster.devices
    trains_all = all(tensor.trainable for tensor in shape.all_tensors)
    if trains_all and each > room:
        return False
    need = least_bytes(shape, cluster, precision)
    return need is not None and need <= room


def what_would(shape: ModelShape, cluster: Cluster, precisions: Sequence[str]) -> tuple[str, ...]:
    """Return changes after which the recipe would fit, the smallest of each kind; at least one sentence."""
    precision = precisions[0]
    found = []
    more = _more_chips(shape, cluster, precision)
    if more:
        found.append(f"more chips: {more}")
    if precision == "bf16" and could_fit(shape, cluster, "bf16-state"):
        found.append("bf16 weights and optimizer state (--precision bf16-state), which changes the loss curve")
    others = _other_chips(shape, cluster, precision)
    if others:
        found.append(f"the same number of other chips: {', '.join(others)}")
    for slots, rule in ((ADAM_BYTES / 2, "Lion or Muon"), (0.0, "Adafactor")):
        if shape.slot_bytes > slots and could_fit(replace(shape, slot_bytes=slots), cluster, precision):
            found.append(f"the optimizer {rule}, which has a smaller state and changes the loss curve")
            break
    if found:
        return tuple(found)
    if least_bytes(shape, cluster, precision) is None:
        return ("no mesh of this cluster divides the sizes of the recipe",)
    return (f"no change was found: {MOST_CHIPS} chips of this kind, or the same number of other chips, are too few",)


def _more_chips(shape: ModelShape, cluster: Cluster, precision: str) -> str:
    """Return the smallest cluster of the same chip, found by doubling, that could hold the recipe."""
    chips = cluster.chips
    while 2 * chips <= MOST_CHIPS:
        chips *= 2
        made = _of(cluster, cluster.chip.name, chips)
        if made is not None and could_fit(shape, made, precision):
            return made.name
    return ""


def _other_chips(shape: ModelShape, cluster: Cluster, precision: str) -> list[str]:
    """Return the other chips that would hold the recipe in the same number, smallest memory first."""
    found: list[str] = []
    rows = (row for row in CHIPS.values() if row.kind != "single" and not row.unplanned and row.offered)
    for row in sorted(rows, key=lambda row: row.memory_bytes):
        if row.memory_bytes <= cluster.chip.memory_bytes or len(found) == SHOWN:
            continue
        made = _of(cluster, row.name, cluster.chips)
        if made is not None and could_fit(shape, made, precision):
            found.append(row.name)
    return found


def _of(cluster: Cluster, chip: str, chips: int) -> Cluster | None:
    from portatrain.plan.clusters.slices import RULES, default_shape, text

    row = CHIPS[chip]
    try:
        if chip in RULES:
            dims = default_shape(chip, chips)
            return names.build(row, text(dims)) if dims else None
        return names.build(row, str(chips))
    except UserError:
        return None
