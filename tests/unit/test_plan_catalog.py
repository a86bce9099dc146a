"""The accelerator catalog: complete, sourced, self-consistent, and loaded without any framework."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.plan.clusters.catalog import CHIPS, STACKS, find_chip
from portatrain.plan.clusters.figures import est, figure

ALL = [
    "tpu-v4",
    "tpu-v5e",
    "tpu-v5p",
    "tpu-v6e",
    "tpu-7x",
    "tpu-8t",
    "tpu-8i",
    "a100-40",
    "a100-80",
    "h100-sxm",
    "h200",
    "b200",
    "gb200",
    "b300",
    "gb300",
    "rubin",
    "mi250x",
    "mi300x",
    "mi325x",
    "mi350x",
    "mi355x",
    "trn1",
    "trn2",
    "trn2u",
    "trn3",
    "gaudi2",
    "gaudi3",
    "ascend910b",
    "ascend910c",
    "cs3",
    "maia100",
    "maia200",
    "mtia2",
    "mtt-s4000",
    "mtt-s5000",
    "metax-c500",
    "metax-c600",
    "hygon-k100",
    "hygon-bw1000",
    "apple-m2-ultra",
    "apple-m4-max",
    "cpu",
]


def test_every_chip_is_there() -> None:
    assert sorted(CHIPS) == sorted(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_figure_has_unit_source_and_date(name: str) -> None:
    for label, value in CHIPS[name].figures().items():
        assert value.value > 0 and value.unit and value.source and value.date.startswith(("2026", "now")), label
        # What nobody has published cannot be shown as a fact.
        assert value.estimate or not value.source.startswith("no source"), label


@pytest.mark.parametrize("name", ALL)
def test_rows_are_consistent(name: str) -> None:
    chip = CHIPS[name]
    assert chip.stack in STACKS
    assert "bf16" in chip.peaks or "its bf16 peak" in chip.unpublished
    assert (chip.memory_bw is None) == ("its memory bandwidth" in chip.unpublished) or chip.kind == "streaming"
    if chip.kind == "mesh" and name != "mi250x":  # mi250x is a partial mesh, its whole rate is an estimate
        assert chip.link is not None and chip.scale_up is not None and chip.domain is not None
        assert chip.link.value * (chip.domain.value - 1) == pytest.approx(chip.scale_up.value)
    if chip.kind == "torus":
        assert chip.link is not None and chip.links is not None and chip.scale_up is not None
        # Google rounds and the sources differ; nothing is off by more than a link's worth.
        assert chip.link.value * chip.links.value == pytest.approx(chip.scale_up.value, rel=0.5)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("tpu-v5p", "memory_bytes", 95 * 2**30),
        ("h100-sxm", "memory_bytes", 80e9),
        ("tpu-v6e", "link_bw", 90),
        ("h100-sxm", "link_bw", 370),
        ("mi300x", "link_bw", 64),
        ("h100-sxm", "scale_out_bw", 50),
        ("tpu-v5p", "scale_out_bw", 6.25),
        ("gb200", "chips_in_domain", 72),
        ("trn2", "devices_per_chip", 4),
    ],
)
def test_values_read_from_the_vendors(name: str, field: str, value: float) -> None:
    assert getattr(CHIPS[name], field) == value


def test_unconfirmed_values_are_marked() -> None:
    marked = {(n, label) for n in ALL for label, v in CHIPS[n].figures().items() if v.estimate}
    for pair in (
        ("gb300", "bf16 peak"),
        ("b300", "scale out"),
        ("b200", "power"),
        ("rubin", "memory bw"),
        ("gaudi3", "scale up"),
        ("ascend910b", "bf16 peak"),
        ("cs3", "bf16 peak"),
        ("mi250x", "memory"),
    ):
        assert pair in marked
    for pair in (("h100-sxm", "bf16 peak"), ("tpu-v5p", "memory"), ("mi300x", "link"), ("mi250x", "link")):
        assert pair not in marked


@pytest.mark.parametrize(
    ("name", "missing", "framework"),
    [
        ("maia200-8", "its bf16 peak is not published", "nothing outside Microsoft"),
        ("mtia2-8", "the network between chips is not published", "torch's own device mtia"),
        ("mtt-s5000-8", "its bf16 peak and the network between hosts are not published", "the device musa"),
        ("metax-c500-8", "its memory bandwidth and the network between chips are not published", "called cuda"),
        ("metax-c600-8", "its memory bandwidth, its bf16 peak and the network", "the backend torch never ran there"),
        ("hygon-k100-8", "its memory bandwidth, its bf16 peak and", "called cuda"),
        ("hygon-bw1000-8", "its bf16 peak and", "DTK"),
    ],
)
def test_a_plan_says_what_is_not_published_and_what_reaches_the_chip(
    name: str, missing: str, framework: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "llama3-1b", "--cluster", name]) == 0
    told = capsys.readouterr().out
    assert f"not planned: {missing}" in told and framework in told
    assert main(["plan", "llama3-1b", "--cluster", name, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["status"] == "not-planned" and framework in found["notes"][0]


@pytest.mark.parametrize(
    ("name", "framework"), [("maia100-64", "nothing outside Microsoft"), ("mtt-s4000-8", "the device musa")]
)
def test_a_plan_without_a_backend_says_so(name: str, framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama3-1b", "--cluster", name, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["status"] == "fits" and any(framework in note for note in found["notes"])


def test_estimate_survives_into_the_figure() -> None:
    shown = figure(est(5, "a guess", source="none"), "W", "pages")
    assert shown.estimate and str(shown) == "~5 W" and shown.note == "a guess"


def test_unknown_chip_names_the_nearest() -> None:
    with pytest.raises(UserError, match="h100"):
        find_chip("h1000")


def test_planning_imports_no_framework() -> None:
    code = (
        "import sys, portatrain.plan.clusters.names, portatrain.commands.clusters, portatrain.commands.plan\n"
        "print(sorted({'numpy', 'jax', 'torch', 'flax', 'optax', 'rich', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
