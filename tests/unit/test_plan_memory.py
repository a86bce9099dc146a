"""Memory and time by term, against arithmetic done by hand, and properties that every plan has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from portatrain.plan.clusters.names import parse
from portatrain.plan.cost.memory import Memory, memory
from portatrain.plan.cost.meshes import rules
from portatrain.plan.cost.placement import assign_axes
from portatrain.plan.cost.policy import ATTENTION_BACKWARD, ATTENTION_SHARE, PRECISIONS, REMATS, SCORES_COPIES, TUNING
from portatrain.plan.cost.shapes import PRESETS
from portatrain.plan.cost.tensors import Sizes
from portatrain.plan.cost.timing import Time, rates, step_time
from portatrain.plan.cost.workload import on_mesh

GIB = 2**30
P8B = 8_030_261_248


def need(
    name: str,
    mesh: Sizes,
    *,
    tokens: float,
    remat: str = "block",
    precision: str = "bf16",
    accumulation: int = 1,
    stack: str = "jax-tpu",
) -> Memory:
    shape = PRESETS[name]
    return memory(
        on_mesh(shape, mesh),
        tokens=tokens,
        accumulation=accumulation,
        remat=REMATS[remat],
        precision=PRECISIONS[precision],
        slot_bytes=shape.slot_bytes,
        tuning=TUNING[stack],
    )


@pytest.mark.parametrize(
    ("precision", "per_param"),
    # fp32 weights, gradients and Adam: 16 bytes. bf16 weights with fp32 Adam: 10, and bf16 gradients.
    [("fp32", 16), ("bf16", 16), ("bf16-state", 10), ("bf16-weights", 12)],
)
def test_state_is_so_many_bytes_a_parameter(precision: str, per_param: int) -> None:
    mesh = (1, 128, 1, 1, 1)
    terms = need("llama3-8b", mesh, tokens=8192, precision=precision, stack="torch-cuda", accumulation=2)
    assert terms.params + terms.grads + terms.optimizer == pytest.approx(per_param * P8B / 128)


def test_gradients_exist_twice_while_xla_accumulates() -> None:
    once, twice = (need("llama3-8b", (1, 128, 1, 1, 1), tokens=8192, accumulation=n) for n in (1, 4))
    assert twice.grads - once.grads == pytest.approx(P8B / 128 * 4)


def test_torchs_gradients_come_as_what_was_kept_goes() -> None:
    def grads(tokens: float, accumulation: int) -> float:
        mesh = (1, 128, 1, 1, 1)
        return need("llama3-8b", mesh, tokens=tokens, accumulation=accumulation, stack="torch-cuda").grads

    whole, kept = P8B / 128 * 4, 32 * 128 * 2 * 4096
    assert grads(8192, 4) == pytest.approx(whole)  # of the microbatches before
    assert grads(8192, 1) == 0
    assert grads(128, 1) == pytest.approx(whole - kept)


def test_torch_without_fsdp_holds_the_output_tables_gradient_from_the_loss_on() -> None:
    alone = need("llama3-1b", (8, 1, 1, 1, 1), tokens=8192, stack="torch-cuda", remat="none")
    head = 2048 * 128_256
    assert alone.grads == head * 4  # fp32, beside all that is kept
    assert alone.gathered >= 1_235_814_400 * 2  # every weight as it was cast, which autograd keeps


@pytest.mark.parametrize(
    ("remat", "widths"), [("block", 4096), ("attention", 4096 + 4096), ("dots", 4096 + 6144 + 4096 + 2 * 14336)]
)
def test_kept_activations_by_hand(remat: str, widths: int) -> None:
    """32 layers, 8192 tokens, two bytes a number; widths of Llama 3 8B: stream 4096, q k v 6144, mlp 14336."""
    last = {"dots": 4096}.get(remat, 0)  # torch keeps what the last matmul returned, too
    for stack, more in (("jax-tpu", 0), ("torch-cuda", last)):
        terms = need("llama3-8b", (1, 128, 1, 1, 1), tokens=8192, remat=remat, stack=stack)
        assert terms.activations == 32 * 8192 * 2 * (widths + more)


@pytest.mark.parametrize(("stack", "hidden"), [("jax-tpu", 6), ("torch-cuda", 4)])
def test_what_a_framework_keeps_of_a_layer_that_runs_as_it_is(stack: str, hidden: int) -> None:
    """Both norms' inputs and results in fp32 and what they return; q k v; attention's result; the feed-forward."""
    terms = need("llama3-8b", (1, 128, 1, 1, 1), tokens=8192, remat="none", stack=stack)
    assert terms.activations == 32 * 8192 * (4 * 4096 * 4 + 2 * (2 * 4096 + 6144 + 4096 + hidden * 14336))


def test_tensor_parallelism_cuts_what_lies_on_its_axis() -> None:
    terms = need("llama3-8b", (1, 16, 1, 1, 8), tokens=8192, remat="none")
    cut = 8 * 4096 + 6144 + 4096 + 6 * 14336
    assert terms.activations == 32 * 8192 * 2 * (cut / 8 + 2 * 4096)


def test_gathered_weights_and_the_output_projections_gradient() -> None:
    """Two layers in bf16 and the gradient of one; the projection's gradient in fp32, whole."""
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096
    ends = 2 * 4096 * 128_256 + 4096
    terms = need("llama3-8b", (1, 128, 1, 1, 1), tokens=8192, stack="torch-cuda")
    assert terms.gathered == layer * 6 + 4096 * 128_256 * 4 + ends * 2
    alone = need("llama3-8b", (128, 1, 1, 1, 1), tokens=8192, stack="torch-cuda")
    assert alone.gathered == layer * 2  # only the bf16 copy


def test_xla_holds_what_is_alive_at_the_peak() -> None:
    """Where a layer is the peak: all weights cast, two layers gathered, the projection's gradient whole in fp32, and
    chunks of scores; where it is the loss of one of several microbatches: the projection, and that gradient twice."""
    head = 4096 * 128_256
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096
    terms = need("llama3-8b", (1, 128, 1, 1, 1), tokens=8192)
    assert terms.grads == terms.logits == 0
    assert terms.gathered == pytest.approx(P8B / 128 * 2 + layer * 4 + head * 4)
    assert terms.workspace > SCORES_COPIES * 2**28
    few = need("llama3-8b", (1, 4, 1, 1, 1), tokens=2048)  # gradients of layers find no room where values were kept
    assert few.grads == pytest.approx((P8B - 2 * head - 4096) / 4 * 4 - few.activations)
    loss = need("llama3-8b", (1, 128, 1, 1, 1), tokens=8192, accumulation=4)
    assert loss.gathered == pytest.approx(P8B / 128 * 2 + head * 6)
    assert loss.logits == head * 4
    assert loss.grads == pytest.approx(P8B / 128 * 4)


def test_fewer_kv_heads_than_the_tensor_axis_are_held_whole() -> None:
    shape = replace(PRESETS["llama3-8b"], kv_heads=4)
    assert on_mesh(shape, (1, 1, 1, 1, 8)).kinds[0].kv == 2 * 4 * 128
    assert on_mesh(shape, (1, 1, 1, 1, 4)).kinds[0].kv == 2 * 4 * 128 / 4


meshes = st.tuples(
    st.sampled_from([1, 2]),
    st.sampled_from([4, 8, 64]),
    st.just(1),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
)


@given(
    st.sampled_from(["llama3-8b", "llama3-70b", "llama3-405b"]),
    meshes,
    st.sampled_from(list(REMATS)),
    st.integers(0, 4).filter(lambda axis: axis != 2),
    st.sampled_from(["jax-tpu", "torch-cuda"]),
)
def test_more_chips_never_need_more_memory_each(name: str, mesh: Sizes, remat: str, axis: int, stack: str) -> None:
    """Doubling any axis, the global batch as it is and taken in one microbatch."""
    shape = PRESETS[name]
    larger = tuple(2 * n if i == axis else n for i, n in enumerate(mesh))
    assume(rules(shape).fits(larger))  # type: ignore[arg-type]

    def total(sizes: Sizes) -> float:
        tokens = shape.batch * shape.seq_len / (sizes[0] * sizes[1] * sizes[2] * sizes[3])
        return need(name, sizes, tokens=tokens, remat=remat, stack=stack).total

    assert total(larger) <= total(mesh) * (1 + 1e-12)  # type: ignore[arg-type]


# ---- time


def when(name: str, cluster: str, mesh: Sizes, *, rows: int, remat: str = "none", accumulation: int = 1) -> Time:
    made, shape, precision = parse(cluster), PRESETS[name], PRECISIONS["bf16"]
    work = on_mesh(shape, mesh)
    placements = assign_axes(made, mesh, made.devices)
    assert not isinstance(placements, str)
    return step_time(
        work,
        placements[0],
        tokens=rows * work.seq,
        accumulation=accumulation,
        remat=REMATS[remat],
        precision=precision,
        slot_bytes=8,
        rate=rates(made.chip, precision, 0.5),
        tuning=TUNING[made.chip.stack],
    )


def test_compute_by_hand() -> None:
    time = when("llama3-8b", "h100-8", (1, 8, 1, 1, 1), rows=2)
    shape, tokens, rate = PRESETS["llama3-8b"], 2 * 8192, 989.5e12 * 0.5
    assert time.matmul == pytest.approx(6 * shape.active * tokens / rate)
    forward = 4 * 32 * 4096 * 8192 / 2 * tokens / (rate * ATTENTION_SHARE)  # a causal mask hides half
    assert time.attention == pytest.approx((1 + ATTENTION_BACKWARD) * forward)
    assert time.recompute == 0


def test_recomputing_a_block_costs_its_forward_pass_but_the_last_projection() -> None:
    kept, again = (when("llama3-8b", "h100-8", (1, 8, 1, 1, 1), rows=2, remat=r) for r in ("none", "block"))
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 2 * 4096 * 14336
    tokens, rate = 2 * 8192, 989.5e12 * 0.5
    matmul = 2 * 32 * layer * tokens / rate
    attention = kept.attention / (1 + ATTENTION_BACKWARD)
    logits = 24 * 128_256 * tokens / (3350e9 * 0.85)
    elementwise = (kept.elementwise - logits) / 3
    assert again.recompute == pytest.approx(matmul + attention + elementwise)
    assert again.matmul == kept.matmul


def test_fsdp_traffic_by_hand() -> None:
    """Weights twice in bf16 but the ends once (torch keeps them), gradients once in fp32, over 370 GB/s."""
    time = when("llama3-8b", "h100-8", (1, 8, 1, 1, 1), rows=2)
    ends = 2 * 4096 * 128_256 + 4096
    moved = 2 * P8B + 2 * (P8B - ends) + 4 * P8B
    assert time.busy[1] == pytest.approx(moved * 7 / 8 / 370e9)


def test_tensor_traffic_by_hand() -> None:
    """Eight times a layer, four more for the ends, each the stream of a microbatch."""
    time = when("llama3-8b", "h100-8", (1, 1, 1, 1, 8), rows=4)
    stream = 4 * 8192 * 4096 * 2
    assert time.busy[4] == pytest.approx((32 * 8 + 4) * stream * 7 / 8 / 370e9)
    assert time.tensor == pytest.approx(time.busy[4])  # nothing of it hides on this stack


def test_gradients_of_replicas_are_reduced_once_a_step() -> None:
    one = when("llama3-8b", "h100-64", (8, 8, 1, 1, 1), rows=2)
    four = when("llama3-8b", "h100-64", (8, 8, 1, 1, 1), rows=2, accumulation=4)
    assert one.busy[0] == four.busy[0] == pytest.approx(2 * 4 * P8B / 8 * 7 / 8 / 50e9)
    assert four.busy[1] == 4 * one.busy[1]


def test_experts_exchange_by_hand() -> None:
    """Two copies of a token there and back, forward and backward: four trips a layer when all is kept."""
    time = when("mixtral-8x7b", "h100-8", (1, 1, 8, 1, 1), rows=4)
    sent = 8 * 4 * 4096 * 2 * 4096 * 2
    assert time.busy[2] == pytest.approx(4 * 32 * sent / 8 * 7 / 8 / 370e9)
