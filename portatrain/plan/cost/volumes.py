"""Compute the work and the traffic of one device in a step, from which times follow and which compilers can confirm.

A collective is counted by the bytes of its gathered array, an all-reduce twice, as `portatrain.plan.compilers.hlo`
counts compiled ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.model.layout import MESH_AXES
from portatrain.plan.cost.policy import ATTENTION_BACKWARD, Precision, Remat, Tuning
from portatrain.plan.cost.timing import attention_flops, exchanged, longer, multiplied, summed, travelled
from portatrain.plan.cost.workload import CONTEXT, EXPERT, FSDP, TENSOR, OnMesh


@dataclass(frozen=True, kw_only=True, slots=True)
class Volumes:
    """The volumes of one microbatch; only ``reduced`` is for a step: (numel, mesh axes) of each all-reduce.

    ``gather``, ``regather``: bytes of weights gathered forward and backward. ``scatter``: bytes of gradients scattered.
    ``lookup``: bytes of rows of an embedding that stays sharded, and of their gradients, exchanged over fsdp.
    ``tensor``, ``context``, ``expert``: bytes of activations over that axis, for expert by all-to-all. ``matmul``:
    FLOPs of the forward pass without attention. ``attention``: FLOPs of its attention. ``again``: FLOPs of both that
    the backward pass recomputes, besides its own 2 and 2.5 times.
    """

    matmul: float
    attention: float
    again: float
    gather: float
    regather: float
    scatter: float
    lookup: float
    tensor: float
    context: float
    expert: float
    reduced: tuple[tuple[float, tuple[int, ...]], ...]

    def flops(self, accumulation: int) -> float:
        """Return the FLOPs of a step: forward, backward, and recomputation."""
        return accumulation * (3 * self.matmul + (1 + ATTENTION_BACKWARD) * self.attention + self.again)

    def bytes(self, accumulation: int, precision: Precision) -> dict[str, float]:
        """Return the bytes of collectives of a step, by mesh axes (joined by ``+``)."""
        n = accumulation
        found = {
            MESH_AXES[FSDP]: n * (self.gather + self.regather + self.scatter + self.lookup),
            MESH_AXES[TENSOR]: n * self.tensor,
            MESH_AXES[CONTEXT]: n * self.context,
            MESH_AXES[EXPERT]: n * self.expert,
        }
        for numel, axes in self.reduced:
            name = "+".join(MESH_AXES[axis] for axis in axes)
            found[name] = found.get(name, 0.0) + 2 * numel * precision.grad
        return {name: size for name, size in found.items() if size}


def volumes(work: OnMesh, *, tokens: float, remat: Remat, precision: Precision, tuning: Tuning) -> Volumes:
    """Return the volumes of a microbatch of ``tokens`` (T) on a device."""
    width, mesh = precision.compute, work.mesh
    grouped = longer(work, tokens, tuning) if tuning.all_experts else 1.0
    per_token = sum(work.matmul.values()) + (grouped - 1) * sum(work.routed.values())
    again = 2 * tokens * multiplied(work, remat, grouped)[2]
    attention = attention_flops(work, tuning) * tokens
    again += attention * (1 - remat.attention)
    # Chunks of a recurrence count as matmuls; their backward pass is not twice the forward one.
    exact, exact_back = work.exact_flops
    again += tokens * (exact_back - 2 * exact + (0.0 if remat.everything else work.recurrent_flops + exact))

    # Tensor parallelism gathers before and scatters after attention and feed-forward, and again in the backward pass.
    # Normed inputs that were not kept are gathered again, and the projection's sum is scattered again. The embedding
    # and the loss add one more pair, each way.
    layers = sum(kind.n for kind in work.kinds)
    tensor = context = expert = 0.0
    if mesh[TENSOR] > 1:
        more = 2 * (1 - remat.normed) + (1 - remat.projected)
        tensor = (4 + sum(kind.n * (4 + summed(kind, tuning) + more) for kind in work.kinds)) * tokens * work.embed
        tensor *= width
    # Context parallelism gathers keys and values forward and backward, and scatters their gradients.
    if mesh[CONTEXT] > 1:
        kv = max((kind.kv for kind in work.kinds), default=0.0)
        context = (3 * layers * mesh[CONTEXT] * kv + exchanged(work, tuning, remat)) * tokens * width
    if mesh[EXPERT] > 1:
        expert = sum(kind.n * travelled(work, kind, tuning, remat) for kind in work.kinds) * tokens * width
    # FSDP: weights are gathered forward and backward, gradients scattered in the accumulation's precision.
    gathered = (work.gathered_layers + work.gathered_ends) if mesh[FSDP] > 1 else 0.0
    ends = work.gathered_ends if tuning.keeps_ends and mesh[FSDP] > 1 else 0.0
    lookup = 0.0
    if tuning.static and gathered:
        # Only the output projection is gathered outside of layers, once. A lookup exchanges its rows instead, and
        # collects the gradient in fp32.
        gathered, ends = work.gathered_layers + work.head_gathered, work.head_gathered
        lookup = tokens * work.embed * (width + 4) if work.vocab else 0.0
    return Volumes(
        matmul=(2 * per_token + work.recurrent_flops + exact) * tokens,
        attention=attention,
        again=again,
        gather=gathered * width,
        regather=(gathered - ends) * width,
        scatter=gathered * precision.grad,
        lookup=lookup,
        tensor=tensor,
        context=context,
        expert=expert,
        reduced=work.replicated,
    )
