"""What a device multiplies and sends in a step: by hand, and the same amounts that the times are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from portatrain.plan.attending import priced
from portatrain.plan.clusters.names import parse
from portatrain.plan.cost.placement import assign_axes
from portatrain.plan.cost.policy import PRECISIONS, REMATS, TUNING, Tuning
from portatrain.plan.cost.shapes import PRESETS
from portatrain.plan.cost.tensors import Sizes
from portatrain.plan.cost.timing import Time, attention_flops, rates, step_time
from portatrain.plan.cost.volumes import Volumes, volumes
from portatrain.plan.cost.workload import on_mesh

BF16, TORCH, XLA = PRECISIONS["bf16"], TUNING["torch-cuda"], TUNING["jax-tpu"]


def amounts(
    mesh: Sizes, *, remat: str = "block", stack: str = "jax-tpu", tokens: float = 8192, skips: bool = True
) -> Volumes:
    work = on_mesh(PRESETS["llama3-8b"], mesh)
    return volumes(
        work, tokens=tokens, remat=REMATS[remat], precision=BF16, tuning=replace(TUNING[stack], skips_masked=skips)
    )


def test_flops_of_llama3_8b_by_hand() -> None:
    """8192 tokens. A layer has 218 million weights, the output projection 525 million; a causal
    mask hides half of the pairs, and some kernels compute them nevertheless."""
    layer, head, down = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336, 4096 * 128_256, 4096 * 14_336
    for skips, pairs in ((True, 2 * 32 * 4096 * 8192), (False, 4 * 32 * 4096 * 8192)):
        kept, again = (amounts((1, 128, 1, 1, 1), remat=remat, skips=skips).flops(1) for remat in ("none", "block"))
        assert kept == pytest.approx(8192 * (6 * (32 * layer + head) + 3.5 * pairs), rel=1e-9)
        assert again - kept == pytest.approx(8192 * (2 * 32 * (layer - down) + pairs), rel=1e-9)


def test_fsdp_traffic_by_hand() -> None:
    """XLA gathers a layer's weights in bf16 forward and backward and scatters their gradients in fp32; the output
    projection is gathered once. Rows of the embedding are dealt out in bf16, their gradients collected in fp32."""
    layers, head = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096), 4096 * 128_256
    moved = amounts((1, 128, 1, 1, 1)).bytes(4, BF16)["fsdp"]
    assert moved == pytest.approx(4 * (layers * 8 + head * 6 + 8192 * 4096 * 6), rel=1e-4)


def test_nothing_moves_on_one_device() -> None:
    for stack in ("jax-tpu", "torch-cuda"):
        assert amounts((1, 1, 1, 1, 1), stack=stack).bytes(2, BF16) == {}


@pytest.mark.parametrize("mesh", [(1, 64, 1, 1, 1), (2, 32, 1, 1, 1), (1, 16, 1, 1, 4), (1, 16, 1, 4, 1)])
def test_times_are_made_of_these_amounts(mesh: Sizes) -> None:
    """On one rate for all, without latency, the seconds that collectives take are their bytes over it."""
    cluster = parse("h100-64")
    shape = replace(PRESETS["llama3-8b"], batch=128)
    work = on_mesh(shape, mesh)
    placements = assign_axes(cluster, mesh, 64)
    assert not isinstance(placements, str)
    rate = 1e9
    paths = tuple(
        replace(
            path,
            inner=path.size,
            outer=1,
            rate=rate * (path.size - 1) / path.size if path.size > 1 else 0.0,
            latency_s=0.0,
        )
        for path in placements[0].paths
    )
    placed = replace(placements[0], paths=paths)  # type: ignore[arg-type]
    tokens, rates_ = work.seq, rates(cluster.chip, BF16, 0.5)
    common = {"tokens": tokens, "remat": REMATS["block"], "precision": BF16}

    def timed(tuning: Tuning) -> Time:
        return step_time(work, placed, accumulation=2, slot_bytes=8.0, rate=rates_, tuning=tuning, **common)

    tuning = replace(TORCH, skips_masked=True, balances=False)
    time, told = timed(tuning), volumes(work, tuning=tuning, **common).bytes(2, BF16)
    # The gradients of what is whole on several devices are in both, over whichever axes it is whole on.
    assert sum(time.busy) * rate == pytest.approx(sum(told.values()), rel=1e-9)
    assert time.busy[1] * rate == pytest.approx(told["fsdp"], rel=1e-9)
    assert time.busy[4] * rate == pytest.approx(told.get("tensor", 0.0), rel=1e-9)
    # Queries that are dealt out over context go to one device, so none of their bytes stays.
    tuning = replace(TORCH, skips_masked=True)
    more = volumes(work, tuning=tuning, **common).bytes(2, BF16).get("context", 0.0) - told.get("context", 0.0)
    assert (timed(tuning).busy[3] - time.busy[3]) * (paths[3].rate or 1.0) == pytest.approx(more, rel=1e-9)
    if mesh[3] > 1:
        # Three times half of what 32 heads of 128 ask and get, of every layer and microbatch.
        assert more == 2 * 32 * 3 * tokens * (2 * 4096) / 2 * 2
        # In order, the last of 4 devices has 7/4 of the mean.
        assert attention_flops(work, tuning) * 1.75 == pytest.approx(
            attention_flops(work, replace(tuning, balances=False)), rel=1e-3
        )
        # Of the pairs of all chunks, what a chunk leaves out after its end: 2n+1 of 4n remain.
        assert attention_flops(work, replace(TORCH, skips_masked=False)) == pytest.approx(
            2 * work.attention_flops * 9 / 16, rel=1e-9
        )
    else:
        assert more == 0


def test_the_exchange_of_experts_by_hand() -> None:
    """Mixtral, 4096 tokens of a microbatch on each of 4 x 2 devices: two rows of 4096 numbers for each token, there and
    back, forward and backward, and both again if they were not kept. Every device of tensor sends whole rows; it sums
    tokens, not rows: twice around attention and twice around experts, in both directions, and at both ends."""
    shape, mesh, tokens = PRESETS["mixtral-8x7b"], (1, 1, 4, 1, 2), 4096.0
    work, tuning = on_mesh(shape, mesh), priced(TORCH, shape, mesh, 1, BF16)
    for remat, trips in (("none", 4), ("block", 6)):
        moved = volumes(work, tokens=tokens, remat=REMATS[remat], precision=BF16, tuning=tuning)
        assert moved.expert == 32 * trips * 4 * tokens * 2 * 4096 * 2
    kept = volumes(work, tokens=tokens, remat=REMATS["none"], precision=BF16, tuning=tuning)
    again = 2 * (1 - REMATS["none"].normed) + (1 - REMATS["none"].projected)
    assert kept.tensor == (4 + 32 * (8 + again)) * tokens * 4096 * 2
    # As others do it, whose runs are published: tensor divides the rows, and sums them.
    others = volumes(work, tokens=tokens, remat=REMATS["none"], precision=BF16, tuning=TORCH)
    assert others.expert < kept.expert and others.tensor > kept.tensor
