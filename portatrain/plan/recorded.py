"""Plan a run that is about to start, on its own devices. The plan is stored as ``attempts/K/plan.json``: a report
compares it with the measurement, and `portatrain plan --calibrate` learns from it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from portatrain.backends.program import Program
from portatrain.errors import UserError
from portatrain.model.layout import Mesh
from portatrain.plan.as_json import candidate
from portatrain.plan.attending import grouped_name_of, name_of, priced
from portatrain.plan.clusters import names
from portatrain.plan.clusters.catalog import CHIPS
from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.clusters.gpu_devices import AMD_DEVICES, DEVICES
from portatrain.plan.clusters.slices import RULES, default_shape, text
from portatrain.plan.cost import device_order as orders
from portatrain.plan.cost import recipes
from portatrain.plan.cost.efficiency import Efficiency, of
from portatrain.plan.cost.memory import memory
from portatrain.plan.cost.placement import assign_axes, coordinates
from portatrain.plan.cost.policy import PRECISIONS, REMATS, tuning_of
from portatrain.plan.cost.tensors import sizes_of
from portatrain.plan.cost.timing import rates, step_time
from portatrain.plan.cost.workload import on_mesh
from portatrain.plan.result import Candidate
from portatrain.recipe import Recipe

FORMAT = 1


def of_run(recipe: Recipe, mesh: Mesh, device: str, *, efficiency: Efficiency | None = None) -> dict[str, Any]:
    """Return the plan of ``recipe`` on ``mesh``, of devices that the framework names ``device``, as plain data.

    If it cannot be planned, ``planned`` is False and ``why`` gives the reason; the run starts all the same.
    """
    about: dict[str, Any] = {"format": FORMAT, "recipe": recipe.name, "device": device, "mesh": str(mesh)}
    chip = chip_of(device)
    if chip is None:
        return about | {"planned": False, "why": f"no chip of the catalog is called {device!r}"}
    if recipe.remat not in REMATS:
        return about | {"planned": False, "why": f"remat {recipe.remat!r} is not one of {', '.join(REMATS)}"}
    cluster = _cluster(chip, mesh.devices)
    if isinstance(cluster, str):
        return about | {"planned": False, "why": cluster}
    try:
        factor = efficiency or of(chip)
        one = _way(recipe, mesh, cluster, factor)
    except UserError as error:
        one = str(error)
    if isinstance(one, str):
        return about | {"planned": False, "why": one}
    return about | {
        "planned": True,
        "cluster": cluster.name,
        "chip": chip.name,
        "devices": mesh.devices,
        "efficiency": factor.value,
        "efficiency_from": factor.basis,
        "plan": candidate(one),
    }


def device_order(recipe: Recipe, mesh: Mesh, devices: Sequence[Any]) -> list[Any]:
    """Return ``devices`` in the order in which the plan of ``recipe`` lays ``mesh`` on their torus, so that mesh axes
    follow torus axes. Devices without a torus keep their order, since they are numbered along hosts already.

    ``devices`` are JAX's: on a TPU they know their coordinates and their slice.
    """
    if mesh.devices != len(devices) or not all(getattr(d, "coords", None) is not None for d in devices):
        return list(devices)
    chip = chip_of(devices[0].device_kind)
    if chip is None or chip.kind != "torus":
        return list(devices)
    dims = tuple(1 + max(axis) for axis in zip(*(device.coords for device in devices), strict=True))
    slices = 1 + max(getattr(device, "slice_index", 0) or 0 for device in devices)
    rank = RULES[chip.name].rank
    try:
        cluster = names.build(chip, text(dims[:rank]), multislice=slices)
        one = _way(recipe, mesh, cluster, of(chip))
    except UserError:  # a slice that the catalog does not have
        return list(devices)
    if isinstance(one, str):
        return list(devices)
    return orders.ordered(devices, coordinates(cluster, one.mesh, one.placement))


def measured(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return step seconds and peak memory of an attempt from its metrics.jsonl; None if it took too few steps.

    The first two steps compile and are left out; the result is the median of the others.
    """
    import statistics

    known = [row for row in rows if not row.get("skipped")]
    steps = [float(row["step_s"]) for row in known[2:] if row.get("step_s")]
    if len(steps) < 3:
        return None
    peaks = [int(row["memory_bytes"]) for row in known if row.get("memory_bytes")]
    return {"step_s": statistics.median(steps), "steps": len(steps), "memory_bytes": max(peaks, default=None)}


def chip_of(device: str) -> Chip | None:
    """Return the chip that a framework calls ``device``, or None if the catalog has none.

    Examples of names: 'TPU v5', 'NVIDIA H100 80GB HBM3', 'cpu (x86_64)'.
    """
    if device.startswith("cpu"):
        return CHIPS["cpu"]
    for chip in CHIPS.values():
        if chip.jax_kind and chip.jax_kind == device:
            return chip
    reported = {name: one.name for name, one in DEVICES.items()} | {name: one.name for name, one in AMD_DEVICES.items()}
    return next((CHIPS[name] for name, start in reported.items() if device.startswith(start)), None)


def _cluster(chip: Chip, devices: int) -> Cluster | str:
    chips, odd = divmod(devices, chip.devices_per_chip)
    if odd:
        return f"{devices} devices are not a whole number of {chip.name} chips"
    if chip.name == "cpu":
        return names.parse(f"cpu-{devices}")
    try:
        return names.build(chip, _size(chip, chips))
    except UserError as error:
        return str(error)


def _size(chip: Chip, chips: int) -> str:
    """Return the size suffix of a cluster name: a topology for TPU slices, a count otherwise."""
    dims = default_shape(chip.name, chips) if chip.name in RULES else None
    return text(dims) if dims else str(chips)


def _way(recipe: Recipe, mesh: Mesh, cluster: Cluster, factor: Efficiency) -> Candidate | str:
    """Return the candidate of the recipe's own mesh, microbatch and remat policy, or why it has none."""
    shape, sizes = recipes.shape_of(recipe), sizes_of(mesh)
    precision, remat, tuning = PRECISIONS[recipe.precision], REMATS[recipe.remat], tuning_of(cluster.chip.stack)
    work = on_mesh(shape, sizes)
    rows, odd = divmod(recipe.batch, work.rows * recipe.accumulation)
    if odd:
        return f"batch={recipe.batch} does not divide over the mesh"
    places = assign_axes(cluster, sizes, cluster.devices)
    if isinstance(places, str):
        return places
    tuning = priced(tuning, shape, sizes, rows, precision)
    need = memory(
        work,
        tokens=rows * work.seq,
        accumulation=recipe.accumulation,
        remat=remat,
        precision=precision,
        slot_bytes=shape.slot_bytes,
        tuning=tuning,
    )
    ways = [
        Candidate(
            mesh=sizes,
            rows=rows,
            accumulation=recipe.accumulation,
            remat=remat.name,
            precision=precision.name,
            placement=where,
            memory=need,
            kernel=name_of(shape, sizes, rows, precision, tuning),
            grouped=grouped_name_of(shape, sizes, rows, precision, tuning),
            time=step_time(
                work,
                where,
                tokens=rows * work.seq,
                accumulation=recipe.accumulation,
                remat=remat,
                precision=precision,
                slot_bytes=shape.slot_bytes,
                rate=rates(cluster.chip, precision, factor.value),
                tuning=tuning,
            ),
        )
        for where in places
    ]
    return min(ways, key=lambda one: one.step_s)


def with_factor(recipe: Recipe, mesh: Mesh, device: str, value: float) -> float | None:
    """Return the planned seconds of a step at an efficiency factor; None if it cannot be planned."""
    made = of_run(recipe, mesh, device, efficiency=Efficiency(value=value, basis="given"))
    return float(made["plan"]["step_s"]) if made["planned"] else None


def ordered(program: Program, recipe: Recipe) -> Program:
    """Return `program` with the order of devices that the plan of `recipe` wants on its mesh."""
    return replace(program, order=functools.partial(device_order, recipe, program.layout.mesh))
