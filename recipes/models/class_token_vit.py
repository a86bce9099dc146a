"""A vision transformer as transformers has it (Dosovitskiy et al. 2021): a class token, learned positions, biases.

`recipes/models/vit.py` is one of our own, with the mean over patches in place of the token.

Shape letters: B batch, P patches, S positions (the token and the patches), E embed, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from portatrain.checkpoint.interop import Fields, Hub, Row
from portatrain.model.layers import Dropout, PatchEmbedding
from portatrain.model.module import Module, Param
from portatrain.model.ops import Array, Batch, Loss, Ops
from recipes.models.encoder import Encoder, EncoderSizes, both, config_of, layer_rows, patch_rows, read_pair, read_sizes

LAYER = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "attn_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
}


@dataclass(frozen=True, kw_only=True)
class ClassTokenViTConfig(EncoderSizes):
    """The sizes of a `ClassTokenViT` for images of (rows, columns, channels)."""

    rows: int
    columns: int
    channels: int
    patch: int
    """Rows and columns of a patch."""
    classes: int
    qkv_bias: bool = True
    """Give queries, keys and values a bias."""
    dropout: float = 0.0
    """Dropout rate after the embedding and after each part of a layer."""
    norm_eps: float = 1e-12

    def build(self) -> ClassTokenViT:
        """Return the model."""
        return ClassTokenViT(self)

    def small(self) -> ClassTokenViTConfig:
        """Return the same kind of model with small sizes, for images of the same size (`portatrain check`)."""
        return replace(self, **self.small_sizes())

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.rows // self.patch) * (self.columns // self.patch)

    def sample_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what a sample has."""
        return {"image": (self.rows, self.columns, self.channels), "label": ()}

    def flops_per_sample(self) -> float:
        """Return the floating-point operations of forward and backward for one image, without recomputation."""
        cut = 6.0 * self.patch**2 * self.channels * self.embed * self.patches
        return cut + self.flops_of(self.patches + 1) + 6.0 * self.classes * self.embed

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        labels = {str(n): f"LABEL_{n}" for n in range(self.classes)}
        config = {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            **config_of(self),
            "image_size": self.rows if self.rows == self.columns else [self.rows, self.columns],
            "patch_size": self.patch,
            "num_channels": self.channels,
            "qkv_bias": self.qkv_bias,
            "id2label": labels,
            "label2id": {label: int(n) for n, label in labels.items()},
        }
        rows = [
            Row(theirs="vit.embeddings.cls_token", ours="token", axes=(None, None, 0)),
            Row(theirs="vit.embeddings.position_embeddings", ours="place", axes=(None, 0, 1)),
            *patch_rows("vit.embeddings.patch_embeddings.projection", "patches"),
            *both("vit.layernorm", "encoder/norm/scale", "encoder/norm/bias", None),
            *both("classifier", "head", "head_bias", None),
            *layer_rows(
                LAYER, "vit.encoder.layer.{}", "encoder/blocks", self.layers, without="" if self.qkv_bias else "qkv"
            ),
        ]
        names = {"hidden_size": "embed", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
        names |= {"intermediate_size": "mlp", "layer_norm_eps": "norm_eps", "patch_size": "patch"}
        names |= {"num_channels": "channels", "qkv_bias": "qkv_bias", "image_size": "rows"}
        return Hub(config=config, rows=tuple(rows), overrides={k: f"model.{v}" for k, v in names.items()})


class ClassTokenViT(Module):
    """An image classifier. A batch has image, (B, rows, columns, channels) float, and label, (B,) integers."""

    def __init__(self, c: ClassTokenViTConfig) -> None:
        self.patches = PatchEmbedding(rows=c.rows, columns=c.columns, channels=c.channels, patch=c.patch, embed=c.embed)
        self.token = Param(embed=c.embed, fan_in_axes=0)
        self.place = Param(positions=c.patches + 1, embed=c.embed, fan_in_axes=0)
        self.dropout = Dropout(c.dropout)
        self.encoder = Encoder(c, bias="qkvo" if c.qkv_bias else "o", dropout=c.dropout)
        self.head = Param(classes=c.classes, embed=c.embed, fan_in_axes=0)
        self.head_bias = Param(classes=c.classes, fan_in_axes=0, init="zeros")

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the summed cross-entropy, in nats, and record the metric `accuracy`. A label below 0 has no weight."""
        logits_BC = self.predict(ops, batch)
        ops.aux("accuracy", ops.cast(ops.argmax(logits_BC) == batch["label"], "float32"))
        own_B = ops.take_along(logits_BC, batch["label"][:, None], axis=1)[:, 0]
        weight_B = ops.cast(batch["label"] >= 0, "float32")
        return ops.loss((ops.logsumexp(logits_BC) - own_B) * weight_B, weight_B)

    def predict(self, ops: Ops, batch: Batch) -> Array:
        """Return the logits, (B, C) float32."""
        x_BE = self.features(ops, batch)
        return ops.bias(ops.einsum("be,ce->bc", x_BE, self.head, dtype="float32"), self.head_bias)

    def features(self, ops: Ops, batch: Batch) -> Array:
        """Return the features of the class token after the last layer, (B, E)."""
        x_BPE = self.patches(ops, batch["image"])
        token_BE = ops.weight(self.token) + 0 * x_BPE[:, 0]
        x_BSE = ops.concat([token_BE[:, None], x_BPE], axis=1) + ops.weight(self.place)
        return self.encoder(ops, self.dropout(ops, x_BSE))[:, 0]


def from_hub(fields: Fields) -> ClassTokenViTConfig:
    """Return the sizes of a ViT. Defaults are those of ViTConfig in transformers."""
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        fields.get(name)  # dropout while training, which a recipe decides
    for name in ("encoder_stride", "pooler_act", "pooler_output_size"):
        fields.get(name)  # of parts that a classifier does not have
    rows, columns = read_pair(fields, "image_size", 224)
    patch, other = read_pair(fields, "patch_size", 16)
    if patch != other:
        fields.problem("patch_size", "square patches")
    if rows % patch or columns % patch:
        fields.problem("image_size", f"a size that patch_size {patch} divides")
        rows = columns = patch
    labels = fields.get("id2label")
    named = len(labels) if isinstance(labels, dict) and labels else 2
    return ClassTokenViTConfig(
        **read_sizes(fields, eps=1e-12, activation="gelu", embed=768, layers=12, heads=12, mlp=3072),
        rows=rows,
        columns=columns,
        channels=fields.size("num_channels", 3),
        patch=patch,
        classes=fields.size("num_labels", named),
        qkv_bias=fields.flag("qkv_bias", True),
    )
