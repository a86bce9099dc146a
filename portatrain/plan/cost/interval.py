"""Say how far a predicted step may be off: an interval that holds four of five published runs.

A published run is predicted from others, and the logarithm of its error is kept (`python -m benchmarks.plan_published`
prints the numbers below; a test holds the two together). How far the others are from it makes three groups: its own
chip is among theirs, or only its vendor, or not even that. The width of a group is the conformal quantile of its
errors' sizes: the ceil(0.8 (n + 1))-th smallest of n (Vovk, Gammerman and Shafer 2005, section 2.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from portatrain.plan.clusters.chip import Chip
from portatrain.plan.cost.policy import PRECISIONS
from portatrain.plan.cost.shapes import ModelShape

LEVEL = 0.8
"""The share of published runs that the interval is to hold."""

SPREADS = (0.106, 0.26, 0.457)
"""The width of each group, as |log(predicted / published)|: chip, vendor, other vendors."""

NEAR = ("published runs on this chip", "published runs on other chips of its vendor", "published runs of other vendors")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The published runs on a chip or of a vendor. ``peaks``: matmul precisions. ``smallest``, ``largest``: the numbers
    that a token is multiplied with. ``experts``: whether experts without a capacity are among them."""

    peaks: frozenset[str]
    smallest: float
    largest: float
    experts: bool = False


SEEN: dict[str, Seen] = {
    "gb200": Seen(peaks=frozenset({"fp8"}), smallest=69.5e9, largest=69.5e9, experts=False),
    "gb300": Seen(peaks=frozenset({"fp8"}), smallest=69.5e9, largest=69.5e9, experts=False),
    "h100-sxm": Seen(peaks=frozenset({"fp8"}), smallest=69.5e9, largest=403.7e9, experts=False),
    "h100-sxm of 500 W": Seen(peaks=frozenset({"bf16"}), smallest=7.5e9, largest=69.5e9, experts=False),
    "tpu-7x": Seen(peaks=frozenset({"bf16"}), smallest=21.6e9, largest=403.7e9, experts=True),
    "tpu-v5p": Seen(peaks=frozenset({"bf16"}), smallest=12.7e9, largest=68.7e9, experts=True),
    "tpu-v6e": Seen(peaks=frozenset({"bf16"}), smallest=7.5e9, largest=69.5e9, experts=False),
    "google": Seen(peaks=frozenset({"bf16"}), smallest=7.5e9, largest=403.7e9, experts=True),
    "nvidia": Seen(peaks=frozenset({"bf16", "fp8"}), smallest=7.5e9, largest=403.7e9, experts=False),
}
"""By chip and by vendor."""

FARTHER = 4.0
"""A model this many times smaller or larger than all that were seen is not near any of them."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A factor on the predicted time, either way. ``far``: 0, 1 or 2, the group. ``why``: what was seen, and what of
    the plan was not."""

    factor: float
    far: int
    why: str
    level: float = LEVEL

    def around(self, seconds: float) -> tuple[float, float]:
        """Return the lower and the upper end around a predicted time."""
        return seconds / self.factor, seconds * self.factor


def interval(chip: Chip, shape: ModelShape, precision: str) -> Interval:
    """Return the interval for a plan of ``shape`` on ``chip``.

    A precision, a size or experts that no published run on the chip has make the group one farther each, and so do
    those that none on a chip of the vendor has; of the two, the nearer group counts.
    """
    found = []
    for group, name in enumerate((chip.name, chip.vendor)):
        if name in SEEN:
            unlike = _unlike(SEEN[name], shape, precision)
            found.append((min(2, group + len(unlike)), NEAR[group] + (f" ({', '.join(unlike)})" if unlike else "")))
    far, why = min([*found, (2, NEAR[2])], key=lambda group: group[0])
    return Interval(factor=math.exp(SPREADS[far]), far=far, why=why)


def _unlike(seen: Seen, shape: ModelShape, precision: str) -> list[str]:
    """Return what of a plan is like none of the runs."""
    found = []
    if PRECISIONS[precision].peak not in seen.peaks:
        found.append(f"none in {precision}")
    if not seen.smallest / FARTHER <= shape.active <= seen.largest * FARTHER:
        found.append("none near this size")
    if shape.experts and shape.capacity == 1.0 and not seen.experts:
        found.append("none with such experts")
    return found


def quantile(errors: list[float]) -> float:
    """Return the width that ``errors``, the logarithms of a group, give; the largest if they are too few."""
    sizes = sorted(abs(error) for error in errors)
    return sizes[min(len(sizes), math.ceil(LEVEL * (len(sizes) + 1))) - 1]
