"""Describe a recipe for the planner: the sizes of its model, its batch, its optimizer.

``ModelShape`` describes a transformer by its sizes. It derives its parameters from them, or takes a list of parameters
(``portatrain.plan.cost.recipes`` makes one from any recipe).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from portatrain.errors import UserError
from portatrain.model.layout import Axes
from portatrain.plan.cost.tensors import Group, LogicalTensor, group

ADAM_BYTES = 8.0
"""Bytes per parameter of two moments in fp32."""


@dataclass(frozen=True, kw_only=True)
class MLA:
    """The sizes of DeepSeek's multi-head latent attention."""

    q_rank: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """The sizes of recurrent layers with a matrix as the state of a head, computed in chunks
    (`portatrain.model.layers.GatedDeltaNet`). ``layers``: their number, beside ``ModelShape.layers``."""

    layers: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    chunk: int

    @property
    def flops(self) -> float:
        """Return the FLOPs per token of a layer's chunks in the forward pass, without the weights, in products whose
        operands have the compute dtype."""
        c, k, v = self.chunk, self.key_size, self.value_size
        return 2.0 * self.value_heads * (c * k + c * v + 3 * k * v)

    @property
    def exact_flops(self) -> tuple[float, float]:
        """Return those in products of float32, forward and backward: the triangular systems, their inverses and what is
        solved with them. An inverse has the gradient of its last two products alone."""
        c, k, v = self.chunk, self.key_size, self.value_size
        levels, others = 2 * math.ceil(math.log2(c)), c * (2 * k + v)
        return 2.0 * self.value_heads * ((levels + 2) * c * c + others), 4.0 * self.value_heads * (2 * c * c + others)

    @property
    def numbers(self) -> float:
        """Return the float32 numbers per token that the backward pass of a layer's chunks reads: five arrays of pairs
        of positions, queries, keys and what is solved with them."""
        return float(self.value_heads * (5 * self.chunk + 5 * self.key_size + 4 * self.value_size))


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder (or encoder) and its training. ``batch``: samples per step over all devices.

    ``layers`` counts those with attention, and ``recurrence`` the others, if there are any.

    With ``experts`` > 0 the feed-forward layers are mixtures of experts of hidden size ``mlp``, except the first
    ``dense_layers``, of size ``dense_mlp``. ``capacity``: the tokens that experts compute over the tokens sent to them
    (1: dropless). ``options``: the traits of attention besides 'causal' and 'value-size', as the table of kernels names
    them; by default documents are packed. ``value_dim``: the size of a value head, if not ``head_dim``.
    ``slot_bytes``: bytes of optimizer state per trained parameter. ``flops_per_sample``: the model's own figure, for
    MFU. ``tensors`` replaces the derived parameters.
    """

    name: str
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    seq_len: int
    batch: int
    gated: bool = True
    tied: bool = False
    causal: bool = True
    options: frozenset[str] = frozenset({"segments"})
    experts: int = 0
    experts_per_token: int = 0
    shared_experts: float = 0
    capacity: float = 1.0
    dense_layers: int = 0
    dense_mlp: int = 0
    mla: MLA | None = None
    recurrence: Recurrence | None = None
    value_dim: int | None = None
    slot_bytes: float = ADAM_BYTES
    precision: str = "bf16"
    train_tokens: float | None = None
    flops_per_sample: float | None = None
    tensors: tuple[LogicalTensor, ...] = ()
    compute: Mapping[str, Axes] = field(default_factory=dict)
    params: Mapping[str, Axes] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("layers", "embed", "seq_len", "batch"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"shape {self.name}: {name}",
                    expected="a positive number",
                    got=str(getattr(self, name)),
                    do="Correct the recipe.",
                )

    def with_batch(self, batch: int) -> ModelShape:
        return replace(self, batch=batch)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len

    @property
    def q_width(self) -> int:
        """Return the numbers per token in the queries."""
        return self.heads * (self.mla.nope_dim + self.mla.rope_dim if self.mla else self.head_dim)

    @property
    def kv_width(self) -> int:
        """Return the numbers per token in keys and values together, as attention reads them."""
        if self.mla:
            return self.heads * (self.mla.nope_dim + self.mla.rope_dim + self.mla.value_dim)
        return self.kv_heads * (self.head_dim + self.value_size)

    @property
    def key_size(self) -> int:
        """Return the size of a key head."""
        return self.mla.nope_dim + self.mla.rope_dim if self.mla else self.head_dim

    @property
    def attention(self) -> frozenset[str]:
        """Return the traits of attention, as the table of kernels names them."""
        more = {"causal": self.causal, "value-size": self.value_size != self.key_size}
        return self.options | {name for name, there in more.items() if there}

    @property
    def value_size(self) -> int:
        """Return the size of a value head."""
        if self.mla:
            return self.mla.value_dim
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def out_width(self) -> int:
        """Return the numbers per token in the result of attention."""
        return self.heads * self.value_size

    @property
    def stacks(self) -> tuple[tuple[int, float, bool], ...]:
        """Return (layers, feed-forward width per token, whether it is routed) of every kind of layer."""
        if not self.experts:
            return ((self.layers, float(self.mlp), False),)
        routed = float(self.mlp * (self.experts_per_token + self.shared_experts))
        kinds = ((self.dense_layers, float(self.dense_mlp), False), (self.layers - self.dense_layers, routed, True))
        return tuple(kind for kind in kinds if kind[0])

    @cached_property
    def all_tensors(self) -> tuple[LogicalTensor, ...]:
        return self.tensors or derive(self)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        share = self.experts_per_token / self.experts if self.experts else 1.0
        return group(self.all_tensors, compute=self.compute, params=self.params, experts_share=share)

    @cached_property
    def memo(self) -> dict[object, Any]:
        """Return the cache of what was computed of this shape for a mesh, because clusters of one size ask for the
        same."""
        return {}

    @cached_property
    def parameters(self) -> int:
        """Return the number of all parameters; tied parameters count once."""
        return sum(tensor.size for tensor in self.all_tensors)

    @cached_property
    def active(self) -> float:
        """Return the number of parameters that a token is multiplied with: no lookup, but the output projection."""
        return sum(part.active for part in self.groups)

    @cached_property
    def attention_flops(self) -> float:
        """Return the FLOPs per token of attention's forward pass, over all layers, causal if the model is."""
        per_pair = 2 * (self.q_width + self.out_width)
        return self.layers * per_pair * self.seq_len * (0.5 if self.causal else 1.0)

    @property
    def model_flops(self) -> float:
        """Return the FLOPs per token of training, as MFU counts them: 6 x active + 3 x causal attention; no
        recomputation."""
        if self.flops_per_sample is not None:
            return self.flops_per_sample / self.seq_len
        return 6 * self.active + 3 * self.attention_flops


def derive(shape: ModelShape) -> tuple[LogicalTensor, ...]:
    """Return the parameters of a Llama-like model of these sizes: norms, attention, feed-forward, experts, ends."""
    table = _tensor("embed", 0, 0, vocab=shape.vocab, embed=shape.embed)
    found = [replace(table, matmul=int(shape.tied))]
    first = shape.dense_layers if shape.experts else shape.layers
    if first:
        mlp = shape.dense_mlp if shape.experts else shape.mlp
        found += _block(shape, "blocks" if not shape.experts else "dense_blocks", first, mlp, experts=0)
    if shape.experts:
        found += _block(shape, "blocks", shape.layers - first, shape.mlp, experts=shape.experts)
    found.append(_tensor("norm", 0, 0, embed=shape.embed))
    if not shape.tied:
        found.append(_tensor("head", 1, 0, embed=shape.embed, vocab=shape.vocab))
    return tuple(found)


def _block(shape: ModelShape, path: str, n: int, mlp: int, *, experts: int) -> list[LogicalTensor]:
    e, h, k, d, mla = shape.embed, shape.heads, shape.kv_heads, shape.head_dim, shape.mla
    made = [_tensor(f"{path}/{name}", 0, n, embed=e) for name in ("norm1", "norm2")]
    if mla:
        made += [
            _tensor(f"{path}/attn/q_down", 1, n, embed=e, q_rank=mla.q_rank),
            _tensor(f"{path}/attn/q_norm", 0, n, q_rank=mla.q_rank),
            _tensor(f"{path}/attn/q_up", 1, n, q_latent=mla.q_rank, heads=h, head_dim=mla.nope_dim + mla.rope_dim),
            _tensor(f"{path}/attn/kv_down", 1, n, embed=e, kv_rank=mla.kv_rank + mla.rope_dim),
            _tensor(f"{path}/attn/kv_norm", 0, n, kv_rank=mla.kv_rank),
            _tensor(f"{path}/attn/kv_up", 1, n, kv_latent=mla.kv_rank, heads=h, head_dim=mla.nope_dim + mla.value_dim),
            _tensor(f"{path}/attn/wo", 2, n, heads=h, head_dim=mla.value_dim, embed=e),
        ]
    else:
        made += [
            _tensor(f"{path}/attn/wq", 1, n, embed=e, heads=h, head_dim=d),
            _tensor(f"{path}/attn/wk", 1, n, embed=e, kv_heads=k, head_dim=d),
            _tensor(f"{path}/attn/wv", 1, n, embed=e, kv_heads=k, head_dim=shape.value_size),
            _tensor(f"{path}/attn/wo", 2, n, heads=h, head_dim=shape.value_size, embed=e),
        ]
    ways = ("gate", "up") if shape.gated else ("up",)
    if not experts:
        made += [_tensor(f"{path}/mlp/{way}", 1, n, embed=e, mlp=mlp) for way in ways]
        return [*made, _tensor(f"{path}/mlp/down", 1, n, mlp=mlp, embed=e)]
    made.append(_tensor(f"{path}/router", 1, n, embed=e, experts=experts))
    made += [_tensor(f"{path}/experts/{way}", 1, n, experts=experts, embed=e, mlp=mlp) for way in ways]
    made.append(_tensor(f"{path}/experts/down", 1, n, experts=experts, mlp=mlp, embed=e))
    if shape.shared_experts:
        wide = round(mlp * shape.shared_experts)
        made += [_tensor(f"{path}/shared/{way}", 1, n, embed=e, mlp=wide) for way in ways]
        made.append(_tensor(f"{path}/shared/down", 1, n, mlp=wide, embed=e))
    return made


def _tensor(name: str, inputs: int, layers: int, **axes: int) -> LogicalTensor:
    named = {"layers": layers, **axes} if layers else axes
    leading = int(bool(layers)) + (next(iter(axes)) == "experts")
    return LogicalTensor(
        name=name, shape=tuple(named.values()), axes=tuple(named), batch_dims=leading, fan_in_axes=inputs
    )


def _llama(name: str, **sizes: int) -> ModelShape:
    tied = name == "llama3-1b"
    return ModelShape(
        name=name,
        kv_heads=8,
        vocab=128_256,
        seq_len=8192,
        tied=tied,
        source="Llama 3 model cards",
        train_tokens=15.6e12 if not tied else 9e12,
        **sizes,  # type: ignore[arg-type]
    )


PRESETS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _llama("llama3-1b", layers=16, embed=2048, heads=32, head_dim=64, mlp=8192, batch=512),
        _llama("llama3-8b", layers=32, embed=4096, heads=32, head_dim=128, mlp=14_336, batch=512),
        _llama("llama3-70b", layers=80, embed=8192, heads=64, head_dim=128, mlp=28_672, batch=1024),
        _llama("llama3-405b", layers=126, embed=16_384, heads=128, head_dim=128, mlp=53_248, batch=2048),
        ModelShape(
            name="llama2-70b",
            layers=80,
            embed=8192,
            heads=64,
            kv_heads=8,
            head_dim=128,
            mlp=28_672,
            vocab=32_000,
            seq_len=4096,
            batch=1024,
            train_tokens=2e12,
            source="Llama 2 model card",
        ),
        ModelShape(
            name="mixtral-8x7b",
            layers=32,
            embed=4096,
            heads=32,
            kv_heads=8,
            head_dim=128,
            mlp=14_336,
            vocab=32_000,
            experts=8,
            experts_per_token=2,
            seq_len=4096,
            batch=1024,
            source="Mixtral model card",
        ),
        ModelShape(
            name="deepseek-v3",
            layers=61,
            embed=7168,
            heads=128,
            kv_heads=128,
            head_dim=128,
            mlp=2048,
            vocab=129_280,
            experts=256,
            experts_per_token=8,
            shared_experts=1,
            dense_layers=3,
            dense_mlp=18_432,
            seq_len=4096,
            batch=15_360,
            train_tokens=14.8e12,
            source="DeepSeek-V3 report; without its multi-token prediction module",
            mla=MLA(q_rank=1536, kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128),
            params={"q_latent": "fsdp", "kv_latent": "fsdp"},
        ),
    )
}
"""Shapes by name, beside the recipes of the same names. Batches are those of the recipes; the models' own batches were
ramped or unpublished."""


def from_tensors(
    name: str, tensors: tuple[LogicalTensor, ...], *, seq_len: int, batch: int, **options: object
) -> ModelShape:
    """Return the shape of any model from its parameters alone, with sizes from their logical axes.

    Give what the axes do not show (``causal``, ``experts_per_token``, ``tied``). A model without heads has no
    attention, one without ``mlp`` no feed-forward.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors:
        for axis, size in zip(tensor.axes, tensor.shape, strict=True):
            sizes[axis] = max(sizes.get(axis, 0), size)
    made = [t.name.rpartition("/")[0] for t in tensors if t.fan_in_axes and t.axes[-1] == "mlp"]
    experts = sizes.get("experts", 0)
    if experts:
        options = _feed_forward(tensors) | options
    known: dict[str, object] = {
        "embed": sizes.get("embed") or max((t.shape[-1] for t in tensors), default=1),
        "layers": _layers(tensors) or 1,
        "heads": sizes.get("heads", 0),
        "kv_heads": sizes.get("kv_heads", sizes.get("heads", 0)),
        "head_dim": sizes.get("head_dim", 1),
        "value_dim": sizes.get("value_dim"),
        "mlp": sizes.get("mlp", 0),
        "vocab": sizes.get("vocab", 0),
        "gated": len(made) > len(set(made)),
        "experts": experts,
        "experts_per_token": min(1, experts),
    }
    return ModelShape(
        name=name,
        seq_len=seq_len,
        batch=batch,
        tensors=tensors,
        **(known | options),  # type: ignore[arg-type]
    )


def _feed_forward(tensors: tuple[LogicalTensor, ...]) -> dict[str, object]:
    """Return the sizes of feed-forward parts in a model with experts: `mlp` of an expert, `shared_experts` of what lies
    beside the experts in the same part, `dense_layers` and `dense_mlp` of the parts without experts."""
    last = [t for t in tensors if "mlp" in t.axes[t.batch_dims :][: t.fan_in_axes]]  # from the hidden width back
    routed = {t.name.rsplit("/", 2)[0] for t in last if "experts" in t.axes}
    width: dict[str, int] = {"experts": 0, "shared": 0, "dense": 0}
    dense_layers = 0
    for tensor in last:
        size = tensor.shape[tensor.axes.index("mlp")]
        beside = any(tensor.name.startswith(f"{part}/") for part in routed)
        kind = "experts" if "experts" in tensor.axes else "shared" if beside else "dense"
        width[kind] = max(width[kind], size)
        if kind == "dense":
            dense_layers += tensor.shape[0] if tensor.batch_dims else 1
    if not width["experts"]:
        return {}
    return {
        "mlp": width["experts"],
        "shared_experts": width["shared"] / width["experts"],
        "dense_layers": dense_layers,
        "dense_mlp": width["dense"],
    }


def _layers(tensors: tuple[LogicalTensor, ...]) -> int:
    """Return the number of layers: those with attention, counted by the matrix of its result under its most frequent
    name; without attention the sum of the different lengths of Stacks."""
    stacked = [t for t in tensors if t.batch_dims and t.axes[0] != "experts"]
    found: dict[str, int] = {}
    for tensor in stacked:
        if "heads" in tensor.axes[tensor.batch_dims :][: tensor.fan_in_axes]:
            name = "/".join(tensor.name.split("/")[-2:])
            found[name] = found.get(name, 0) + tensor.shape[0]
    return max(found.values(), default=sum({t.shape[0] for t in stacked}))
