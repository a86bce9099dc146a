"""Place mesh axes on hardware: on torus axes, on the domains of a switch, and across slices.

Devices are numbered row-major over the mesh (``portatrain.model.layout.MESH_AXES``, replica slowest, tensor
fastest). Across slices, hosts or racks the slowest axes are cut first. Inside a torus every mesh axis takes
whole torus axes or parts of them; a part of length n with stride s shares its links with s - 1 others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from portatrain.model.layout import MESH_AXES
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.cost.collectives import NETWORK_HOP_S, SWITCH_HOP_S, TORUS_HOP_S, Path
from portatrain.plan.cost.tensors import Sizes

TENSOR = MESH_AXES.index("tensor")
KEEP = 4  # placements kept of each mesh axis, the fastest first


@dataclass(frozen=True)
class Piece:
    """A part of a torus axis: ``length`` devices, ``stride`` apart, which form a ring or a line."""

    dim: int
    length: int
    stride: int
    ring: bool
    rate: float


Order = tuple[tuple[Piece, ...], ...]
"""The torus pieces of every mesh axis, fastest torus axis first."""

Dim = tuple[int, bool, float]
"""The length of a torus axis, whether it wraps, and GB/s of one of its links in one direction, per device."""


@dataclass(frozen=True)
class Placement:
    """The position of every mesh axis. ``order`` holds the torus pieces of each mesh axis, to order devices by."""

    paths: tuple[Path, Path, Path, Path, Path]
    order: tuple[tuple[Piece, ...], ...] = ()

    def describe(self) -> str:
        return "; ".join(f"{n}={p.size} {p.where}" for n, p in zip(MESH_AXES, self.paths, strict=True) if p.size > 1)


def cut(sizes: Sizes, domains: int) -> tuple[Sizes, Sizes] | None:
    """Split a mesh over ``domains``, slowest axes first: return (outer, inner) sizes, or None if they do not divide."""
    left, outer = domains, []
    for n in sizes:
        part = math.gcd(n, left)
        outer.append(part)
        left //= part
    if left > 1:
        return None
    inner = tuple(n // k for n, k in zip(sizes, outer, strict=True))
    return tuple(outer), inner  # type: ignore[return-value]


def assign_axes(cluster: Cluster, sizes: Sizes, devices: int) -> tuple[Placement, ...] | str:
    """Return the placements of a mesh on ``devices`` of the cluster that are worth timing, or the reason for none."""
    chip = cluster.chip
    per_domain = cluster.domain * chip.devices_per_chip
    if devices <= per_domain:
        per_domain = devices
    if cluster.dims and devices % (cluster.domain * chip.devices_per_chip):
        return "a part of a torus has no network of its own"
    split = cut(sizes, devices // per_domain) if devices % per_domain == 0 else None
    if split is None:
        return "the mesh does not divide over slices, hosts or racks"
    outer, inner = split
    if outer[TENSOR] > 1:
        return "the tensor axis would leave its fast domain"
    if outer != (1,) * 5 and not chip.scale_out_bw:
        return "no network between domains is known"
    egress = chip.scale_out_bw * 1e9 / chip.devices_per_chip
    options = _torus(_dims(cluster), inner, chip.devices_per_chip) if cluster.dims else (((Path(),) * 5, ()),)
    found = []
    for paths, order in options:
        joined = []
        for axis in range(5):
            path = paths[axis] if cluster.dims else _switched(cluster, inner[axis])
            joined.append(_across(path, inner[axis], outer[axis], egress, cluster))
        found.append(Placement(tuple(joined), order))  # type: ignore[arg-type]
    return tuple(found)


def coordinates(cluster: Cluster, sizes: Sizes, placement: Placement) -> list[tuple[int, tuple[int, ...]]]:
    """Return the position of every device of the mesh, row-major: (slice, host or rack; position inside it).

    The position is (die, x, y, z) on a torus, without the die if a chip is one device, and the rank inside the
    domain on other networks. A backend that can order its devices takes them in this order; torch ranks, which are
    numbered along hosts, are in it already.
    """
    outer = tuple(path.outer for path in placement.paths)
    inner = tuple(path.inner for path in placement.paths)
    dims = len(_dims(cluster)) if cluster.dims else 1
    found = []
    for rank in range(math.prod(sizes)):
        domain, inside, at = 0, 0, [0] * dims
        for index, n in zip(_digits(rank, sizes), range(5), strict=True):
            high, low = divmod(index, inner[n])
            domain = domain * outer[n] + high
            inside = inside * inner[n] + low
            for piece in placement.order[n] if placement.order else ():
                low, digit = divmod(low, piece.length)
                at[piece.dim] += digit * piece.stride
        found.append((domain, tuple(at) if cluster.dims else (inside,)))
    return found


def _digits(number: int, sizes: Sizes) -> tuple[int, ...]:
    digits = []
    for n in reversed(sizes):
        number, digit = divmod(number, n)
        digits.append(digit)
    return tuple(reversed(digits))


def _across(path: Path, inner: int, outer: int, egress: float, cluster: Cluster) -> Path:
    """Extend ``path``, which lies inside one domain, over ``outer`` domains."""
    if outer == 1:
        return path
    unit = "slices" if cluster.chip.vendor == "google" else "domains"
    latency = path.latency_s + NETWORK_HOP_S * math.ceil(math.log2(outer))
    inside = f"{path.where} and " if inner > 1 else ""
    return Path(inner, outer, path.rate, path.exchange, egress, latency, f"{inside}over {outer} {unit}")


def _switched(cluster: Cluster, n: int) -> Path:
    """Return the path of ``n`` devices behind a switch, in a full mesh of links, or on one chip."""
    chip = cluster.chip
    if n == 1:
        return Path()
    dies = chip.devices_per_chip
    if n <= dies and chip.die_to_die:
        rate = chip.die_to_die.value * 1e9
        return Path(n, 1, rate, rate * n, 0.0, SWITCH_HOP_S, "within a chip")
    if chip.kind == "mesh":
        # A group of k chips has k - 1 links each; the dies of one chip share them.
        chips = max(2, n // dies)
        link = chip.link_bw * 1e9
        rate = link * (chips - 1) / (1 if n > chips else dies)
        return Path(n, 1, rate, link * chips * chips / dies, 0.0, SWITCH_HOP_S, f"on {chips - 1} links each")
    rate = chip.link_bw * 1e9 / dies
    return Path(n, 1, rate, rate * n * n / (n - 1), 0.0, SWITCH_HOP_S, "in one domain")


def _dims(cluster: Cluster) -> tuple[Dim, ...]:
    """Return the torus of one domain, in devices: first the dies of a chip, then the axes of the torus."""
    chip = cluster.chip
    dies = chip.devices_per_chip
    inside = chip.die_to_die.value if chip.die_to_die else 0.0
    found: list[Dim] = [(dies, False, inside)] if dies > 1 else []
    for index, (n, wrap) in enumerate(zip(cluster.dims, cluster.wraps, strict=True)):
        link = chip.scale_up_z.value if index == 2 and chip.scale_up_z else chip.link_bw
        found.append((n, wrap, link))
    return tuple(found)


@lru_cache(maxsize=65_536)
def _torus(dims: tuple[Dim, ...], inner: Sizes, dies: int) -> tuple[tuple[tuple[Path, ...], Order], ...]:
    """Return the ways to lay mesh axes on a torus, without those that another way beats on every axis.

    ``dims[0]`` is the number of dies of a chip if a chip has several (``dies`` > 1).
    """
    states: list[tuple[tuple[int, ...], dict[int, tuple[Path, tuple[Piece, ...]]]]] = [((1,) * len(dims), {})]
    # The fastest axes choose first; what is left falls to the slowest.
    for axis in sorted((a for a in range(5) if inner[a] > 1), reverse=True):
        grown = []
        for strides, done in states:
            ways = sorted(
                (_lay(dims, strides, lengths, inner[axis], dies) for lengths in _factor(dims, strides, inner[axis])),
                key=lambda way: -way[0].rate,
            )
            for path, pieces in ways[:KEEP]:
                used = list(strides)
                for piece in pieces:
                    used[piece.dim] *= piece.length
                grown.append((tuple(used), {**done, axis: (path, pieces)}))
        states = grown
    best: dict[tuple[float, ...], tuple[tuple[Path, ...], Order]] = {}
    for _, done in states:
        paths = tuple(done[a][0] if a in done else Path() for a in range(5))
        order = tuple(done[a][1] if a in done else () for a in range(5))
        best.setdefault(tuple(p.rate for p in paths), (paths, order))
    rates = list(best)
    beaten = {r for r in rates for s in rates if s != r and all(a >= b for a, b in zip(s, r, strict=True))}
    return tuple(best[r] for r in rates if r not in beaten)


def _factor(dims: tuple[Dim, ...], strides: tuple[int, ...], n: int) -> Iterator[tuple[int, ...]]:
    """Return every way to write ``n`` as a product of one free factor of each torus axis."""
    if not dims:
        if n == 1:
            yield ()
        return
    free = dims[0][0] // strides[0]
    for length in range(1, free + 1):
        if free % length == 0 and n % length == 0:
            for rest in _factor(dims[1:], strides[1:], n // length):
                yield (length, *rest)


def _lay(
    dims: tuple[Dim, ...], strides: tuple[int, ...], lengths: tuple[int, ...], n: int, dies: int
) -> tuple[Path, tuple[Piece, ...]]:
    """Return the path of a mesh axis of ``n`` devices that takes ``lengths`` of the torus axes, from ``strides`` on.

    Whole rings work at the same time, and their rates add. Parts of torus axes are gathered over before them,
    one after the other, while the array is still small.
    """
    within = bool(dies > 1 and lengths[0] == dies)
    pieces, slowest, hops = [], 0.0, 0
    for index, length in enumerate(lengths):
        if length == 1:
            continue
        size, wrap, link = dims[index]
        stride = strides[index]
        ring = wrap and stride * length == size
        # The dies of a chip share its links, unless they are in the same group.
        shared = stride * (1 if within or (dies > 1 and index == 0) else dies)
        rate = (2 if ring else 1) * link * 1e9 / shared
        pieces.append(Piece(index, length, stride, ring, rate))
        slowest = max(slowest, length / (4 * n * rate) if dies == 1 or index else 1 / (rate * n))
        hops += length // 2 if ring else length - 1
    whole = [p for p in pieces if p.stride == 1 and p.length == dims[p.dim][0] and (dies == 1 or p.dim)]
    parts = sorted((p for p in pieces if p not in whole), key=lambda p: p.rate)
    time, left = (0.0, 1.0)  # seconds per gathered byte; the share of the array at the end of a stage
    if whole:
        together = math.prod(p.length for p in whole)
        time = (together - 1) / together / sum(p.rate for p in whole)
        left /= together
    for piece in reversed(parts):
        time += left * (piece.length - 1) / piece.length / piece.rate
        left /= piece.length
    where = "on " + " x ".join(_name(dims, piece, dies) for piece in pieces)
    rate = (n - 1) / n / time
    return Path(n, 1, rate, 1 / slowest, 0.0, TORUS_HOP_S * max(1, hops), where), tuple(pieces)


def _name(dims: tuple[Dim, ...], piece: Piece, dies: int) -> str:
    if dies > 1 and piece.dim == 0:
        return "dies"
    letter = "XYZ"[piece.dim - (dies > 1)]
    whole = dims[piece.dim][0] == piece.length
    return letter if whole else f"{piece.length} of {letter}" + (f" every {piece.stride}" if piece.stride > 1 else "")
