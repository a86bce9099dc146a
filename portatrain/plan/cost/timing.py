"""Compute the seconds of a step, term by term, and the part of each collective that hides behind computation."""

from __future__ import annotations

from dataclasses import dataclass, fields

from portatrain.plan.clusters.chip import Chip
from portatrain.plan.cost.collectives import all_gather, all_to_all, exchange, many_reduces
from portatrain.plan.cost.placement import Placement
from portatrain.plan.cost.policy import (
    ATTENTION_BACKWARD,
    ATTENTION_SHARE,
    EXACT_PASSES,
    FP32_SHARE,
    LOGITS_PASSES,
    MEMORY_SHARE,
    Precision,
    Remat,
    Tuning,
)
from portatrain.plan.cost.workload import CONTEXT, EXPERT, FSDP, TENSOR, LayerKind, OnMesh


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """One device's work per second: matmul FLOPs (at the efficiency factor), attention FLOPs, bytes. ``unit``: the size
    of its matrix unit, 1 if no size leaves part of it idle."""

    matmul: float
    attention: float
    memory: float
    unit: int = 1


def rates(chip: Chip, precision: Precision, efficiency: float) -> Rates:
    """Return the rates of a device of ``chip``. With fp8 matmuls, attention stays in the wider precision."""
    dies = chip.devices_per_chip
    bf16 = chip.peaks["bf16"].value
    peak = chip.peaks[precision.peak].value if precision.peak in chip.peaks else bf16
    if precision.peak == "fp32" and "fp32" not in chip.peaks:
        peak = bf16 * FP32_SHARE.get(chip.vendor, 0.25)
    wide = min(peak, bf16)
    bandwidth = chip.memory_bw.value if chip.memory_bw else 0.0
    return Rates(
        matmul=peak * 1e12 * efficiency / dies,
        attention=wide * 1e12 * efficiency * ATTENTION_SHARE / dies,
        memory=bandwidth * 1e9 * MEMORY_SHARE / dies,
        unit=int(chip.matrix_unit.value) if chip.matrix_unit else 1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """The seconds of a step on one device. A collective's field has only the part that computation does not hide;
    ``busy`` has the whole duration."""

    matmul: float
    attention: float
    recompute: float
    elementwise: float
    optimizer: float
    fsdp: float
    tensor: float
    context: float
    expert: float
    replica: float
    busy: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)

    @property
    def total(self) -> float:
        return (
            self.matmul
            + self.attention
            + self.recompute
            + self.elementwise
            + self.optimizer
            + self.fsdp
            + self.tensor
            + self.context
            + self.expert
            + self.replica
        )

    def terms(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "busy"}


def _left(collective: float, behind: float, share: float) -> float:
    """Return the seconds of a collective that stay visible if work of ``behind`` seconds hides at most ``share``."""
    return max(collective - share * behind, collective * (1 - share))


def attention_flops(work: OnMesh, tuning: Tuning) -> float:
    """Return the FLOPs of attention in the forward pass of a token, as the software stack computes it."""
    if tuning.skips_masked:
        # Of the blocks on the diagonal the mask hides half, which is computed too.
        diagonal = 1 + (tuning.block - 1) / (work.seq * work.mesh[CONTEXT]) if work.masked_flops else 1.0
        return work.attention_flops * diagonal * (1.0 if tuning.balances and work.dealt else work.busiest)
    return work.dealt_flops if tuning.balances else work.attention_flops + work.masked_flops


def summed(kind: LayerKind, tuning: Tuning) -> float:
    """Return how often the feed-forward part of a layer gathers or scatters the residual stream over tensor, forward
    and backward. Experts get `copies` of a token; if their sums are of pairs of a token and an expert, it grows by that
    factor."""
    return 4.0 if tuning.whole_rows else 4 * max(1.0, kind.copies)


def _trips(tuning: Tuning, remat: Remat) -> float:
    """Return how often rows travel: there and back, forward and backward, and again if they were not kept."""
    if tuning.whole_rows:
        return 4.0 if remat.everything else 6.0
    return 4 + (1 - remat.normed)


def travelled(work: OnMesh, kind: LayerKind, tuning: Tuning, remat: Remat) -> float:
    """Return the numbers per token that a layer exchanges with experts on all devices of the expert axis."""
    each = kind.copies * work.embed / (1 if tuning.whole_rows else work.mesh[TENSOR])
    return _trips(tuning, remat) * work.mesh[EXPERT] * each


def idle(work: OnMesh, rate: Rates) -> tuple[float, float]:
    """Return attention's time over its time on a matrix unit that its head sizes fill, forward and backward.

    Forward, a head's size is the depth of one matmul and the width of another; backward it is either in all five.
    Attention's other work, which `ATTENTION_SHARE` adds, is the same.
    """
    if not work.scores:
        return 1.0, 1.0
    key, value = work.heads
    more_key, more_value = -key % rate.unit, -value % rate.unit
    forward = (more_key + more_value) / (key + value)
    backward = (3 * more_key + 2 * more_value) / (3 * key + 2 * value)
    return 1 + ATTENTION_SHARE * forward, 1 + ATTENTION_SHARE * backward


def longer(work: OnMesh, tokens: float, tuning: Tuning) -> float:
    """Return the rows that grouped matmuls compute over the rows that experts have: 1 for experts with a capacity."""
    chosen = max((kind.copies for kind in work.kinds), default=0.0)
    if not chosen or work.one_hot:
        return 1.0
    if tuning.all_experts:  # the room of the buffer, over the expert axis, times the experts of a device
        return (work.mesh[EXPERT] if tuning.room else 1.0) * work.experts
    return 1 + tuning.boundary * work.experts / (tokens * chosen)


def multiplied(work: OnMesh, remat: Remat, grouped: float = 1.0) -> tuple[float, float, float]:
    """Return the numbers that a token is multiplied with: forward, backward, and again in the backward pass. Those of
    experts count ``grouped`` times.

    Recomputed is everything that is not kept, except the last projection of a block (down) and the ends. A router needs
    the results of its experts for the gradients of their weights, so it needs their last projection too. If values are
    chosen by kind of operation, nothing of experts is kept (`LayerKind.kept_hidden`).
    """
    lost = {"qkv": 1 - remat.qkv, "projected": 1 - remat.projected, "hidden": 1 - remat.hidden}
    numbers = {role: n + (grouped - 1) * work.routed[role] for role, n in work.matmul.items()}
    forward = sum(numbers.values())
    again = sum(numbers[role] * part for role, part in lost.items())
    if not remat.everything:
        again += grouped * work.routed["down"]
    if remat.matmuls:
        again += remat.hidden * grouped * work.routed["hidden"]
    # One matmul takes tokens to their places and one takes results back; the places have no gradient, the weights do.
    return forward + 2 * work.one_hot, 2 * forward + 3 * work.one_hot, again + (1 - remat.normed) * work.one_hot


def exchanged(work: OnMesh, tuning: Tuning, remat: Remat) -> float:
    """Return the numbers per token that are exchanged over context, so that every device has as much attention to
    compute: of queries and results, forward, of their gradients, and again if the backward pass recomputes."""
    if not tuning.balances:
        return 0.0
    trips = 2 if remat.everything else 3
    return trips * work.dealt * sum(kind.n * kind.exchanged for kind in work.kinds)


def step_time(
    work: OnMesh,
    placement: Placement,
    *,
    tokens: float,
    accumulation: int,
    remat: Remat,
    precision: Precision,
    slot_bytes: float,
    rate: Rates,
    tuning: Tuning,
) -> Time:
    """Return the time of a step of ``accumulation`` microbatches of ``tokens`` (T) on a device."""
    width, mesh, paths = precision.compute, work.mesh, placement.paths
    # Forward computation. A matmul is bound by its FLOPs or by its operands' bytes.
    ahead, back, once_more = multiplied(work, remat, longer(work, tokens, tuning))
    moved = work.weights * width + sum(kind.n * kind.touched for kind in work.kinds) * tokens * width
    matmul = max(2 * ahead * tokens / rate.matmul, moved / rate.memory)
    matmul_back = matmul * back / ahead if ahead else 0.0
    slower, slower_back = idle(work, rate)
    attention = slower * attention_flops(work, tuning) * tokens / rate.attention
    attention_back = ATTENTION_BACKWARD * attention * slower_back / slower
    if tuning.scores != "on-chip":
        attending = sum(kind.n for kind in work.kinds if not kind.chunks)
        scores = 4 * tokens * work.scores * attending / rate.memory
        attention += tuning.scores_passes[0] * scores
        attention_back += tuning.scores_passes[1] * scores
    # Chunks of a recurrence are recomputed unless everything is kept.
    exact, exact_back = (EXACT_PASSES * flops for flops in work.exact_flops)
    chunks = (work.recurrent_flops + exact) * tokens / rate.matmul
    matmul, matmul_back = matmul + chunks, matmul_back + (2 * work.recurrent_flops + exact_back) * tokens / rate.matmul
    sorting = 0.0 if work.one_hot else tuning.sorting
    each = (kind.n * (kind.streamed + sorting * kind.sorted) for kind in work.kinds)
    # Both one-hot tables, of places and of weights, are written and read.
    streamed = (sum(each) + 4 * work.one_hot / work.embed) * tokens * width
    elementwise = streamed / rate.memory
    logits = LOGITS_PASSES * 4 * work.vocab * tokens / rate.memory
    again = (
        (matmul - chunks) * (once_more / ahead if ahead else 0.0)
        + (0.0 if remat.everything else chunks)
        + attention * (1 - remat.attention)
        + elementwise * (1 - remat.normed)
    )
    forward = matmul + attention + elementwise + logits
    backward = matmul_back + attention_back + 2 * elementwise + again

    # Tensor parallelism gathers before and scatters after attention and feed-forward, and again in the backward pass.
    # Normed inputs that were not kept are gathered again, and the projection's sum is scattered again. The embedding
    # and the loss add one more pair, each way.
    layers = sum(kind.n for kind in work.kinds)
    tensor_s = 0.0
    if mesh[TENSOR] > 1:
        stream = all_gather(paths[TENSOR], tokens * work.embed * width)
        more = 2 * (1 - remat.normed) + (1 - remat.projected)
        tensor_s = stream * (4 + sum(kind.n * (4 + summed(kind, tuning) + more) for kind in work.kinds))
    # Context parallelism gathers keys and values forward and backward, and scatters their gradients.
    context_s = 0.0
    if mesh[CONTEXT] > 1:
        kv = max((kind.kv for kind in work.kinds), default=0.0)
        context_s = 3 * layers * all_gather(paths[CONTEXT], tokens * mesh[CONTEXT] * kv * width)
        context_s += exchange(paths[CONTEXT], exchanged(work, tuning, remat) * tokens * width)
    expert_s = 0.0
    if mesh[EXPERT] > 1:
        for kind in work.kinds:
            trips = _trips(tuning, remat)
            sent = travelled(work, kind, tuning, remat) / trips * tokens * width
            expert_s += trips * kind.n * all_to_all(paths[EXPERT], sent)
    compute = forward + backward
    left_tensor = _left(tensor_s, compute, tuning.hide_tensor)
    left_context = _left(context_s, attention + attention_back, tuning.hide_context)
    left_expert = _left(expert_s, compute, tuning.hide_expert)

    # FSDP: weights are gathered forward and backward, gradients scattered in the accumulation's precision.
    gather = all_gather(paths[FSDP], (work.gathered_layers + work.gathered_ends) * width)
    ends = work.gathered_ends if tuning.keeps_ends else 0.0
    regather = all_gather(paths[FSDP], (work.gathered_layers + work.gathered_ends - ends) * width)
    scatter = all_gather(paths[FSDP], (work.gathered_layers + work.gathered_ends) * precision.grad)
    left_fsdp = _left(gather, forward, tuning.hide_fsdp) + _left(regather + scatter, backward, tuning.hide_fsdp)

    # Gradients of parameters that are whole on several devices are reduced once a step, behind the last backward pass.
    reduce = sum(
        many_reduces([paths[axis] for axis in axes], numel * precision.grad) for numel, axes in work.replicated
    )
    left_reduce = _left(reduce, backward, tuning.hide_replica)
    slots = slot_bytes * precision.slots
    update = work.trained * (2 * (precision.param + slots) + precision.grad) / rate.memory
    n = accumulation
    return Time(
        matmul=n * (matmul + matmul_back),
        attention=n * (attention + attention_back),
        recompute=n * again,
        elementwise=n * (3 * elementwise + logits),
        optimizer=update,
        fsdp=n * left_fsdp,
        tensor=n * left_tensor,
        context=n * left_context,
        expert=n * left_expert,
        replica=left_reduce,
        busy=(reduce, n * (gather + regather + scatter), n * expert_s, n * context_s, n * tensor_s),
    )
