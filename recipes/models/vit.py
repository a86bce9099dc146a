"""A vision transformer (Dosovitskiy et al. 2021), pre-norm, with the mean over patches instead of a class token.

Shape letters: B batch, S patches (the sequence), E embed, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from portatrain.config import require
from portatrain.model.layers import MLP, Attention, Dropout, LayerNorm, PatchEmbedding
from portatrain.model.module import Module, Param, Stack
from portatrain.model.ops import Array, Batch, Loss, Ops


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The sizes of a `ViT` for images of (rows, columns, channels). mlp=None is 4 * embed."""

    rows: int
    columns: int
    channels: int
    patch: int
    classes: int
    embed: int
    layers: int
    heads: int
    mlp: int | None = None
    dropout: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "channels", "patch", "classes", "embed", "layers", "heads", "mlp"):
            if (size := getattr(self, name)) is not None:
                require(self, name, size >= 1, "an integer of at least 1")

    def build(self) -> ViT:
        return ViT(self)

    def small(self) -> ViTConfig:
        """Return the same kind of transformer with small sizes, for images of the same size (`portatrain check`)."""
        heads = min(self.heads, 4)
        return replace(self, embed=8 * heads, layers=min(self.layers, 2), heads=heads, mlp=self.mlp and 48)

    @property
    def mlp_size(self) -> int:
        return self.mlp or 4 * self.embed

    def flops_per_sample(self) -> float:
        """Return the floating-point operations of forward and backward for one image, without recomputation.

        They are 6 per weight and patch, 12 * layers * embed * patches^2 for attention, and 6 per weight of the head.
        """
        patches = (self.rows // self.patch) * (self.columns // self.patch)
        weights = self.layers * (4 * self.embed**2 + 2 * self.embed * self.mlp_size)
        weights += self.patch**2 * self.channels * self.embed
        attention = 12.0 * self.layers * self.embed * patches**2
        return 6.0 * weights * patches + attention + 6.0 * self.classes * self.embed


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with biases; every patch attends to all patches."""

    def __init__(self, c: ViTConfig) -> None:
        self.attn_norm = LayerNorm(embed=c.embed, eps=c.norm_eps)
        self.attn = Attention(
            embed=c.embed, heads=c.heads, kv_heads=c.heads, head_dim=c.embed // c.heads, causal=False, bias=True
        )
        self.attn_dropout = Dropout(c.dropout)
        self.mlp_norm = LayerNorm(embed=c.embed, eps=c.norm_eps)
        self.mlp = MLP(embed=c.embed, mlp=c.mlp_size)
        self.mlp_dropout = Dropout(c.dropout)

    def __call__(self, ops: Ops, x_BSE: Array) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn_dropout(ops, self.attn(ops, self.attn_norm(ops, x_BSE)))
        x_BSE = x_BSE + self.mlp_dropout(ops, self.mlp(ops, self.mlp_norm(ops, x_BSE)))
        return x_BSE, None


class ViT(Module):
    """An image classifier. A batch has image, (B, rows, columns, channels) float, and label, (B,) integers."""

    def __init__(self, c: ViTConfig) -> None:
        self.patches = PatchEmbedding(rows=c.rows, columns=c.columns, channels=c.channels, patch=c.patch, embed=c.embed)
        self.position = Param(patches=self.patches.patches, embed=c.embed, fan_in_axes=0)
        self.embed_dropout = Dropout(c.dropout)
        self.blocks = Stack(Block(c), c.layers)
        self.final_norm = LayerNorm(embed=c.embed, eps=c.norm_eps)
        self.head = Param(classes=c.classes, embed=c.embed, fan_in_axes=0, init=c.embed**-0.5)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the summed cross-entropy, in nats, and record the metric `accuracy`."""
        x_BE = self.features(ops, batch)
        correct_B = ops.top_k(self.logits(ops, x_BE), 1)[1][:, 0] == batch["label"]
        ops.aux("accuracy", ops.cast(correct_B, "float32"))
        return ops.cross_entropy(x_BE, self.head, batch["label"])

    def predict(self, ops: Ops, batch: Batch) -> Array:
        """Return the logits, (B, C) float32."""
        return self.logits(ops, self.features(ops, batch))

    def logits(self, ops: Ops, x_BE: Array) -> Array:
        """Return the logits of features (B, E), (B, C) float32."""
        return ops.einsum("be,ce->bc", x_BE, self.head, dtype="float32")

    def features(self, ops: Ops, batch: Batch) -> Array:
        """Return the mean of the patches' features, (B, E)."""

        x_BSE = self.patches(ops, batch["image"]) + ops.weight(self.position)
        x_BSE = ops.shard(x_BSE, "batch", "res_seq", None)
        x_BSE, _ = self.blocks(ops, self.embed_dropout(ops, x_BSE))
        x_BSE = ops.shard(self.final_norm(ops, x_BSE), "batch", "seq", None)
        return ops.mean(x_BSE, ("batch", "seq", "embed"), over=("seq",))
