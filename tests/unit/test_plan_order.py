"""The order of devices that a plan stands for, and that the backends lay their mesh on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from portatrain.model.layout import Mesh
from portatrain.plan.clusters.names import parse
from portatrain.plan.cost.device_order import ordered
from portatrain.plan.cost.placement import assign_axes, coordinates
from portatrain.plan.cost.tensors import sizes_of
from portatrain.plan.recorded import device_order
from portatrain.recipe import apply_overrides, load_recipe


@dataclass(frozen=True)
class Device:
    """What JAX says of a TPU's device."""

    id: int
    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0


def torus(kind: str, dims: tuple[int, ...], *, cores: int = 1, slices: int = 1) -> list[Device]:
    x, y, z = (*dims, 1)[:3]
    places = itertools.product(range(slices), range(z), range(y), range(x), range(cores))
    return [Device(i, kind, (c, b, a), core, s) for i, (s, a, b, c, core) in enumerate(places)]


def hops(a: Device, b: Device, dims: tuple[int, ...]) -> int:
    """Links between two chips of a slice whose axes of 4 and more are rings."""
    total = 0
    for p, q, n in zip(a.coords, b.coords, (*dims, 1), strict=False):
        apart = abs(p - q)
        total += min(apart, n - apart) if n >= 4 else apart
    return total


CASES = [
    ("TPU v5", (4, 4, 8), 1, 1, Mesh(fsdp=32, tensor=4)),
    ("TPU v5", (4, 4, 8), 1, 1, Mesh(fsdp=128)),
    ("TPU v5", (4, 4, 8), 1, 1, Mesh(replica=4, fsdp=8, context=2, tensor=2)),
    ("TPU v5", (4, 4, 4), 1, 2, Mesh(replica=2, fsdp=16, tensor=4)),
    ("TPU v4", (4, 4, 4), 1, 1, Mesh(fsdp=16, tensor=4)),
    ("TPU v6 lite", (16, 16), 1, 1, Mesh(fsdp=64, tensor=4)),
    ("TPU v5 lite", (4, 8), 1, 1, Mesh(fsdp=16, tensor=2)),
    ("TPU7x", (4, 4, 4), 2, 1, Mesh(fsdp=64, tensor=2)),
]


@pytest.mark.parametrize(("kind", "dims", "cores", "slices", "mesh"), CASES)
def test_tensor_neighbours_are_neighbours_on_the_torus(
    kind: str, dims: tuple[int, ...], cores: int, slices: int, mesh: Mesh
) -> None:
    devices = torus(kind, dims, cores=cores, slices=slices)
    recipe = apply_overrides(load_recipe("llama3-8b"), ["batch=512"])
    found = device_order(recipe, mesh, devices)
    assert sorted(d.id for d in found) == list(range(len(devices)))
    for first in range(0, len(found), mesh.tensor):
        group = found[first : first + mesh.tensor]
        assert len({d.slice_index for d in group}) == 1
        assert all(hops(a, b, dims) <= 1 for a, b in itertools.pairwise(group))
    if slices > 1:  # the slowest axis is the one that leaves the slice
        half = len(found) // slices
        assert {d.slice_index for d in found[:half]} == {0}


def test_an_order_that_is_no_plan_leaves_devices_as_they_are() -> None:
    recipe = load_recipe("tiny-lm")
    odd = torus("TPU v5", (3, 1, 1))  # no slice of the catalog
    assert device_order(recipe, Mesh(fsdp=3), odd) == odd
    strangers = torus("TPU v99", (2, 2, 1))
    assert device_order(recipe, Mesh(fsdp=4), strangers) == strangers
    cpus = [object(), object()]
    assert device_order(recipe, Mesh(fsdp=2), cpus) == cpus
    assert device_order(recipe, Mesh(fsdp=2), torus("TPU v5", (2, 2, 1))) == torus("TPU v5", (2, 2, 1))


def test_devices_without_coordinates_follow_domains() -> None:
    cluster, mesh = parse("h100-16"), Mesh(replica=2, fsdp=4, tensor=2)
    (placement,) = assign_axes(cluster, sizes_of(mesh), 16)
    assert ordered(list(range(16)), coordinates(cluster, sizes_of(mesh), placement)) == list(range(16))


@pytest.mark.parametrize("name", ["h100-64", "gb200-72", "h100-8"])
def test_described_gpus_follow_their_numbers(name: str) -> None:
    """Those that XLA's GPU compiler is given have coordinates too, (domain, host, number), and no slice."""
    cluster, mesh = parse(name), sizes_of(Mesh(fsdp=parse(name).chips))
    placements = assign_axes(cluster, mesh, cluster.devices)
    assert not isinstance(placements, str)
    each = min(cluster.chip.chips_in_host, cluster.domain)
    shape = cluster.chips // cluster.domain, cluster.domain // each, each
    places = itertools.product(*(range(n) for n in shape))
    devices = [Device(i, "gpu", (a, b, c)) for i, (a, b, c) in enumerate(places)]
    assert ordered(devices, coordinates(cluster, mesh, placements[0])) == devices


def test_a_place_that_no_device_has_is_an_error() -> None:
    devices = torus("TPU v5", (2, 2, 1))
    with pytest.raises(ValueError, match="no device at"):
        ordered(devices, [(0, (0, 0, 1))] * 4)
    with pytest.raises(ValueError, match="several devices"):
        ordered([devices[0], devices[0]], [(0, (0, 0, 0))] * 2)
