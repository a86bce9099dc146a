"""The planner's time of experts and of heads that do not fill a matrix unit, against counts made here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from portatrain.plan.clusters.names import parse
from portatrain.plan.cost.policy import PRECISIONS, REMATS, TUNING
from portatrain.plan.cost.shapes import PRESETS, ModelShape
from portatrain.plan.cost.timing import idle, longer, multiplied, rates
from portatrain.plan.cost.volumes import volumes
from portatrain.plan.cost.workload import OnMesh, on_mesh

ONE = (1, 1, 1, 1, 1)
MIXTRAL = PRESETS["mixtral-8x7b"]
EXPERTS = 32 * 2 * 3 * 4096 * 14_336
"""Numbers of Mixtral's experts that a token is multiplied with: layers, experts of a token, matrices."""


def _work(shape: ModelShape, mesh: tuple[int, int, int, int, int] = ONE) -> OnMesh:
    return on_mesh(replace(shape), mesh)


def test_the_last_projection_of_experts_is_recomputed_and_that_of_a_dense_layer_is_not() -> None:
    dense, mixed = _work(PRESETS["llama3-8b"]), _work(MIXTRAL)
    # That `dots` keeps nothing of experts was found in a compiled program (docs/measured/plan-accuracy.md).
    for name, part in (("block", 1 / 3), ("none", 0.0), ("dots", 1.0)):
        _, _, again = multiplied(mixed, REMATS[name])
        without = multiplied(mixed, replace(REMATS["none"], everything=True, **_kept(name)))[2]
        assert again - without == pytest.approx(part * EXPERTS)
    assert multiplied(dense, REMATS["block"])[2] == pytest.approx(sum(dense.matmul[r] for r in _LOST))


def test_by_kind_of_operation_no_hidden_width_of_experts_is_kept() -> None:
    """Of Mixtral: the input, queries, keys, values and the projection of attention. Of a DeepSeek-V3's dense layer also
    gate and up, and of a routed one those of its shared expert."""
    dots, (mixed,) = REMATS["dots"], _work(MIXTRAL).kinds
    for room in (1.0, 8.0):
        assert mixed.with_room(room).kept(dots, 2.0, static=True) == 4096 + (4096 + 2 * 1024) + 4096
    dense, routed = _work(PRESETS["deepseek-v3"]).kinds
    attention = 7168 + 128 * (192 + 192 + 128) + 7168
    assert dense.kept(dots, 2.0, static=True) == attention + 2 * 18_432
    assert routed.with_room(4.0).kept(dots, 2.0, static=True) == attention + 2 * 2048


_LOST = ("qkv", "projected", "hidden")


def _kept(name: str) -> dict[str, Any]:
    remat = REMATS[name]
    return {role: getattr(remat, role) for role in _LOST}


def test_a_grouped_matmul_computes_a_tile_for_both_of_its_experts() -> None:
    """Counted: rows of equal experts laid one after the other, and the tiles that each expert touches."""
    tuning, tokens = TUNING["jax-tpu"], 2048
    tile = tuning.boundary
    for mesh, experts in ((ONE, 8), ((1, 1, 4, 1, 1), 2)):
        work = _work(MIXTRAL, mesh)
        rows = tokens * MIXTRAL.experts_per_token
        each = rows / experts - 1  # one row less, so that no expert ends where a tile does
        touched = sum(int(((k + 1) * each - 1) // tile - (k * each) // tile + 1) for k in range(experts))
        assert longer(work, tokens, tuning) == pytest.approx(touched * tile / rows, abs=1.01 * tile / rows)
    assert longer(_work(PRESETS["llama3-8b"]), tokens, tuning) == 1.0


def test_xla_on_gpus_multiplies_every_row_with_every_expert() -> None:
    """As compiled for 256 B200s, where the buffer of a device has room for the rows of all eight of an exchange."""
    tuning = replace(TUNING["jax-gpu"], room=True)
    for mesh in (ONE, (1, 1, 2, 1, 1), (1, 1, 8, 1, 1)):
        assert longer(_work(MIXTRAL, mesh), 16_384, tuning) == 8
    plain, much = (
        volumes(_work(MIXTRAL), tokens=2.0, remat=REMATS["block"], precision=PRECISIONS["bf16"], tuning=t)
        for t in (replace(tuning, all_experts=False), tuning)
    )
    assert much.flops(1) - plain.flops(1) == pytest.approx(7 * EXPERTS * 2 * 2.0 * 4)  # forward, backward twice, again


def test_only_what_experts_multiply_takes_longer() -> None:
    work = _work(MIXTRAL)
    one, two = multiplied(work, REMATS["none"])[0], multiplied(work, REMATS["none"], 2.0)[0]
    assert two - one == pytest.approx(EXPERTS)


def test_experts_of_a_capacity_get_their_tokens_by_matmuls() -> None:
    limited = replace(MIXTRAL, capacity=1.25)
    work, free = _work(limited), _work(MIXTRAL)
    table = 32 * (4096 * 2 * 1.25) * 4096  # layers x places of all experts x width
    assert work.one_hot == pytest.approx(table) and free.one_hot == 0.0
    more = multiplied(work, REMATS["block"]), multiplied(replace_one_hot(work), REMATS["block"])
    assert [a - b for a, b in zip(*more, strict=True)] == pytest.approx([2 * table, 3 * table, table])
    assert longer(work, 4096, TUNING["jax-tpu"]) == 1.0


def replace_one_hot(work: OnMesh) -> OnMesh:
    return replace(work, one_hot=0.0)


@pytest.mark.parametrize(
    ("cluster", "shape", "forward", "backward"),
    [
        ("tpu-v5p-128", "llama3-8b", 256 / 256, 5 * 128 / (5 * 128)),
        ("tpu-v6e-64", "llama3-8b", 512 / 256, 5 * 256 / (5 * 128)),
        ("tpu-v5p-128", "llama3-1b", 256 / 128, 5 * 128 / (5 * 64)),
        ("tpu-7x-128", "deepseek-v3", 512 / 320, (3 * 256 + 2 * 256) / (3 * 192 + 2 * 128)),
        ("h100-64", "llama3-1b", 1.0, 1.0),
    ],
)
def test_heads_are_as_wide_as_the_matrix_unit(cluster: str, shape: str, forward: float, backward: float) -> None:
    """``forward`` and ``backward``: numbers that a unit multiplies over numbers of the heads; three quarters of
    attention's time are theirs (`ATTENTION_SHARE`)."""
    rate = rates(parse(cluster).chip, PRECISIONS["bf16"], 0.5)
    found = idle(_work(PRESETS[shape]), rate)
    assert found == pytest.approx((1 + 0.75 * (forward - 1), 1 + 0.75 * (backward - 1)))
