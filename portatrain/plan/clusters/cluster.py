"""Describe a cluster: a number of chips of one kind, and the network that joins them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from portatrain.plan.clusters import slices
from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.figures import Figure
from portatrain.system.text import counted


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of ``slices`` equal slices (TPU) or of one set of whole hosts.

    ``dims`` is the torus of one slice, in chips; empty for chips that are joined by a switch or a mesh.
    ``wraps`` says which of its axes close to a ring. ``domain`` is the number of chips that the fast
    network joins: a slice, a host, a rack. ``engine``, ``storage``, ``options`` and ``track`` come from clusters.toml
    and are for the launchers.
    """

    name: str
    chip: Chip
    chips: int
    domain: int
    dims: tuple[int, ...] = ()
    wraps: tuple[bool, ...] = ()
    slices: int = 1
    engine: str = ""
    storage: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    prices: Mapping[str, Figure] = field(default_factory=dict)
    track: tuple[str, ...] = ()
    where: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.chip.name, self.chips, self.where))

    @property
    def devices(self) -> int:
        """The number of devices that the framework shows; the sizes of the mesh must multiply to it."""
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        return self.slices * max(1, math.ceil(self.chips // self.slices / self.chip.chips_in_host))

    @property
    def domains(self) -> int:
        return self.chips // self.domain

    @property
    def topology(self) -> str:
        """Return the network as text: ``4x4x8, all axes wrap``; ``8 domains of 8, point to point``."""
        if self.dims:
            joined = [n for n, wrap in zip(self.dims, self.wraps, strict=True) if wrap]
            rings = {0: "no axis wraps", len(self.dims): "all axes wrap"}.get(
                len(joined), f"{len(joined)} of {len(self.dims)} axes wrap"
            )
            shape = f"torus {slices.text(self.dims)}, {rings}"
            return shape if self.domains == 1 else f"{self.domains} of {shape}"
        if self.chip.kind in ("single", "streaming"):
            return "no scale-up network"
        how = "switched" if self.chip.kind == "switched" else "point to point"
        return f"{counted(self.domains, 'domains')} of {self.domain}, {how}"

    @property
    def price(self) -> tuple[str, Figure] | None:
        """Return the list price used for costs: the user's own, else on demand, else the first in the catalog."""
        known = dict(self.prices) or dict(self.chip.prices)
        for kind in ("on_demand", "on demand"):
            if kind in known:
                return kind, known[kind]
        return next(iter(known.items()), None)
