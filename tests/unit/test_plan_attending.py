"""The planner prices the kernel of attention that runs, by the same table that the backends read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from portatrain.backends.choose_kernel import choose
from portatrain.backends.kernels import Case, Site
from portatrain.plan.attending import _case, grouped_name_of, kernel_of, priced
from portatrain.plan.clusters.names import parse
from portatrain.plan.cost.efficiency import Efficiency
from portatrain.plan.cost.memory import memory
from portatrain.plan.cost.placement import assign_axes
from portatrain.plan.cost.policy import PRECISIONS, REMATS, TUNING, Tuning
from portatrain.plan.cost.recipes import shape_of
from portatrain.plan.cost.shapes import PRESETS
from portatrain.plan.cost.tensors import Sizes
from portatrain.plan.cost.timing import attention_flops, rates, step_time
from portatrain.plan.cost.workload import on_mesh
from portatrain.plan.render import _terms
from portatrain.plan.search import plan
from portatrain.recipe import apply_overrides, load_recipe

BF16 = PRECISIONS["bf16"]
SHAPE = PRESETS["llama3-8b"]
MESHES: tuple[Sizes, ...] = ((1, 8, 1, 1, 1), (1, 4, 1, 1, 2), (1, 4, 1, 2, 1), (1, 1, 1, 1, 16))


@pytest.mark.parametrize("stack", TUNING)
@pytest.mark.parametrize("mesh", MESHES)
def test_it_is_the_kernel_that_the_backends_choose(stack: str, mesh: Sizes) -> None:
    for precision in (BF16, PRECISIONS["fp32"]):
        made = kernel_of(SHAPE, mesh, 2, precision, TUNING[stack])
        assert made == choose("attention", _case(SHAPE, mesh, 2, precision, TUNING[stack])).kernel


@pytest.mark.parametrize(
    ("stack", "kernel", "balances"),
    [("jax-tpu", "splash", True), ("torch-cuda", "flex", True), ("cpu", "chunked", False)],
)
def test_queries_are_dealt_out_over_context_where_the_backend_does(stack: str, kernel: str, balances: bool) -> None:
    mesh: Sizes = (1, 2, 1, 4, 1)
    made = kernel_of(SHAPE, mesh, 2, BF16, TUNING[stack])
    assert made is not None and made.name == kernel
    assert priced(TUNING[stack], SHAPE, mesh, 2, BF16).balances is balances


def test_heads_that_no_device_shares_evenly_are_priced_as_they_run() -> None:
    """Of 24 heads and 6 kv heads on 8 devices, three heads of a device read one or two kv heads."""
    shape = replace(SHAPE, heads=24, kv_heads=6, embed=24 * 128)
    even, uneven = (kernel_of(shape, (1, 1, 1, 1, n), 1, BF16, TUNING["jax-tpu"]) for n in (6, 8))
    assert even is not None and even.name == "splash"
    assert uneven is not None and uneven.name == "chunked"


def needed(tuning: Tuning) -> float:
    work = on_mesh(SHAPE, (1, 8, 1, 1, 1))
    return memory(
        work, tokens=2 * work.seq, accumulation=1, remat=REMATS["block"], precision=BF16, slot_bytes=8, tuning=tuning
    ).total


def attended(tuning: Tuning, name: str) -> float:
    cluster, mesh = parse(name), (1, 8, 1, 1, 1)
    places = assign_axes(cluster, mesh, cluster.devices)
    assert not isinstance(places, str)
    work = on_mesh(SHAPE, mesh)
    return step_time(
        work,
        places[0],
        tokens=2 * work.seq,
        accumulation=1,
        remat=REMATS["none"],
        precision=BF16,
        slot_bytes=8,
        rate=rates(cluster.chip, BF16, 0.6),
        tuning=tuning,
    ).attention


@pytest.mark.parametrize(("stack", "cluster"), [("jax-tpu", "tpu-v5p-16"), ("torch-cuda", "h100-8")])
def test_scores_in_memory_cost_memory_and_time(stack: str, cluster: str) -> None:
    fused, whole = (replace(TUNING[stack], scores=scores) for scores in ("on-chip", "whole"))
    scores = 4 * 2 * 32 * 8192**2  # of a layer, all heads
    assert needed(whole) - needed(fused) >= scores
    rate = rates(parse(cluster).chip, BF16, 0.6)
    assert attended(whole, cluster) - attended(fused, cluster) == pytest.approx(11 * 32 * scores / rate.memory)
    masked = replace(fused, skips_masked=False)
    assert attended(masked, cluster) == pytest.approx(2 * attended(fused, cluster))


def test_a_mask_of_numbers_is_memory_of_torch() -> None:
    fused, masked = (replace(TUNING["torch-cuda"], mask=mask) for mask in (False, True))
    fragments = 1 + fused.fragmentation
    assert needed(masked) - needed(fused) == pytest.approx(2 * 8192**2 * 2 * fragments)


def test_a_recipe_shows_the_options_of_its_attention() -> None:
    recipe = load_recipe("tiny-lm")
    assert shape_of(recipe).attention == {"causal", "segments"}
    more = apply_overrides(recipe, ["model.softcap=30.0", "model.window=32"])
    assert shape_of(more).attention == {"causal", "segments", "softcap", "window"}
    assert shape_of(load_recipe("tiny-vit")).attention == frozenset()


def test_the_kernel_stands_in_the_plan() -> None:
    made = plan(SHAPE, parse("h100-8"), efficiency=Efficiency(value=0.6, basis="given"))
    assert made.chosen is not None
    tuning = TUNING["torch-cuda"]
    kernel = kernel_of(SHAPE, made.chosen.mesh, made.chosen.rows, BF16, tuning)
    assert kernel is not None
    assert made.chosen.kernel == kernel.name == "flex"
    assert priced(tuning, SHAPE, made.chosen.mesh, made.chosen.rows, BF16).scores == "on-chip"
    assert "flex" in [str(cell) for column in _terms(made).columns for cell in column.cells]


def test_a_kernel_of_blocks_computes_those_on_the_diagonal_whole() -> None:
    for mesh, blocks in (((1, 8, 1, 1, 1), 16), ((1, 4, 1, 2, 1), 16), ((1, 1, 1, 16, 1), 16)):
        work = on_mesh(SHAPE, mesh)
        made = priced(TUNING["jax-tpu"], SHAPE, mesh, 1, BF16)
        assert made.block == 512 and made.skips_masked
        # Of 16 x 16 blocks 136 are computed, where the mask shows the pairs of 128.
        assert attention_flops(work, made) == pytest.approx(work.attention_flops * (blocks + 1) / blocks, rel=2e-4)


@pytest.mark.parametrize(
    ("stack", "mesh", "embed", "kernel"),
    [
        ("torch-cuda", (1, 1, 4, 1, 2), 4096, "grouped_mm"),
        ("torch-cuda", (1, 1, 4, 1, 2), 4100, "written-out"),  # rows that are no multiple of 16 bytes
        ("jax-tpu", (1, 1, 4, 1, 2), 4096, "ragged_dot"),
    ],
)
def test_the_kernel_of_experts_is_the_backends(stack: str, mesh: Sizes, embed: int, kernel: str) -> None:
    shape, tuning = replace(PRESETS["mixtral-8x7b"], embed=embed), TUNING[stack]
    assert grouped_name_of(shape, mesh, 1, BF16, tuning) == kernel
    rows = 4096 * 2
    case = Case(
        site=Site(backend=tuning.backend, device=tuning.device), dtype="bfloat16", shape=(rows, embed, 14336 // 2, 2)
    )
    assert choose("grouped_matmul", case).kernel.name == kernel
    assert grouped_name_of(PRESETS["llama3-8b"], mesh, 1, BF16, tuning) == ""


def test_static_buffers_have_room_for_the_rows_of_all_devices() -> None:
    """Kept and working values of experts grow by the expert axis on jax; on torch they are what routing sends."""
    shape = PRESETS["mixtral-8x7b"]
    for stack, room in (("jax-tpu", 4), ("torch-cuda", 1)):
        tuning = priced(TUNING[stack], shape, (1, 4, 4, 1, 1), 1, BF16)
        plain, mine = replace(tuning, room=False), on_mesh(shape, (1, 4, 4, 1, 1))
        options = {"tokens": 4096.0, "accumulation": 1, "remat": REMATS["none"], "precision": BF16, "slot_bytes": 8.0}
        more, less = (memory(mine, tuning=t, **options).activations for t in (tuning, plain))
        hidden = 2 * 2 + (2 if tuning.static else 0)
        rows = (room - 1) * 4096 * (2 * 2 * 4096 + hidden * 2 * 14336)  # two rows a token: in, out and hidden
        assert more - less == pytest.approx(32 * rows * 2)


def test_a_compiled_block_takes_torchs_grouped_matmul_in_bfloat16_only() -> None:
    """torch.compile traces it in no other dtype."""
    for dtype, name in (("bfloat16", "grouped_mm"), ("float32", "written-out")):
        case = Case(site=Site(backend="torch"), dtype=dtype, shape=(64, 16, 32, 4), traits=frozenset({"compiled"}))
        assert choose("grouped_matmul", case).kernel.name == name


def test_torchs_grouped_matmul_is_not_taken_in_float64() -> None:
    """The gradients that others are held to are computed in it (`benchmarks/exact_gradients.py`)."""
    for dtype, name in (("float64", "written-out"), ("float32", "grouped_mm")):
        case = Case(site=Site(backend="torch"), dtype=dtype, shape=(64, 16, 32, 4))
        assert choose("grouped_matmul", case).kernel.name == name
