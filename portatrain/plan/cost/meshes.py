"""The meshes that a recipe allows on a number of devices, and the reasons that rule out the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from portatrain.model.layout import BATCH_MESH_AXES, COMPUTE, MESH_AXES
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.cost.shapes import ModelShape
from portatrain.plan.cost.tensors import Sizes, Split
from portatrain.plan.cost.workload import CONTEXT, EXPERT, FSDP, TENSOR

NEAR = 0.25
"""The largest relative distance from the recipe's batch at which another batch is looked for."""


@dataclass(frozen=True)
class Rules:
    """Every dimension of a recipe that a mesh axis shards, each once."""

    splits: tuple[Split, ...]
    batch: Split

    def axis(self, index: int, size: int) -> str | None:
        """Return the reason why the mesh axis alone cannot have that size; None if it can."""
        alone = tuple(size if i == index else 1 for i in range(5))
        for split in (*self.splits, self.batch):
            if index in split.over and not split.fits(alone):  # type: ignore[arg-type]
                return f"{MESH_AXES[index]} does not divide {split.axis}={split.size}"
        return None

    def fits(self, mesh: Sizes) -> bool:
        return self.batch.fits(mesh) and all(split.fits(mesh) for split in self.splits)


def rules(shape: ModelShape) -> Rules:
    """Return the divisibility rules of a recipe: the rules of ``model.layout`` for its tensors and its batches."""
    mapping = {**COMPUTE, **shape.compute}

    def over(axis: str) -> tuple[int, ...]:
        names = mapping.get(axis, ())
        return tuple(MESH_AXES.index(n) for n in ((names,) if isinstance(names, str) else names))

    splits = {split for part in shape.groups for split in (*part.params, *part.compute)}
    splits |= {Split(axis, shape.seq_len, over(axis)) for axis in ("seq", "res_seq")}
    batch = Split("batch", shape.batch, over("batch") or tuple(map(MESH_AXES.index, BATCH_MESH_AXES)))
    return Rules(tuple(sorted(splits, key=lambda s: (s.axis, s.size, s.over))), batch)


def used_axes(shape: ModelShape) -> set[int]:
    """Return the mesh axes that shard part of the model; devices on any other axis only repeat work."""
    found = {0} | {axis for part in shape.groups for split in part.params for axis in split.over}
    if shape.heads and shape.seq_len > 1:
        found.add(CONTEXT)
    return found


def legal(shape: ModelShape, devices: int, per_domain: int, refused: dict[str, int]) -> Iterator[Sizes]:
    """Return the legal meshes of exactly ``devices``; count the others in ``refused``, by reason."""
    checks = rules(shape)
    useful = used_axes(shape)
    sizes: dict[int, list[int]] = {}
    for axis in (TENSOR, CONTEXT, EXPERT, FSDP):
        sizes[axis] = []
        for size in divisors(devices) if axis in useful else (1,):
            why = checks.axis(axis, size)
            if axis == CONTEXT and size > 1 and shape.recurrence:
                why = "context would split the positions of recurrent layers"
            if why is None and axis == TENSOR and size > per_domain:
                why = "the tensor axis would leave its fast domain"
            if why is None:
                sizes[axis].append(size)
            else:
                refused[why] = refused.get(why, 0) + 1
    for tensor in sizes[TENSOR]:
        for context in sizes[CONTEXT]:
            for expert in sizes[EXPERT]:
                rest, odd = divmod(devices, tensor * context * expert)
                if odd:
                    continue
                if shape.batch % (rest * expert):
                    why = f"batch={shape.batch} does not divide over the devices that the other axes leave"
                    refused[why] = refused.get(why, 0) + 1
                    continue
                for fsdp in sizes[FSDP]:
                    if rest % fsdp == 0:
                        mesh = (rest // fsdp, fsdp, expert, context, tensor)
                        if checks.fits(mesh):
                            yield mesh
                        else:
                            why = "axes that divide alone do not divide together"
                            refused[why] = refused.get(why, 0) + 1


def _cores(shape: ModelShape, most: int, per_domain: int) -> Iterator[int]:
    """Return the products of tensor, context and expert sizes that the recipe allows, up to ``most``."""
    checks, useful = rules(shape), used_axes(shape)

    def allowed(axis: int, limit: int) -> list[int]:
        if axis not in useful or (axis == CONTEXT and shape.recurrence):
            return [1]
        bound = max((s.size for s in checks.splits if axis in s.over), default=1)
        return [n for n in range(1, min(limit, bound) + 1) if bound % n == 0 and checks.axis(axis, n) is None]

    for tensor in allowed(TENSOR, per_domain):
        for context in allowed(CONTEXT, 64):
            for expert in allowed(EXPERT, most):
                core = tensor * context * expert
                alone = (1, 1, expert, context, tensor)
                if core <= most and all(split.fits(alone) for split in checks.splits):
                    yield core


def most_usable(shape: ModelShape, cluster: Cluster) -> Cluster | None:
    """Return the largest part of the cluster, in whole hosts or slices, over which the recipe's batch divides."""
    chip, per_domain = cluster.chip, cluster.domain * cluster.chip.devices_per_chip
    shards = divisors(shape.batch)
    counts = {
        core * rows
        for core in set(_cores(shape, cluster.devices, per_domain))
        for rows in shards
        if core * rows < cluster.devices
    }
    for devices in sorted(counts, reverse=True):
        part = _part(cluster, devices // chip.devices_per_chip) if devices % chip.devices_per_chip == 0 else None
        if part is not None and any(True for _ in legal(shape, devices, part.domain * chip.devices_per_chip, {})):
            return part
    return None


def _part(cluster: Cluster, chips: int) -> Cluster | None:
    """Return ``chips`` of the cluster as equal shares of its domains; None if they fill no whole hosts."""
    if cluster.dims:
        if chips % cluster.domain:
            return None
        slices = chips // cluster.domain if cluster.slices > 1 else 1
        return replace(cluster, chips=chips, slices=slices)
    host = min(cluster.chip.chips_in_host, cluster.domain)
    for domain in range(cluster.domain, 0, -1):
        inside = domain % host == 0 or (chips == domain and host % domain == 0)
        if inside and chips % domain == 0 and chips // domain <= cluster.domains:
            return replace(cluster, chips=chips, domain=domain)
    return None


def near_batches(shape: ModelShape, cluster: Cluster, n: int = 6) -> tuple[int, ...]:
    """Return batches within a quarter of the recipe's for which a mesh uses all devices, the nearest first: one below
    and one above for every product of the axes that are not data parallel, small products first."""
    devices, per_domain = cluster.devices, cluster.domain * cluster.chip.devices_per_chip
    found: list[int] = []
    for core in sorted(set(_cores(shape, devices, per_domain))):
        rows, odd = divmod(devices, core)
        if odd:
            continue
        for batch in (shape.batch // rows * rows, -(-shape.batch // rows) * rows):
            if batch and abs(batch - shape.batch) <= NEAR * shape.batch and batch not in found:
                found.append(batch)
    return tuple(sorted(found[:n], key=lambda batch: abs(batch - shape.batch)))


@cache
def divisors(n: int) -> tuple[int, ...]:
    """Return the divisors of ``n``, in increasing order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(small + [n // d for d in reversed(small) if d * d != n])
