"""Cluster names and TPU slice legality, against the tables of Google's documentation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portatrain.errors import UserError
from portatrain.plan.clusters import clusters_toml, names, slices
from portatrain.plan.clusters.catalog import CHIPS

# Chips -> default topology, as documented for v4, v5p and 7x.
DEFAULTS_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    192: "4x4x12",
    256: "4x8x8",
    512: "8x8x8",
    768: "8x8x12",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
    6144: "16x16x24",
}
DEFAULTS_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


@pytest.mark.parametrize("kind", ["tpu-v4", "tpu-v5p", "tpu-7x"])
@pytest.mark.parametrize(("chips", "shape"), DEFAULTS_3D.items())
def test_default_shapes_3d(kind: str, chips: int, shape: str) -> None:
    dims = slices.default_shape(kind, chips)
    if kind == "tpu-v4" and chips > 4096:
        assert dims is None
    else:
        assert dims is not None and slices.text(dims) == shape


@pytest.mark.parametrize("kind", ["tpu-v5e", "tpu-v6e"])
def test_the_2d_kinds_have_eight_shapes(kind: str) -> None:
    found = {n: slices.text(slices.default_shape(kind, n) or ()) for n in slices.legal_counts(kind)}
    assert found == DEFAULTS_2D


@pytest.mark.parametrize(
    ("name", "chips", "devices", "hosts", "topology"),
    [
        ("tpu-v5p-256", 128, 128, 32, "torus 4x4x8, all axes wrap"),
        ("tpu-v5p-4x4x8", 128, 128, 32, "torus 4x4x8, all axes wrap"),
        ("tpu-v6e-256", 256, 256, 64, "torus 16x16, all axes wrap"),
        ("tpu-v6e-128", 128, 128, 32, "torus 8x16, 1 of 2 axes wrap"),
        ("tpu-v6e-64", 64, 64, 16, "torus 8x8, no axis wraps"),
        ("tpu-v6e-1", 1, 1, 1, "torus 1x1, no axis wraps"),
        ("tpu-7x-128", 64, 128, 16, "torus 4x4x4, all axes wrap"),
        ("tpu-v5p-64", 32, 32, 8, "torus 2x4x4, no axis wraps"),
        ("4*tpu-v5p-256", 512, 512, 128, "4 of torus 4x4x8, all axes wrap"),
        ("36*tpu-7x-512", 9216, 18432, 2304, "36 of torus 4x8x8, all axes wrap"),
        ("tpu-v5p-12288", 6144, 6144, 1536, "torus 16x16x24, all axes wrap"),
        ("h100-64", 64, 64, 8, "8 domains of 8, switched"),
        ("h200-8", 8, 8, 1, "1 domain of 8, switched"),
        ("gb300-72", 72, 72, 18, "1 domain of 72, switched"),
        ("gb300-144", 144, 144, 36, "2 domains of 72, switched"),
        ("gb200-128", 128, 128, 32, "2 domains of 64, switched"),
        ("mi300x-64", 64, 64, 8, "8 domains of 8, point to point"),
        ("trn2-64", 64, 256, 4, "4 of torus 4x4, all axes wrap"),
        ("trn2u-64", 64, 256, 4, "torus 4x4x4, all axes wrap"),
        ("gaudi3-64", 64, 64, 8, "8 domains of 8, point to point"),
        ("ascend910c-384", 384, 768, 48, "1 domain of 384, switched"),
        ("m4-max-1", 1, 1, 1, "no scale-up network"),
        ("h100-100000", 100_000, 100_000, 12_500, "12,500 domains of 8, switched"),
        ("cpu-2", 2, 2, 1, "no scale-up network"),
    ],
)
def test_names(name: str, chips: int, devices: int, hosts: int, topology: str) -> None:
    made = names.parse(name)
    assert (made.chips, made.devices, made.hosts, made.topology) == (chips, devices, hosts, topology)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tpu-v5p-4x4x6", ["tpu-v5p-128", "tpu-v5p-256"]),
        ("tpu-v5p-8x4x4", ["tpu-v5p-256 (4x4x8)"]),
        ("tpu-v5p-100", ["tpu-v5p-64 (2x4x4)", "tpu-v5p-128 (4x4x4)"]),
        ("tpu-v5p-7", ["tpu-v5p-8"]),
        ("tpu-v5p-17920", ["tpu-v5p-12288", "6144 chips"]),
        ("tpu-v6e-512", ["tpu-v6e-256"]),
        ("tpu-v6e-2x16", ["4x8", "8x8"]),
        ("tpu-v5p-16", None),
        ("h100-12", ["h100-8", "h100-16"]),
        ("h100-0", ["h100-8"]),
        ("gb300-70", ["gb300-68", "gb300-72"]),
        ("h10-3", ["Did you mean h100"]),
        ("tpu-v5p", ["a size after tpu-v5p"]),
        ("4*h100-8", ["h100-sxm-32"]),
        ("0*tpu-v4-8", ["4*tpu-v5p-256"]),
        ("x*tpu-v4-8", ["4*tpu-v5p-256"]),
        ("", ["CHIP-COUNT"]),
    ],
)
def test_illegal_names_say_what_is_near(name: str, told: list[str] | None) -> None:
    if told is None:
        assert names.parse(name).chips == 8
        return
    with pytest.raises(UserError) as caught:
        names.parse(name)
    for part in told:
        assert part in str(caught.value)


@given(st.sampled_from(sorted(slices.RULES)), st.integers(1, 20_000))
def test_tpu_names_round_trip_or_name_two_legal_neighbours(kind: str, number: int) -> None:
    name = f"{kind}-{number}"
    try:
        made = names.parse(name)
    except UserError as error:
        near = [word for word in error.do.split() if word.startswith(kind)]
        assert near
        for other in near:
            names.parse(other)
        return
    assert made.name == name
    assert math.prod(made.dims) == made.chips and slices.is_legal(kind, made.dims)
    again = names.parse(f"{kind}-{slices.text(made.dims)}")
    assert (again.name, again.dims, again.wraps) == (name, made.dims, made.wraps)


@given(st.sampled_from(sorted(slices.RULES)), st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_topologies_round_trip_or_name_legal_neighbours(kind: str, dims: list[int]) -> None:
    try:
        made = names.build(CHIPS[kind], slices.text(tuple(dims)))
    except UserError as error:
        for other in [word for word in error.do.split() if word.startswith(kind)]:
            names.parse(other)
        return
    assert names.parse(made.name).dims == tuple(dims)


@pytest.mark.parametrize("chip", sorted(set(CHIPS) - set(slices.RULES)))
def test_every_shown_size_is_legal(chip: str) -> None:
    for size in names.legal_sizes(CHIPS[chip]):
        assert names.parse(size.split()[0]).chip.name == chip


# ---- clusters.toml


def _write(folder: Path, text: str) -> Path:
    path = folder / "clusters.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_own_clusters(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        '[lab]\nchip = "h100"\ncount = 64\nengine = "slurm"\nstorage = "s3://b/r"\nscale_out_gbps = 200\n'
        'prices = { on_demand = 2.1, spot = 1 }\n[lab.options]\npartition = "gpu"\n'
        '["pod a"]\nchip = "tpu-v5p"\ntopology = "4x4x8"\nslices = 2\ncount = 256\n',
    )
    lab = names.resolve("lab", files=[path])
    assert (lab.chips, lab.engine, lab.storage, lab.options["partition"]) == (64, "slurm", "s3://b/r", "gpu")
    assert lab.chip.scale_out_bw == 25 and lab.price is not None and lab.price[1].value == 2.1
    assert lab.where == f"{path}:1"
    pod = names.resolve("pod a", files=[path])
    assert (pod.chips, pod.slices, pod.dims) == (256, 2, (4, 4, 8))
    assert names.resolve("h100-8", files=[path]).chips == 8  # the catalog's names stay


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("[lab]\nchip = 'h1000'\ncount = 8\n", 2, "h100"),
        ("\n[lab]\ncount = 8\n", 2, "a chip of the catalog"),
        ("[lab]\nchip = 'h100'\n", 1, "count"),
        ("[lab]\nchip = 'h100'\ncount = 12\n", 3, "h100-16"),
        ("[lab]\nchip = 'h100'\ncount = -8\n", 3, "at least 1"),
        ("[lab]\nchip = 'h100'\ncount = true\n", 3, "whole number"),
        ("[lab]\nchip = 'h100'\ncount = '8'\n", 3, "whole number"),
        ("[lab]\nchip = 'h100'\ncount = 8\ntopology = '2x4'\n", 4, "no topology"),
        ("[pod]\nchip = 'tpu-v5p'\n\ncount = 100\ntopology = '4x4x8'\n", 4, "128 chips"),
        ("[pod]\nchip = 'tpu-v5p'\ntopology = '4x4x6'\n", 3, "4x4x8"),
        ("[pod]\nchip = 'tpu-v5p'\ncount = 9\nslices = 2\n", 3, "multiple of slices"),
        ("[a]\nchip = 'h100'\ncount = 8\n[b]\nchip = 'h100'\ncount = 8\nchips = 8\n", 7, "count"),
        ("[a]\nchip = 'h100'\ncount = 8\nprices = { spot = -1 }\n", 4, "USD per chip-hour"),
        ("[a]\nchip = 'h100'\ncount = 8\n[a.prices]\nspot = 'x'\n", 4, "USD per chip-hour"),
        ("[a]\nchip = 'h100'\ncount = 8\nprices = { spot = inf }\n", 4, "USD per chip-hour"),
        ("[a]\nchip = 'h100'\ncount = 8\nprices = { spot = nan }\n", 4, "USD per chip-hour"),
        ("[a]\nchip = 'h100'\ncount = 8\nscale_out_gbps = nan\n", 4, "a positive number"),
        ("[a]\nchip = 'h100'\ncount = 8\npower_w = inf\n", 4, "a positive number"),
        ("a = 3\n", 1, "a table for each cluster"),
        ("[a\n", None, "line 1"),
    ],
)
def test_contradictions_name_file_and_line(tmp_path: Path, text: str, line: int | None, told: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        names.resolve("pod" if "[pod]" in text else "lab", files=[path])
    assert told in str(caught.value)
    assert (f"{path}:{line}:" if line else f"{path}") in str(caught.value)


def test_files_beside_the_recipe_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, home = tmp_path / "work", tmp_path / "home" / "portatrain"
    for folder, count in ((beside, 8), (home, 16)):
        folder.mkdir(parents=True)
        _write(folder, f"[lab]\nchip = 'h100'\ncount = {count}\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    found = clusters_toml.files(beside / "recipe.py")
    assert [path.parent for path in found] == [beside, home]
    assert names.resolve("lab", files=found).chips == 8
