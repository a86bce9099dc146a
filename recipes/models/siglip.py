"""SigLIP as transformers has it (Zhai et al. 2023, arXiv:2303.15343): a tower for images and one for texts, and the
loss of a sigmoid over every pair of an image and a text of the step's batch.

Shape letters: B batch, S patches or tokens, E embed, H heads, D head_dim, F the features that both towers end with;
G groups of N samples, M the samples beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub, Row
from portatrain.errors import UserError
from portatrain.model.layers import MLP, Embedding, LayerNorm, Linear, PatchEmbedding
from portatrain.model.module import Constant, Module, Param
from portatrain.model.ops import Array, Batch, Loss, Ops
from recipes.models.causal import check_sizes
from recipes.models.encoder import (
    Encoder,
    EncoderSizes,
    attention,
    both,
    config_of,
    layer_rows,
    patch_rows,
    read_pair,
    read_sizes,
)

LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "attn_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
}
SCALE, BIAS = math.log(10.0), -10.0
"""The first values of the scale's logarithm and of the bias (Zhai et al. 2023, section 3.2)."""


@dataclass(frozen=True, kw_only=True)
class ImageTower(EncoderSizes):
    """The sizes of the tower for square images of (size, size, channels)."""

    size: int
    """Rows and columns of an image."""
    channels: int
    patch: int
    """Rows and columns of a patch."""
    activation: str = "gelu_tanh"

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.size // self.patch) ** 2


@dataclass(frozen=True, kw_only=True)
class TextTower(EncoderSizes):
    """The sizes of the tower for texts. A text is padded to its length, since its last position stands for it."""

    vocab: int
    positions: int
    """The longest text, in tokens."""
    activation: str = "gelu_tanh"


@dataclass(frozen=True, kw_only=True)
class SigLIPConfig:
    """The sizes of a `SigLIP`. Both towers end with the features of the image tower, `image.embed`."""

    image: ImageTower
    text: TextTower
    group: int | None = None
    """The number of consecutive samples whose pairs are compared. None: all samples of the step's batch."""

    def __post_init__(self) -> None:
        check_sizes(self)

    @property
    def vocab(self) -> int:
        """The number of token ids of the text tower."""
        return self.text.vocab

    def build(self) -> SigLIP:
        """Return the model."""
        return SigLIP(self)

    def small(self) -> SigLIPConfig:
        """Return the same kind of model with small sizes, for `portatrain check`."""
        image, text = replace(self.image, **self.image.small_sizes()), replace(self.text, **self.text.small_sizes())
        return replace(self, image=image, text=text)

    def sample_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what a sample has."""
        return {"image": (self.image.size, self.image.size, self.image.channels), "tokens": (self.text.positions,)}

    def flops_per_sample(self) -> float:
        """Return the floating-point operations of forward and backward for one pair, without recomputation and without
        the products of the images with the texts of other pairs."""
        image, text = self.image, self.text
        found = 6.0 * image.patch**2 * image.channels * image.embed * image.patches + image.flops_of(image.patches)
        pool = 2 * image.embed**2 * (image.patches + 1) + 2 * image.embed * image.mlp_size
        return found + 6.0 * pool + text.flops_of(text.positions) + 6.0 * text.embed * image.embed

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        image, text = self.image, self.text
        config = {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "vision_config": {
                **config_of(image),
                "model_type": "siglip_vision_model",
                "image_size": image.size,
                "patch_size": image.patch,
                "num_channels": image.channels,
                "vision_use_head": True,
            },
            "text_config": {
                **config_of(text),
                "model_type": "siglip_text_model",
                "vocab_size": text.vocab,
                "max_position_embeddings": text.positions,
                "projection_size": image.embed,
                "pad_token_id": None,  # the defaults are ids beyond a smaller table
                "bos_token_id": None,
                "eos_token_id": None,
            },
        }
        seen, pool = "vision_model", "image_tower/pool"
        rows = [
            Row(theirs="logit_scale", ours="scale"),
            Row(theirs="logit_bias", ours="bias"),
            Row(theirs=f"{seen}.embeddings.position_embedding.weight", ours="image_tower/place"),
            *patch_rows(f"{seen}.embeddings.patch_embedding", "image_tower/patches"),
            *both(f"{seen}.post_layernorm", "image_tower/encoder/norm/scale", "image_tower/encoder/norm/bias", None),
            *layer_rows(LAYER, f"{seen}.encoder.layers.{{}}", "image_tower/encoder/blocks", image.layers),
            Row(theirs=f"{seen}.head.probe", ours=f"{pool}/probe", axes=(None, None, 0)),
            *both(f"{seen}.head.attention.out_proj", f"{pool}/attn/wo", f"{pool}/attn/o_bias", 2),
            *both(f"{seen}.head.layernorm", f"{pool}/norm/scale", f"{pool}/norm/bias", None),
            *both(f"{seen}.head.mlp.fc1", f"{pool}/mlp/up", f"{pool}/mlp/up_bias", 1),
            *both(f"{seen}.head.mlp.fc2", f"{pool}/mlp/down", f"{pool}/mlp/down_bias", 1),
            Row(theirs="text_model.embeddings.token_embedding.weight", ours="text_tower/embed/table"),
            Row(theirs="text_model.embeddings.position_embedding.weight", ours="text_tower/place"),
            *both("text_model.final_layer_norm", "text_tower/encoder/norm/scale", "text_tower/encoder/norm/bias", None),
            *layer_rows(LAYER, "text_model.encoder.layers.{}", "text_tower/encoder/blocks", text.layers),
            *both("text_model.head", "text_tower/head/weight", "text_tower/head/bias", 1),
        ]
        for n, letter in enumerate("qkv"):
            part = (n * image.embed, (n + 1) * image.embed)
            into = f"{seen}.head.attention.in_proj"
            rows += [
                Row(theirs=f"{into}_weight", ours=f"{pool}/attn/w{letter}", rows=1, part=part),
                Row(theirs=f"{into}_bias", ours=f"{pool}/attn/{letter}_bias", rows=0, part=part),
            ]
        return Hub(
            config=config, rows=tuple(rows), overrides={"vision_config": "model.image", "text_config": "model.text"}
        )


class AttentionPool(Module):
    """One vector from all positions: a learned query attends to them, and a feed-forward part follows (Lee et al. 2019,
    arXiv:1810.00825, section 3.2, with one seed)."""

    def __init__(self, c: EncoderSizes) -> None:
        self.probe = Param(embed=c.embed, fan_in_axes=0)
        self.attn = attention(c)
        self.norm = LayerNorm(embed=c.embed, eps=c.norm_eps)
        self.mlp = MLP(embed=c.embed, mlp=c.mlp_size, activation=c.activation)

    def __call__(self, ops: Ops, x_BSE: Array) -> Array:
        """Return (B, E)."""
        probe_B1E = (ops.weight(self.probe) + 0 * x_BSE[:, 0])[:, None]
        q_B1HD = ops.bias(ops.einsum("bse,ehd->bshd", probe_B1E, self.attn.wq), self.attn.q_bias)
        k_BSHD = ops.bias(ops.einsum("bse,ehd->bshd", x_BSE, self.attn.wk), self.attn.k_bias)
        v_BSHD = ops.bias(ops.einsum("bse,ehd->bshd", x_BSE, self.attn.wv), self.attn.v_bias)
        seen_B1HD = ops.attention(q_B1HD, k_BSHD, v_BSHD, causal=False)
        out_B1E = ops.bias(ops.einsum("bshd,hde->bse", seen_B1HD, self.attn.wo), self.attn.o_bias)
        return (out_B1E + self.mlp(ops, self.norm(ops, out_B1E)))[:, 0]


class ImageEncoder(Module):
    """Images (B, size, size, channels) as vectors (B, F)."""

    def __init__(self, c: ImageTower) -> None:
        self.patches = PatchEmbedding(rows=c.size, columns=c.size, channels=c.channels, patch=c.patch, embed=c.embed)
        self.place = Param(patches=c.patches, embed=c.embed, fan_in_axes=0, init=c.embed**-0.5)
        self.encoder = Encoder(c)
        self.pool = AttentionPool(c)

    def __call__(self, ops: Ops, image: Array) -> Array:
        return self.pool(ops, self.encoder(ops, self.patches(ops, image) + ops.weight(self.place)))


class TextEncoder(Module):
    """Texts (B, S) as vectors (B, F): the features of the last position, which may be one of padding."""

    def __init__(self, c: TextTower, projected: int) -> None:
        self.embed = Embedding(vocab=c.vocab, embed=c.embed)
        self.place = Param(positions=c.positions, embed=c.embed, fan_in_axes=0)
        self.encoder = Encoder(c)
        self.head = Linear({"embed": c.embed}, {"projected": projected})
        self.positions = c.positions

    def __call__(self, ops: Ops, tokens_BS: Array) -> Array:
        if tokens_BS.shape[1] > self.positions:
            raise UserError(
                f"a text of {tokens_BS.shape[1]} tokens",
                expected=f"at most model.text.positions={self.positions}",
                got="a longer one",
                do="Cut the texts, or set model.text.positions, which then is a table to train.",
            )
        x_BSE = self.embed(ops, tokens_BS) + ops.embed(self.place, ops.arange(tokens_BS.shape[1]))
        return self.head(ops, self.encoder(ops, x_BSE)[:, -1])


class SigLIP(Module):
    """Two towers. A batch has image, (B, size, size, channels) float, and tokens, (B, S) integers, padded to their
    length."""

    def __init__(self, c: SigLIPConfig) -> None:
        self.image_tower = ImageEncoder(c.image)
        self.text_tower = TextEncoder(c.text, c.image.embed)
        self.scale = Param(scalar=1, fan_in_axes=0, init=Constant(value=SCALE))
        self.bias = Param(scalar=1, fan_in_axes=0, init=Constant(value=BIAS))
        self.group = c.group

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the summed loss, in nats: for each image the sum of -log(sigmoid(logit)) of its text and of
        -log(sigmoid(-logit)) of every other text. Record the metric `accuracy`, the share of images whose logit with
        their own text is the largest."""

        def pairs(image_GNF: Array, text_GNF: Array, there_GN: Array) -> tuple[Array, Array, dict[str, Array]]:
            logits_GNM = self.logits(ops, image_GNF, text_GNF)
            own_NM = ops.one_hot(ops.arange(image_GNF.shape[1]), image_GNF.shape[1])
            # Blank rows, which fill up the last batch of an evaluation, are no pairs.
            weight_GN = ops.cast(there_GN, "float32")
            loss_GNM = ops.softplus(logits_GNM * (1 - 2 * own_NM)) * weight_GN[:, None, :]
            best_GN = ops.argmax(ops.where(there_GN[:, None, :], logits_GNM, -1e9), axis=2)
            right_GN = ops.cast(best_GN == ops.arange(image_GNF.shape[1])[None, :], "float32")
            return loss_GNM.sum(2) * weight_GN, weight_GN, {"accuracy": right_GN}

        image_BF = unit(ops, self.image_tower(ops, batch["image"]))
        text_BF = unit(ops, self.text_tower(ops, batch["tokens"]))
        return ops.across_samples(pairs, image_BF, text_BF, group=self.group)

    def logits(self, ops: Ops, image_GNF: Array, text_GMF: Array) -> Array:
        """Return exp(scale) * image . text + bias for every pair, (G, N, M) float32."""
        scale, bias = (ops.cast(ops.weight(p), "float32") for p in (self.scale, self.bias))
        return ops.einsum("gnf,gmf->gnm", image_GNF, text_GMF, dtype="float32") * ops.exp(scale) + bias

    def predict(self, ops: Ops, batch: Batch) -> Array:
        """Return vectors of length 1: of images and texts, (B, 2, F), or of those of the two that the batch has,
        (B, F); float32. The logit of a pair is exp(scale) * image . text + bias."""
        towers = {"image": self.image_tower, "tokens": self.text_tower}
        found = [unit(ops, towers[key](ops, batch[key])) for key in towers if key in batch]
        return found[0] if len(found) == 1 else ops.join(found, axis=1)


def unit(ops: Ops, x_BF: Array) -> Array:
    """Return x / |x|, float32."""
    x_BF = ops.cast(x_BF, "float32")
    return x_BF / ops.norm(x_BF, keepdims=True)


def from_hub(found: Fields) -> SigLIPConfig:
    """Return the sizes of a SigLIP. Defaults are those of SiglipConfig in transformers."""
    found.get("initializer_factor")  # how weights began
    image, text = (_part(found, name) for name in ("vision_config", "text_config"))
    rows, columns = read_pair(image, "image_size", 224)
    patch, other = read_pair(image, "patch_size", 16)
    if rows != columns or patch != other:
        image.problem("image_size", "square images of square patches")
    if rows % patch:
        image.problem("image_size", f"a size that patch_size {patch} divides")
        rows = patch
    if not image.flag("vision_use_head", True):
        image.problem("vision_use_head", "true")
    shared: dict[str, Any] = {"eps": 1e-6, "activation": "gelu_pytorch_tanh"}
    defaults: dict[str, Any] = {"embed": 768, "layers": 12, "heads": 12, "mlp": 3072}
    seen = ImageTower(
        **read_sizes(image, **shared, **defaults), size=rows, channels=image.size("num_channels", 3), patch=patch
    )
    read = TextTower(
        **read_sizes(text, **shared, **defaults),
        vocab=text.size("vocab_size", 32000),
        positions=text.size("max_position_embeddings", 64),
    )
    if text.size("projection_size", read.embed) != seen.embed:
        text.problem("projection_size", f"{seen.embed}, the hidden_size of vision_config")
    for name, part in (("vision_config", image), ("text_config", text)):
        found.problems += [f"{name}.{problem}" for problem in part.problems]
        found.problems += [f"{name}.{each} (not a field that is known to change nothing)" for each in part.unread()]
    return SigLIPConfig(image=seen, text=read)


def _part(found: Fields, name: str) -> Fields:
    given = found.get(name, {})
    if not isinstance(given, dict):
        found.problem(name, "an object")
        given = {}
    return Fields(given, f"{found.what}, {name}")
