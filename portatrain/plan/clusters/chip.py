"""Describe a kind of accelerator: the figures of one chip, and the network between chips of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from portatrain.plan.clusters.figures import Figure, Raw, figure

GIB = 2**30
KINDS = ("torus", "switched", "mesh", "single", "streaming")

# Entry of a catalog row -> unit. Everything in such a row is per chip; bandwidths are per direction.
_UNITS = {
    "memory_gib": "GiB",
    "memory_gb": "GB",
    "memory_bw": "GB/s",
    "link": "GB/s",
    "scale_up": "GB/s",
    "scale_up_measured": "GB/s",
    "scale_up_z": "GB/s",
    "die_to_die": "GB/s",
    "scale_out": "Gbit/s",
    "domain": "chips",
    "domain_egress": "GB/s",
    "chips_per_host": "chips",
    "power": "W",
    "links": "links",
    "matrix_unit": "rows",
}


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One row of the catalog.

    ``kind`` is the network of one scale-up domain: ``torus`` (each chip to its neighbours), ``switched`` (all to all at
    full rate), ``mesh`` (a link to each other chip, so that a group of k chips uses only k - 1 links), ``single`` (no
    scale-up network), ``streaming`` (weights live outside the chip). ``devices_per_chip``: the number of devices that
    the framework shows for a chip; a mesh consists of devices. ``offered``: the chip is in use for training today, so
    it is proposed. ``peaks``: dense TFLOP/s by precision.
    ``matrix_unit``: rows and columns of a systolic array; a smaller matmul leaves part of it idle. ``prices``: list
    prices in USD per chip-hour.
    """

    name: str
    vendor: str
    kind: str
    stack: str
    memory: Figure
    peaks: Mapping[str, Figure]
    memory_bw: Figure | None = None
    link: Figure | None = None
    links: Figure | None = None
    scale_up: Figure | None = None
    scale_up_measured: Figure | None = None
    scale_up_z: Figure | None = None
    die_to_die: Figure | None = None
    domain: Figure | None = None
    domain_egress: Figure | None = None
    scale_out: Figure | None = None
    chips_per_host: Figure | None = None
    power: Figure | None = None
    matrix_unit: Figure | None = None
    prices: Mapping[str, Figure] = field(default_factory=dict)
    devices_per_chip: int = 1
    aliases: tuple[str, ...] = ()
    skus: tuple[str, ...] = ()
    slice_rule: str = ""
    jax_kind: str = ""
    aot: str = ""
    status: str = ""
    offered: bool = True
    unpublished: tuple[str, ...] = ()
    """Figures that a plan needs and that nobody has published."""
    backend: str = ""
    """The backend for a chip of another package whose ``stack`` is not in the catalog."""

    @property
    def memory_bytes(self) -> float:
        """Return the bytes of device memory on one chip, as the vendor states it."""
        return self.memory.value * (GIB if self.memory.unit == "GiB" else 1e9)

    @property
    def unplanned(self) -> str:
        """Return the reason why a plan is impossible; '' for a chip that can be planned."""
        if self.unpublished:
            *most, last = self.unpublished
            what = f"{', '.join(most)} and {last}" if most else last
            return f"{what} {'are' if most else 'is'} not published"
        return self.status if self.kind == "streaming" else ""

    @property
    def chips_in_host(self) -> int:
        return int(self.chips_per_host.value) if self.chips_per_host else 1

    @property
    def chips_in_domain(self) -> int:
        return int(self.domain.value) if self.domain else 1

    @property
    def link_bw(self) -> float:
        """Return the GB/s of one scale-up link in one direction (switched: of the whole chip, measured if known)."""
        best = self.link if self.kind in ("torus", "mesh") else (self.scale_up_measured or self.scale_up)
        return best.value if best else 0.0

    @property
    def scale_out_bw(self) -> float:
        """Return the GB/s of one chip's share of the network between domains, in one direction."""
        if self.scale_out is not None:
            return self.scale_out.value / 8
        return self.scale_up.value if self.kind == "single" and self.scale_up else 0.0

    def figures(self) -> dict[str, Figure]:
        """Return every figure of the row by name, as ``portatrain clusters NAME`` shows them."""
        found = {f"{precision} peak": peak for precision, peak in self.peaks.items()}
        for name in ("memory", *_UNITS):
            value = getattr(self, name, None)
            if isinstance(value, Figure):
                found[name.replace("_", " ")] = value
        return found | {f"price, {kind}": price for kind, price in self.prices.items()}


def chip(
    name: str,
    *,
    source: str,
    price_source: str = "prices",
    peaks: Mapping[str, float | Raw],
    prices: Mapping[str, float | Raw] | None = None,
    **entries: Any,
) -> Chip:
    """Return a Chip from one row. Bare numbers have the row's source; ``est`` and ``cite`` mark exceptions."""
    kwargs: dict[str, Any] = {}
    for key, value in entries.items():
        if key in _UNITS and value is not None:
            field_name = "memory" if key in ("memory_gib", "memory_gb") else key
            kwargs[field_name] = figure(value, _UNITS[key], source)
        else:
            kwargs[key] = value
    return Chip(
        name=name,
        peaks={precision: figure(raw, "TFLOP/s", source) for precision, raw in peaks.items()},
        prices={kind: figure(raw, "USD/chip-hour", price_source) for kind, raw in (prices or {}).items()},
        **kwargs,
    )
