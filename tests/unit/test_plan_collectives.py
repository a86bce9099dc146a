"""Collectives and where mesh axes lie, against hand arithmetic from the published rates (V = 1 GB gathered)."""

from __future__ import annotations

import itertools
import math

import pytest

from portatrain.plan.clusters.names import parse
from portatrain.plan.cost.collectives import Path, all_gather, all_reduce, all_to_all, many_reduces
from portatrain.plan.cost.placement import Placement, assign_axes, coordinates, cut
from portatrain.plan.cost.tensors import Sizes

V = 1e9


def paths(cluster: str, sizes: Sizes) -> list[Placement]:
    made = parse(cluster)
    found = assign_axes(made, sizes, made.devices)
    assert not isinstance(found, str), found
    return list(found)


@pytest.mark.parametrize(
    ("cluster", "sizes", "axis", "seconds"),
    [
        # A ring of bidirectional links: 2 x 90 GB/s; three wrapped axes at once: 540 GB/s.
        ("tpu-v5p-256", (1, 16, 1, 1, 8), 4, V * 7 / 8 / 180e9),
        ("tpu-v5p-256", (1, 16, 1, 1, 8), 1, V * 15 / 16 / 360e9),
        ("tpu-v5p-256", (1, 128, 1, 1, 1), 1, V * 127 / 128 / 540e9),
        # Without wraparound half of that: 2x4x4, and 8x8 of a 2D kind.
        ("tpu-v5p-64", (1, 32, 1, 1, 1), 1, V * 31 / 32 / 270e9),
        ("tpu-v6e-64", (1, 64, 1, 1, 1), 1, V * 63 / 64 / 180e9),
        ("tpu-v6e-256", (1, 256, 1, 1, 1), 1, V * 255 / 256 / 360e9),
        # One axis of 16 wraps and one of 8 does not: 2 x 90 + 90.
        ("tpu-v6e-128", (1, 128, 1, 1, 1), 1, V * 127 / 128 / 270e9),
        # Half of a ring of 8 is a line of 4.
        ("tpu-v5p-256", (1, 32, 1, 1, 4), 4, V * 3 / 4 / 180e9),
        # NVLink: 370, not 450. Across hosts 50 GB/s a GPU, 400 a host: the in-host part is slower here.
        ("h100-8", (1, 8, 1, 1, 1), 1, V * 7 / 8 / 370e9),
        ("h100-64", (1, 64, 1, 1, 1), 1, V * 7 / 8 / 370e9),
        ("h100-64", (8, 8, 1, 1, 1), 0, V * 7 / 8 / 50e9),
        ("h100-64", (1, 8, 1, 1, 8), 1, V * 7 / 8 / 50e9),
        # A rack has 72 x 50 = 3600 GB/s to the outside.
        ("gb200-144", (1, 144, 1, 1, 1), 1, max(V * 71 / 72 / 900e9, V / 2 / 3600e9)),
        # Point to point: two chips have one link of 64, eight have seven each.
        ("mi300x-8", (4, 1, 1, 1, 2), 4, V / 2 / 64e9),
        ("mi300x-8", (1, 1, 1, 1, 8), 4, V * 7 / 8 / 448e9),
        # 6.25 GB/s a chip between slices, 128 of them a slice.
        ("4*tpu-v5p-256", (4, 128, 1, 1, 1), 0, V * 3 / 4 / 6.25e9),
        ("4*tpu-v5p-256", (1, 512, 1, 1, 1), 1, V * 127 / 128 / 540e9),
    ],
)
def test_all_gather(cluster: str, sizes: Sizes, axis: int, seconds: float) -> None:
    best = min(all_gather(p.paths[axis], V) for p in paths(cluster, sizes))
    assert best == pytest.approx(seconds)
    fastest = min((p.paths[axis] for p in paths(cluster, sizes)), key=lambda path: all_gather(path, V))
    assert all_reduce(fastest, V) == 2 * all_gather(fastest, V)


def test_large_rings_approach_the_formula_of_the_scaling_book() -> None:
    """V / (W n) for n wrapped axes of bandwidth W both ways."""
    (whole,) = paths("tpu-v5p-8192", (1, 4096, 1, 1, 1))
    assert all_gather(whole.paths[1], 1e12) == pytest.approx(1e12 / (180e9 * 3), rel=1e-3)


def test_all_to_all_is_a_quarter_of_the_all_gather_on_a_ring() -> None:
    ring = min((p.paths[4] for p in paths("tpu-v6e-256", (1, 16, 1, 1, 16))), key=lambda path: -path.rate)
    assert all_to_all(ring, V) == pytest.approx(V / (8 * 90e9))
    assert all_to_all(ring, V) / all_gather(ring, V) == pytest.approx(1 / 4 * 16 / 15)


def test_all_to_all_behind_a_switch_and_between_hosts() -> None:
    (inside,) = paths("h100-8", (1, 1, 8, 1, 1))
    assert all_to_all(inside.paths[2], V) == pytest.approx(V / 8 * 7 / 8 / 370e9)
    (across,) = paths("h100-64", (1, 1, 64, 1, 1))
    assert all_to_all(across.paths[2], V) == pytest.approx(V / 64 * 7 / 8 / 50e9)


def test_latency_is_a_floor() -> None:
    (placed,) = paths("tpu-v5p-8192", (1, 4096, 1, 1, 1))
    assert all_gather(placed.paths[1], 1.0) == pytest.approx(24e-6)  # three rings of 16: 8 hops each
    assert all_gather(Path(), V) == 0 and all_gather(placed.paths[1], 0) == 0


def test_reducing_over_several_axes_scatters_over_the_fastest_first() -> None:
    fast = Path(8, 1, 400e9, 0, 0, 0)
    slow = Path(1, 4, 0, 0, 50e9, 0)
    expected = 2 * V * 7 / 8 / 400e9 + 2 * (V / 8) * 3 / 4 / 50e9
    assert many_reduces([slow, fast], V) == pytest.approx(expected)


def test_axes_are_cut_slowest_first() -> None:
    assert cut((4, 16, 1, 1, 8), 8) == ((4, 2, 1, 1, 1), (1, 8, 1, 1, 8))
    assert cut((1, 16, 1, 1, 8), 64) == ((1, 16, 1, 1, 4), (1, 1, 1, 1, 2))
    assert cut((1, 3, 1, 1, 1), 2) is None


@pytest.mark.parametrize(
    ("cluster", "sizes", "why"),
    [("h100-64", (1, 4, 1, 1, 16), "tensor axis"), ("tpu-8i-2304", (2, 1152, 1, 1, 1), "no network")],
)
def test_what_cannot_be_placed(cluster: str, sizes: Sizes, why: str) -> None:
    made = parse(cluster)
    found = assign_axes(made, sizes, made.devices)
    assert isinstance(found, str) and why in found


CASES: list[tuple[str, Sizes]] = [
    ("tpu-v5p-256", (2, 16, 1, 1, 4)),
    ("tpu-v5p-256", (1, 16, 1, 1, 8)),
    ("tpu-v6e-64", (1, 4, 1, 4, 4)),
    ("tpu-7x-128", (1, 16, 1, 1, 8)),
    ("tpu-7x-128", (2, 32, 1, 1, 2)),
    ("trn2-64", (2, 16, 1, 1, 8)),
    ("4*tpu-v5p-128", (2, 32, 1, 1, 4)),
    ("h100-64", (2, 8, 1, 1, 4)),
    ("gb200-64", (2, 2, 4, 2, 2)),
]


@pytest.mark.parametrize(("cluster", "sizes"), CASES)
def test_coordinates_name_every_device_once(cluster: str, sizes: Sizes) -> None:
    made = parse(cluster)
    for placement in paths(cluster, sizes):
        found = coordinates(made, sizes, placement)
        assert len(found) == len(set(found)) == made.devices == math.prod(sizes)
        assert {domain for domain, _ in found} == set(range(made.domains))
        if made.dims:
            dies = (made.chip.devices_per_chip,) if made.chip.devices_per_chip > 1 else ()
            shape = (*dies, *made.dims)
            everywhere = set(itertools.product(*(range(n) for n in shape)))
            assert {inside for _, inside in found} == everywhere


@pytest.mark.parametrize(("cluster", "sizes"), CASES)
def test_the_tensor_axis_stays_in_its_domain(cluster: str, sizes: Sizes) -> None:
    for placement in paths(cluster, sizes):
        found = coordinates(parse(cluster), sizes, placement)
        tensor = sizes[4]
        for first in range(0, len(found), tensor):
            assert len({domain for domain, _ in found[first : first + tensor]}) == 1


def test_neighbours_on_a_whole_ring_are_one_hop_apart() -> None:
    (placement,) = [p for p in paths("tpu-v5p-256", (1, 16, 1, 1, 8)) if p.paths[4].where == "on Z"]
    found = coordinates(parse("tpu-v5p-256"), (1, 16, 1, 1, 8), placement)
    for first in range(0, 128, 8):
        assert [place[2] for _, place in found[first : first + 8]] == list(range(8))
        assert len({place[:2] for _, place in found[first : first + 8]}) == 1
