"""The search: against trying everything, on what fits and what does not, and how much work it does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from portatrain.errors import UserError
from portatrain.plan.attending import priced
from portatrain.plan.clusters import names
from portatrain.plan.clusters.names import parse
from portatrain.plan.cost import meshes
from portatrain.plan.cost.efficiency import Efficiency
from portatrain.plan.cost.memory import memory
from portatrain.plan.cost.placement import assign_axes
from portatrain.plan.cost.policy import PRECISIONS, REMATS, TUNING
from portatrain.plan.cost.shapes import PRESETS, ModelShape
from portatrain.plan.cost.tensors import Sizes
from portatrain.plan.cost.timing import rates, step_time
from portatrain.plan.cost.workload import on_mesh
from portatrain.plan.hints import could_fit, least_bytes
from portatrain.plan.result import Plan
from portatrain.plan.search import MARGIN, plan

LLAMAS = ("llama3-1b", "llama3-8b", "llama3-70b", "llama3-405b")


def every_way(shape: ModelShape, cluster_name: str, factor: float) -> Iterator[tuple[float, Sizes]]:
    """(step seconds, mesh) of every mesh of up to all sizes, microbatch, remat policy and placement that fits."""
    cluster = parse(cluster_name)
    precision = PRECISIONS[shape.precision]
    rate = rates(cluster.chip, precision, factor)
    room = cluster.chip.memory_bytes / cluster.chip.devices_per_chip * (1 - MARGIN)
    checks, sizes = meshes.rules(shape), meshes.divisors(cluster.devices)
    useful = meshes.used_axes(shape)
    for mesh in itertools.product(sizes, repeat=5):
        if mesh[0] * mesh[1] * mesh[2] * mesh[3] * mesh[4] != cluster.devices or not checks.fits(mesh):
            continue
        if any(n > 1 and axis not in useful for axis, n in enumerate(mesh)):
            continue
        placements = assign_axes(cluster, mesh, cluster.devices)
        if isinstance(placements, str):
            continue
        work = on_mesh(shape, mesh)
        here = shape.batch // work.rows
        for rows in meshes.divisors(here):
            for remat in REMATS.values():
                common = {
                    "tokens": rows * work.seq,
                    "accumulation": here // rows,
                    "remat": remat,
                    "precision": precision,
                    "slot_bytes": shape.slot_bytes,
                    "tuning": priced(TUNING[cluster.chip.stack], shape, mesh, rows, precision),
                }
                if memory(work, **common).total > room:  # type: ignore[arg-type]
                    continue
                for placement in placements:
                    yield step_time(work, placement, rate=rate, **common).total, mesh  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("llama3-1b", "tpu-v5e-16"),
        ("llama3-8b", "tpu-v5p-32"),
        ("llama3-8b", "h100-32"),
        ("llama3-8b", "mi300x-16"),
        ("llama3-8b", "2*tpu-v6e-16"),
        ("mixtral-8x7b", "h100-64"),
        ("llama3-70b", "tpu-7x-64"),
    ],
)
def test_nothing_that_fits_is_faster(name: str, cluster: str) -> None:
    """The search tries only the largest microbatch of each mesh and policy; trying all finds nothing better."""
    found = plan(PRESETS[name], parse(cluster), efficiency=Efficiency(value=0.6, basis="given"))
    ways = list(every_way(PRESETS[name], cluster, 0.6))
    best_s, _ = min(ways)
    assert found.chosen is not None
    assert found.chosen.step_s == pytest.approx(best_s)
    assert found.chosen.mesh in {mesh for seconds, mesh in ways if seconds == pytest.approx(best_s)}
    assert [one.step_s for one in found.best] == sorted(one.step_s for one in found.best)


def test_work_of_four_recipes_on_all_example_clusters() -> None:
    """What takes the time is counted, since the time itself is the machine's."""
    plans = [plan(PRESETS[name], parse(cluster)) for name in LLAMAS for cluster in names.EXAMPLES]
    assert len(names.EXAMPLES) >= 20
    assert sum(p.counts.meshes for p in plans) < 12_000
    assert sum(p.counts.memories for p in plans) < 80_000
    assert sum(p.counts.times for p in plans) < 50_000
    assert sum(bool(p.best) for p in plans) > len(plans) * 2 // 3


@pytest.mark.parametrize(
    ("cluster", "chips_used"),
    [("tpu-v5p-12288", 6144), ("36*tpu-7x-512", 8192), ("h100-100000", 65_536), ("gb300-100000", 65_536)],
)
def test_scale(cluster: str, chips_used: int) -> None:
    found = plan(PRESETS["llama3-405b"], parse(cluster))
    assert found.best and found.used.chips == chips_used and found.notes
    assert found.counts.meshes < 2_000 and found.counts.times < 6_000
    # 2048 samples and 6144 chips share no mesh: a neighbouring batch does, and the plan says so.
    assert found.fits == (cluster != "tpu-v5p-12288")


def test_a_batch_that_no_mesh_divides_is_named() -> None:
    found = plan(PRESETS["llama3-405b"], parse("tpu-v5p-12288"))
    assert abs(found.shape.batch - 2048) <= 512 and found.shape.batch != 2048
    assert "batch=2048 divides over no mesh" in found.notes[0] and f"batch={found.shape.batch}" in found.notes[0]


def test_idle_chips_are_paid_for() -> None:
    found = plan(PRESETS["llama3-8b"], parse("gb200-72"))
    assert (found.used.chips, found.cluster.chips) == (64, 72)
    price = found.cluster.price
    assert price is not None and found.usd_per_billion is not None
    assert found.usd_per_billion == pytest.approx(72 * 16.0 * 1e9 / found.tokens_per_s / 3600)
    assert found.mfu == pytest.approx(found.tokens_per_s * found.shape.model_flops / (64 * 2500e12))


def test_money_energy_and_days() -> None:
    found = plan(PRESETS["llama3-8b"], parse("h100-64"))
    hours = found.shape.tokens_per_step and 1e9 / found.tokens_per_s / 3600
    assert found.usd_per_billion == pytest.approx(64 * 6.88 * hours)
    assert found.kwh_per_billion == pytest.approx(64 * 0.7 * hours)
    assert found.days == pytest.approx(15.6e12 / found.tokens_per_s / 86_400)
    assert found.usd_per_run == pytest.approx(15_600 * 64 * 6.88 * hours)


# ---- what does not fit


def test_by_how_much_it_does_not_fit() -> None:
    found = plan(PRESETS["llama3-405b"], parse("h200-8"))
    least = least_bytes(PRESETS["llama3-405b"], parse("h200-8"), "bf16")
    assert not found.fits and not found.best and least is not None and found.short_bytes is not None
    # Where state alone is too much, the figure is of state alone: a lower bound.
    assert 16 * 405_853_388_800 / 8 - 141e9 < found.short_bytes <= least - 141e9


@pytest.mark.parametrize("name", ["llama3-70b", "llama3-405b"])
@pytest.mark.parametrize("cluster", ["h200-8", "h100-64", "tpu-v5e-256", "trn2-64"])
def test_what_is_said_to_fit_does(name: str, cluster: str) -> None:
    found = plan(PRESETS[name], parse(cluster))
    if found.best:
        return
    for hint in found.hints:
        if hint.startswith("more chips: "):
            assert plan(PRESETS[name], parse(hint.removeprefix("more chips: "))).best
            smaller = parse(hint.removeprefix("more chips: ")).chips // 2
            assert smaller == found.cluster.chips or not could_fit(
                PRESETS[name], parse(names.canonical(found.cluster.chip, smaller, ())), "bf16"
            )
        if "--precision bf16-state" in hint:
            assert plan(PRESETS[name], parse(cluster), precisions=["bf16-state"]).best


def test_the_boundary_is_sharp() -> None:
    """A chip with just enough memory is planned with a warning; one with less is not planned."""
    shape, cluster = PRESETS["llama3-70b"], parse("h100-16")
    least = least_bytes(shape, cluster, "bf16")
    assert least is not None

    def with_memory(size: float) -> Plan:
        memory_figure = replace(cluster.chip.memory, value=size / 1e9, unit="GB")
        return plan(shape, replace(cluster, chip=replace(cluster.chip, memory=memory_figure)))

    assert not with_memory(least * 0.999).best
    tight = with_memory(least * 1.001)
    assert tight.best and any("less than 5 %" in note for note in tight.notes)
    assert not any("less than 5 %" in note for note in with_memory(least * 1.5).notes)


@pytest.mark.parametrize(("name", "cluster"), [("mixtral-8x7b", "h100-1024"), ("deepseek-v3", "tpu-v5p-512")])
def test_mixtures_of_experts_use_the_expert_axis_where_it_pays(name: str, cluster: str) -> None:
    found = plan(PRESETS[name], parse(cluster))
    assert found.best and found.best[0].mesh[2] > 1
    assert found.best[0].time.busy[2] > 0


def test_streaming_chips_are_not_planned() -> None:
    found = plan(PRESETS["llama3-8b"], parse("cs3-1"))
    assert not found.best and "not planned" in found.hints[0]


def test_every_mesh_is_accounted_for() -> None:
    found = plan(PRESETS["llama3-70b"], parse("h100-64"))
    seen = len(found.best) + sum(r.count for r in found.refused if not r.reason.startswith("the tensor axis"))
    assert seen == found.counts.meshes
    assert all(one.why(found.best[0]) for one in found.best)


# ---- choices


def test_precision_changes_only_when_asked() -> None:
    shape, cluster = PRESETS["llama3-70b"], parse("h200-8")
    assert not plan(shape, cluster).best
    assert {one.precision for one in plan(shape, cluster, precisions=["bf16", "bf16-state"]).best} == {"bf16-state"}


def test_one_mesh_may_be_given() -> None:
    found = plan(PRESETS["llama3-8b"], parse("h100-64"), mesh=(1, 16, 1, 1, 4))
    assert [one.mesh for one in found.best] == [(1, 16, 1, 1, 4)]
    with pytest.raises(UserError, match="multiply to its 64 devices"):
        plan(PRESETS["llama3-8b"], parse("h100-64"), mesh=(1, 16, 1, 1, 1))
    with pytest.raises(UserError, match="divides"):
        plan(PRESETS["llama3-8b"], parse("h100-64"), mesh=(1, 1, 1, 1, 64))


@pytest.mark.parametrize(("key", "value"), [("precisions", ["bf61"]), ("remats", ["blok"])])
def test_unknown_choices(key: str, value: list[str]) -> None:
    with pytest.raises(UserError, match="Did you mean"):
        plan(PRESETS["llama3-8b"], parse("h100-64"), **{key: value})  # type: ignore[arg-type]


def test_estimates_reach_the_figures_that_rest_on_them() -> None:
    confirmed = plan(PRESETS["llama3-8b"], parse("h100-64")).estimates()
    assert confirmed == {"memory": (), "time": (), "usd": (), "kwh": ()}
    gb300 = plan(PRESETS["llama3-8b"], parse("gb300-64")).estimates()
    assert "peak" in gb300["time"] and gb300["memory"] == () and "power" in gb300["kwh"]
    mi300x = plan(PRESETS["llama3-8b"], parse("mi300x-64")).estimates()
    assert mi300x["time"] == ("efficiency",) and "efficiency" in mi300x["usd"]


def test_a_faster_chip_is_planned_faster() -> None:
    speeds = [
        plan(PRESETS["llama3-8b"], parse("h100-64"), efficiency=Efficiency(value=v, basis="given")).tokens_per_s
        for v in (0.3, 0.5, 0.7)
    ]
    assert speeds == sorted(speeds)
