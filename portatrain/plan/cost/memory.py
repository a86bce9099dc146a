"""Compute the bytes of device memory at the peak of a step, term by term."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from portatrain.plan.cost.policy import (
    LOGITS_CHUNK_BYTES,
    LOGITS_COPIES,
    REMATS,
    SCORES_CHUNK_BYTES,
    SCORES_COPIES,
    STATIC_LOGITS_COPIES,
    Precision,
    Remat,
    Tuning,
)
from portatrain.plan.cost.workload import EXPERT, LayerKind, OnMesh


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one device. ``gathered``: weights that FSDP gathered, and their gradients before they are
    scattered. ``activations``: what the remat policy keeps. ``workspace``: what one layer or the loss needs while it
    runs. ``runtime``: memory of the framework itself."""

    params: float
    grads: float
    optimizer: float
    activations: float
    gathered: float
    logits: float
    workspace: float
    runtime: float

    @property
    def total(self) -> float:
        return (
            self.params
            + self.grads
            + self.optimizer
            + self.activations
            + self.gathered
            + self.logits
            + self.workspace
            + self.runtime
        )

    def terms(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def state_bytes(work: OnMesh, precision: Precision, slot_bytes: float, tuning: Tuning) -> float:
    """Return the bytes of parameters, gradients and optimizer state, which no remat policy changes."""
    slots = slot_bytes * precision.slots
    return work.held * precision.param + work.trained * (precision.grad + slots) + tuning.runtime_bytes


def memory(
    work: OnMesh,
    *,
    tokens: float,
    accumulation: int,
    remat: Remat,
    precision: Precision,
    slot_bytes: float,
    tuning: Tuning,
) -> Memory:
    """Return the memory at the peak, for ``tokens`` (T) of a microbatch on a device.

    The peak occurs in the backward pass of a layer or in the loss. The loss forms its gradients as it goes:
    the gradients of the output projection are summed in fp32, whole, on every device.
    """
    width = precision.compute
    if tuning.room and work.mesh[EXPERT] > 1:
        work = replace(work, kinds=tuple(kind.with_room(work.mesh[EXPERT]) for kind in work.kinds))
    a_token = sum(kind.n * kind.kept(remat, width, static=tuning.static) for kind in work.kinds)
    kept = a_token * tokens * width * (1 - remat.offload)
    state = work.held * precision.param, work.trained * slot_bytes * precision.slots
    phases = _static if tuning.static else _eager
    grads, gathered, logits, workspace = phases(work, tokens, accumulation, remat, precision, tuning, kept)
    moving = kept + workspace + gathered
    return Memory(
        params=state[0],
        grads=grads,
        optimizer=state[1],
        activations=kept,
        gathered=gathered,
        logits=logits,
        workspace=workspace,
        runtime=tuning.runtime_bytes + tuning.fragmentation * moving,
    )


Phase = tuple[float, float, float, float]
"""Bytes of gradients, gathered and cast weights, logits, and temporary values."""


def _eager(
    work: OnMesh, tokens: float, accumulation: int, remat: Remat, precision: Precision, tuning: Tuning, kept: float
) -> Phase:
    """Return the memory of a stack that allocates as it runs.

    Weights are gathered and cast layer by layer; gradients of the microbatches before this one are live.
    """
    width = precision.compute
    layer_work = max((_again(kind, remat, width) for kind in work.kinds), default=0.0) * tokens * width
    stream = 2 * work.embed / work.mesh[4] * tokens * width  # the stream itself, and its gradient
    loss_stream = 3 * work.embed * tokens * width  # the normed result whole, its gradient, the stream's
    logits = LOGITS_COPIES * min(LOGITS_CHUNK_BYTES, tokens * work.vocab * 4) if work.vocab else 0.0
    # For packed documents, the numbers that attention adds to its scores: made once, live to the end of the step.
    mask = tokens * work.seq * work.mesh[3] * width if work.scores and tuning.mask else 0.0
    if tuning.scores != "on-chip":
        layer_work += SCORES_COPIES * 4 * tokens * work.scores

    cast = precision.param != precision.compute
    shared = work.mesh[1] > 1
    layer_gathered = whole = 0.0
    if shared or cast:
        ahead = 2 if shared else 1  # the weights of the next layer arrive while this one works
        layer_gathered = work.largest_layer * (ahead * width + (width if shared else 0.0))
    if cast and remat.everything and not shared:
        layer_gathered = whole = work.held * width  # autograd keeps every layer's
    head = work.head * (width if shared or cast else 0.0)
    head_grad = work.head * 4 if shared else 0.0
    ends = work.ends * width if tuning.keeps_ends and shared else 0.0
    grads = work.trained * precision.grad * (2 if tuning.twice_grads and accumulation > 1 else 1)
    if accumulation == 1:
        # Gradients arrive as kept values are freed, so the larger of the two counts. The loss makes the output table's
        # gradient before that.
        early = 0.0 if shared else work.trained_head * precision.grad
        grads = early + max(0.0, grads - early - kept)
    # A chunk's part of the output table's gradient, before it is added to the sum of all chunks.
    part = work.head * width if tokens * work.vocab * 4 > LOGITS_CHUNK_BYTES else 0.0
    in_layer = (grads, layer_gathered + ends + head_grad, 0.0, layer_work + stream + mask)
    in_loss = (grads, max(head, ends, whole) + head_grad, logits, loss_stream + part + mask)
    return max(in_layer, in_loss, key=sum)


def _again(kind: LayerKind, remat: Remat, width: float) -> float:
    """Return the numbers per token of one layer's backward pass besides kept values: its values, which autograd keeps
    while they are recomputed, and the gradients of the hidden widths."""
    values = kind.kept(REMATS["none"], width, static=False) - kind.kept(remat, width, static=False)
    return values + kind.ways * kind.mlp + kind.chunks * 4 / width


def _static(
    work: OnMesh, tokens: float, accumulation: int, remat: Remat, precision: Precision, tuning: Tuning, kept: float
) -> Phase:
    """Return the memory as XLA plans it: a value that is not live at the peak takes nothing."""
    width, grad = precision.compute, precision.grad
    shared = work.mesh[1] > 1
    # Every stored weight in the compute type, because XLA moves the cast out of the loop over layers.
    copies = work.held * width if precision.param != width else 0.0
    sums = work.trained * grad if tuning.twice_grads and accumulation > 1 else 0.0
    stream = work.embed / work.mesh[4] * tokens * width

    # In a layer: its weights and those of the next layer, or its gradients before they are scattered. The gradient of
    # the output table, from the loss, stays whole. Gradients of layers reuse the memory of kept values if it suffices.
    layers = max(0.0, (work.trained - work.trained_ends) * grad - kept)
    table = work.head * 4 if work.trained_head else 0.0
    layer = work.largest_layer * width * 2 if shared else 0.0
    scores = 4 * tokens * work.scores if tuning.scores != "on-chip" else 0.0
    if tuning.scores == "chunk":
        scores = min(max(SCORES_CHUNK_BYTES, scores / work.seq), scores)
    working = max((_layer_numbers(kind, remat, width) for kind in work.kinds), default=0.0) * tokens * width
    attending = max((_attention_numbers(kind) for kind in work.kinds), default=0.0) * tokens * width
    busy = max(working, attending + SCORES_COPIES * scores) + 2 * stream
    in_layer = (sums + layers, copies + layer + table, 0.0, busy)

    # In the loss: the output projection and the sum of its gradient, whole, in fp32. The gradient of a chunk is added
    # to the sum in place, but a loop over microbatches writes the new sum beside the old one.
    most = max(LOGITS_CHUNK_BYTES, work.head)
    logits = STATIC_LOGITS_COPIES * min(most, tokens * work.vocab * 4) if work.vocab else 0.0
    beside = table if accumulation > 1 else 0.0
    head = work.head * (width if work.head_gathered else 0.0) + table
    in_loss = (sums, copies + head, max(logits, beside), 3 * work.embed * tokens * width)
    # After the layers: all gradients, with the cast weights still live.
    in_update = (sums + work.trained * grad, copies, 0.0, 0.0)
    return max(in_layer, in_loss, in_update, key=sum)


def _layer_numbers(kind: LayerKind, remat: Remat, width: float) -> float:
    """Return numbers per token during the backward pass of a layer's feed-forward or recurrence: the layer's recomputed
    values, and the gradients of the hidden width or of the chunks."""
    again = (1 - remat.qkv) * (kind.q + kind.kv) + (1 - remat.attention) * kind.out + (1 - remat.projected) * kind.res
    hidden = kind.ways * (kind.mlp - kind.kept_hidden(remat)) + kind.ways * kind.mlp
    chunks = kind.chunks * 4 / width
    gradients = max(hidden, (1 if remat.everything else 2) * chunks + (hidden - kind.ways * kind.mlp))
    return again + gradients + 2 * kind.wide + 2 * kind.copies * kind.wide


def _attention_numbers(kind: LayerKind) -> float:
    """Return numbers per token during the backward pass of attention, without its scores: queries and result with their
    gradients, and keys and values with theirs, the latter in fp32."""
    return 2 * kind.q + 2 * kind.out + 5 * kind.kv + 2 * kind.wide
