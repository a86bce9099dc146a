"""Describe a model on one mesh: what a device holds, multiplies, keeps and sends, independent of the chip.

T below is the number of tokens of a microbatch on a device, counted once over the tensor axis: its rows times
seq_len / context. Widths are numbers per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.model.context_chunks import computed, dealt, imbalance, in_order, pairs
from portatrain.model.layout import MESH_AXES
from portatrain.plan.cost.policy import Remat
from portatrain.plan.cost.shapes import ModelShape
from portatrain.plan.cost.tensors import Group, Sizes, Split

REPLICA, FSDP, EXPERT, CONTEXT, TENSOR = range(len(MESH_AXES))
ROLES = ("qkv", "projected", "hidden", "down", "ends")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """The widths of one kind of layer on a device. ``n``: layers. ``res``: the residual stream as it is sharded
    between blocks. ``wide``: the stream inside blocks. ``q``: queries, and attention's result. ``mlp``: the hidden
    width that a token passes, ``routed`` of it in experts. ``copies``: copies of a token that experts get. ``chunks``:
    the numbers of 4 bytes that the backward pass of a recurrence reads; such layers have no scores of attention."""

    n: int
    res: float
    wide: float
    q: float
    out: float
    kv: float
    mlp: float
    ways: int
    copies: float
    routed: float = 0.0
    chunks: float = 0.0

    def with_room(self, room: float) -> LayerKind:
        """Return the widths of buffers that have room for ``room`` times the rows that experts get on average."""
        if room == 1.0 or not self.copies:
            return self
        return replace(
            self, copies=room * self.copies, mlp=self.mlp + (room - 1) * self.routed, routed=room * self.routed
        )

    def kept_hidden(self, remat: Remat) -> float:
        """Return the width of gate, and of up, that is kept. If values are chosen by kind of operation, that of experts
        is not: a grouped matmul is neither jax's ``dot_general`` nor torch's ``mm``."""
        return remat.hidden * (self.mlp - (self.routed if remat.matmuls else 0.0))

    def kept(self, remat: Remat, width: float, *, static: bool) -> float:
        """Return the numbers of ``width`` bytes per token that one layer keeps from forward to backward.

        If nothing is recomputed, these are the values that the frameworks' derivatives need, as counted in jax's scans
        and in torch's saved tensors. For each norm: its input and its result before scaling, in fp32. For the
        feed-forward: its widths, the activation and the product, and in XLA (``static``) two more factors of the
        activation's derivative. If values are chosen by kind of operation, torch also keeps the result of the last
        projection, which nothing needs, and the results of projections that tensor shards by rows, before they are
        summed; those of experts are none of them.
        """
        copies = 2 * self.copies * self.wide  # the inputs and the results of experts
        if remat.everything:
            hidden = (2 * self.ways + (2 if static else 0)) * self.mlp
            chunks = self.chunks * 4 / width
            return 4 * self.res * 4 / width + 2 * self.wide + copies + self.q + self.kv + self.out + hidden + chunks
        more = 0.0
        if remat.matmuls and not static:
            more = (2 if self.mlp > self.routed else 1) * self.wide - remat.projected * self.res
        return (
            self.res
            + remat.qkv * (self.q + self.kv)
            + remat.attention * self.out
            + remat.projected * self.res
            + more
            + self.ways * self.kept_hidden(remat)
            + remat.product * self.mlp
            + remat.normed * (2 * self.wide + copies)
        )

    @property
    def streamed(self) -> float:
        """Return the numbers per token that elementwise operations of the forward pass read or write: two norms, two
        additions, RoPE, the feed-forward's product."""
        return 10 * self.res + 2 * (self.q + self.kv) + (self.ways + 1) * self.mlp + 4 * self.chunks

    @property
    def sorted(self) -> float:
        """Return the numbers per token of one array of the tokens sorted by expert, each as often as it has experts."""
        return self.copies * self.wide

    @property
    def exchanged(self) -> float:
        """Return the numbers per token of queries and of their results."""
        return self.q + self.out

    @property
    def touched(self) -> float:
        """Return the numbers per token that the forward pass's matmuls read or write."""
        return 4 * self.wide + self.q + self.kv + self.out + (self.ways + 1) * self.mlp


@dataclass(frozen=True, kw_only=True, slots=True)
class OnMesh:
    """The sums from which memory and time follow. Numbers are parameters unless stated otherwise, and all are one
    device's share. ``matmul``: by role, the parameters that each of its tokens is multiplied with. ``scores``: of one
    query, over this device's heads. ``attention_flops`` and ``masked_flops``: per token, for the pairs that the mask
    shows and for the pairs that it hides. ``dealt_flops``: per token, for the pairs that are left if queries are dealt
    out over context in chunks, and a chunk leaves out the keys that it does not see. ``busiest``: the pairs that the
    mask shows to the busiest device of context over the mean, if every device keeps its own queries. ``dealt``: part of
    the queries that move if they are dealt out. ``heads``: the sizes of a key head and of a value head. ``routed``: the
    part of ``matmul`` that belongs to experts which a router chooses. ``recurrent_flops``: per token, of chunks of
    recurrences, forward; ``exact_flops``: those in float32, forward and backward. ``experts``: those on a device, of
    one layer. ``one_hot``: the numbers per token of a matmul that sorts tokens by expert, if they have a capacity."""

    mesh: Sizes
    rows: int
    held: float
    trained: float
    gathered_layers: float
    gathered_ends: float
    largest_layer: float
    ends: float
    head: float
    head_gathered: float
    trained_ends: float
    trained_head: float
    scores: float
    weights: float
    matmul: dict[str, float]
    replicated: tuple[tuple[float, tuple[int, ...]], ...]
    kinds: tuple[LayerKind, ...]
    attention_flops: float
    masked_flops: float
    dealt_flops: float
    busiest: float
    dealt: float
    heads: tuple[int, int]
    routed: dict[str, float]
    experts: float
    one_hot: float
    embed: int
    vocab: float
    seq: float
    recurrent_flops: float = 0.0
    exact_flops: tuple[float, float] = (0.0, 0.0)


def on_mesh(shape: ModelShape, mesh: Sizes) -> OnMesh:
    """Sum the parameters of ``shape`` as ``mesh`` shards them, and the widths of its layers."""
    found = shape.memo.get(mesh)
    if found is None:
        found = shape.memo[mesh] = _sum(shape, mesh)
    return found


def _sum(shape: ModelShape, mesh: Sizes) -> OnMesh:
    tensor, context = mesh[TENSOR], mesh[CONTEXT]
    held = trained = gathered_layers = gathered_ends = weights = ends = head = 0.0
    head_gathered = trained_ends = trained_head = 0.0
    matmul, routed = dict.fromkeys(ROLES, 0.0), dict.fromkeys(ROLES, 0.0)
    layers: dict[int, float] = {}
    replicated: dict[tuple[int, ...], float] = {}
    for part in shape.groups:
        mine, cut = part.param_shards(mesh), part.compute_shards(mesh)
        held += part.numel / mine
        trained += part.trainable / mine
        weights += part.numel / cut
        chosen = part.routed
        numbers = (shape.capacity if chosen else 1.0) * part.active / _without_experts(part, mesh)
        matmul[part.role] += numbers
        routed[part.role] += numbers if chosen else 0.0
        gathered = part.numel / cut if mine > cut else 0.0
        if part.layers:
            layers[part.layers] = layers.get(part.layers, 0.0) + part.numel / cut / part.layers
            gathered_layers += gathered
        else:
            gathered_ends += gathered
            ends += part.numel / cut
            table = part.active / part.passes
            if table / cut > head:
                head, trained_head = table / cut, table / mine * (part.trainable / part.numel)
                head_gathered = head if mine > cut else 0.0
            trained_ends += part.trainable / mine
        spread = _unsharded(part, mesh)
        if spread:
            replicated[spread] = replicated.get(spread, 0.0) + part.trainable / mine
    dealt_flops, busiest, moves = _over_context(shape, context)
    return OnMesh(
        mesh=mesh,
        rows=mesh[REPLICA] * mesh[FSDP] * mesh[EXPERT],
        held=held,
        trained=trained,
        gathered_layers=gathered_layers,
        gathered_ends=gathered_ends,
        largest_layer=max(layers.values(), default=0.0),
        ends=ends,
        head=head,
        head_gathered=head_gathered,
        trained_ends=trained_ends,
        trained_head=trained_head,
        scores=shape.heads * shape.seq_len / tensor,
        weights=weights,
        matmul=matmul,
        replicated=tuple((numel, axes) for axes, numel in replicated.items()),
        kinds=_kinds(shape, tensor),
        attention_flops=shape.attention_flops / tensor,
        masked_flops=shape.attention_flops / tensor if shape.causal else 0.0,
        dealt_flops=dealt_flops / tensor,
        busiest=busiest,
        dealt=moves,
        heads=(shape.key_size, shape.value_size),
        routed=routed,
        experts=shape.experts / mesh[EXPERT],
        one_hot=_one_hot(shape) / tensor,
        embed=shape.embed,
        vocab=shape.vocab / tensor,
        seq=shape.seq_len / context,
        **_chunks(shape, tensor),
    )


def _chunks(shape: ModelShape, tensor: int) -> dict[str, Any]:
    if shape.recurrence is None:
        return {}
    share = shape.recurrence.layers / tensor
    forward, back = shape.recurrence.exact_flops
    return {"recurrent_flops": share * shape.recurrence.flops, "exact_flops": (share * forward, share * back)}


def _over_context(shape: ModelShape, context: int) -> tuple[float, float, float]:
    """Return `dealt_flops` (over all heads), `busiest` and `dealt` of `OnMesh`."""
    length, causal = shape.seq_len, shape.causal
    whole = shape.attention_flops * (2 if causal else 1)
    if context == 1 or length % context or not causal or not whole:
        return whole, 1.0, 0.0
    plain, after = in_order(context, length), dealt(context, length, causal=True, window=None)
    left = sum(computed(chunks, length, causal=True, window=None) for chunks in after) / length**2
    busiest = imbalance([pairs(chunks, length, causal=True, window=None) for chunks in plain])
    return whole * left, busiest, 0.5 if after != plain else 0.0


def _one_hot(shape: ModelShape) -> float:
    """Return the numbers per token of a matmul with the one-hot table of (tokens, places of all experts) of a sample,
    over all layers. Experts of limited capacity get their tokens and return them by such matmuls (MaxText's
    `generate_masks`); dropless ones sort."""
    if not shape.experts or shape.capacity == 1.0:
        return 0.0
    places = shape.seq_len * shape.experts_per_token * shape.capacity
    return (shape.layers - shape.dense_layers) * places * shape.embed


def _kinds(shape: ModelShape, tensor: int) -> tuple[LayerKind, ...]:
    kv_parts = tensor
    if not shape.mla and shape.kv_heads < tensor:
        kv_parts = 1  # fewer kv heads than shards: every device computes them all
    found = []
    for n, mlp, routed in shape.stacks:
        found.append(
            LayerKind(
                n=n,
                res=shape.embed / tensor,
                wide=float(shape.embed),
                q=shape.q_width / tensor,
                out=shape.out_width / tensor,
                kv=shape.kv_width / kv_parts,
                mlp=mlp / tensor,
                ways=2 if shape.gated else 1,
                copies=float(shape.experts_per_token) if routed else 0.0,
                routed=shape.mlp * shape.experts_per_token / tensor if routed else 0.0,
            )
        )
    if (layer := shape.recurrence) is not None:
        keys, values = layer.value_heads * layer.key_size, layer.value_heads * layer.value_size
        found.append(
            LayerKind(
                n=layer.layers,
                res=shape.embed / tensor,
                wide=float(shape.embed),
                q=keys / tensor,
                out=2 * values / tensor,  # the result and its gate
                kv=(keys + values) / tensor,
                mlp=shape.mlp / tensor,
                ways=2 if shape.gated else 1,
                copies=0.0,
                chunks=layer.numbers / tensor,
            )
        )
    return tuple(found)


def _without_experts(part: Group, mesh: Sizes) -> int:
    """Return the shards of a matmul's work. Experts on other devices take their tokens along, so expert divides
    nothing."""
    shards = 1
    for split in part.compute:
        kept = tuple(axis for axis in split.over if axis != EXPERT)
        if kept:
            shards *= Split(split.axis, split.size, kept).shards(mesh)
    return shards


def _unsharded(part: Group, mesh: Sizes) -> tuple[int, ...]:
    """Return the batch and sequence axes over which the group's gradients are all-reduced, not reduce-scattered."""
    cut = {axis for split in part.params for axis in split.over}
    return tuple(a for a in (REPLICA, FSDP, EXPERT, CONTEXT) if mesh[a] > 1 and a not in cut)
