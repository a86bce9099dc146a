"""Bytes of device memory at the peak of a step, term by term."""

from __future__ import annotations

from dataclasses import dataclass, fields

from portatrain.plan.policy import LOGITS_CHUNK_BYTES, LOGITS_COPIES, REMATS, Precision, Remat, Tuning
from portatrain.plan.workload import OnMesh


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one device. ``gathered``: weights that FSDP collected, and their gradients before they are
    scattered. ``activations``: what the remat policy keeps. ``workspace``: what one layer or the loss needs
    while it runs. ``runtime``: the framework's own."""

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
            self.params + self.grads + self.optimizer + self.activations + self.gathered + self.logits
            + self.workspace + self.runtime
        )  # fmt: skip

    def terms(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def state_bytes(work: OnMesh, precision: Precision, slot_bytes: float, tuning: Tuning) -> float:
    """Parameters, gradients and optimizer state: what no remat policy and no microbatch makes smaller."""
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
    """The peak, with ``tokens`` (T) of a microbatch on a device.

    It falls into the backward pass: all that is kept, and the larger of what a layer needs and what the loss
    needs. The loss forms its gradients as it goes, so that those of the output projection exist, in fp32,
    from the loss on.
    """
    width = precision.compute
    kept = sum(kind.n * kind.kept(remat) for kind in work.kinds) * tokens * width * (1 - remat.offload)
    # One layer's recomputed values, and the gradients of its widest ones.
    again = max(
        (kind.kept(REMATS["none"]) - kind.kept(remat) + kind.working for kind in work.kinds), default=0.0
    )
    layer_work = again * tokens * width
    stream = 2 * work.embed / work.mesh[4] * tokens * width  # the stream itself, and its gradient
    loss_stream = 3 * work.embed * tokens * width  # the normed result whole, its gradient, the stream's
    logits = LOGITS_COPIES * min(LOGITS_CHUNK_BYTES, tokens * work.vocab * 4) if work.vocab else 0.0

    cast = precision.param != precision.compute
    shared = work.mesh[1] > 1
    layer_gathered = 0.0
    if shared or cast:
        ahead = 2 if shared else 1  # the next layer's weights arrive while this one's work
        layer_gathered = work.largest_layer * (ahead * width + (width if shared else 0.0))
    head = work.head * (width if shared or cast else 0.0)
    head_grad = work.head * 4 if shared else 0.0
    ends = work.ends * width if tuning.keeps_ends and shared else 0.0
    layer_phase = layer_work + stream + layer_gathered + ends + head_grad
    loss_phase = loss_stream + logits + max(head, ends) + head_grad
    in_layer = layer_phase >= loss_phase
    gathered = (layer_gathered + ends + head_grad) if in_layer else (max(head, ends) + head_grad)
    workspace = (layer_work + stream) if in_layer else loss_stream
    slots = slot_bytes * precision.slots
    grads = work.trained * precision.grad * (2 if tuning.twice_grads and accumulation > 1 else 1)
    moving = kept + workspace + gathered
    return Memory(
        params=work.held * precision.param, grads=grads, optimizer=work.trained * slots, activations=kept,
        gathered=gathered, logits=0.0 if in_layer else logits, workspace=workspace,
        runtime=tuning.runtime_bytes + tuning.fragmentation * moving,
    )  # fmt: skip
