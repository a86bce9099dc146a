"""conv-net: a small convolutional network on scikit-learn's handwritten digits.

Train it:  launch --cluster local examples/conv_net.py

Shapes are in names: B batch, H rows, W columns, C channels, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain import Module, Ops, Param, Recipe
from portatrain.data import Digits
from portatrain.model.layers import LayerNorm
from portatrain.model.ops import Array, Batch, Loss
from portatrain.optim import AdamW, Cosine


class ConvBlock(Module):
    """x + conv(gelu(norm(conv(x)))), with as many channels out as in; windows of 3 x 3."""

    def __init__(self, channels: int) -> None:
        self.first = Param(height=3, width=3, embed=channels, channels=channels, fan_in_axes=3)
        self.norm = LayerNorm(channels=channels)
        self.second = Param(height=3, width=3, channels=channels, embed=channels, fan_in_axes=3)

    def __call__(self, ops: Ops, x_BHWC: Array) -> Array:
        y_BHWC = ops.gelu(self.norm(ops, ops.conv(x_BHWC, self.first)))
        return x_BHWC + ops.conv(y_BHWC, self.second)


class ConvNet(Module):
    def __init__(self, c: ConvNetConfig) -> None:
        self.into = Param(height=3, width=3, image=1, embed=c.channels, fan_in_axes=3)
        self.bias = Param(embed=c.channels, fan_in_axes=0, init="zeros")
        self.blocks = [ConvBlock(c.channels) for _ in range(c.blocks)]
        self.head = Param(classes=c.classes, embed=c.channels, fan_in_axes=0, init=c.channels**-0.5)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        x_BHWC = ops.bias(ops.conv(batch["image"], self.into), self.bias)
        for block in self.blocks:
            x_BHWC = block(ops, x_BHWC)
        x_BHWC = ops.pool(ops.relu(x_BHWC), 2, kind="max")
        x_BE = ops.mean(x_BHWC, ("batch", "rows", "columns", None), over=("rows", "columns"))
        logits_BC = ops.einsum("be,ce->bc", x_BE, self.head, dtype="float32")
        ops.aux("accuracy", ops.cast(ops.argmax(logits_BC) == batch["label"], "float32"))
        return ops.cross_entropy(x_BE, self.head, batch["label"])


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    channels: int = 16
    blocks: int = 2
    classes: int = 10

    def build(self) -> ConvNet:
        return ConvNet(self)


def recipe() -> Recipe:
    return Recipe(
        name="conv-net",
        model=ConvNetConfig(),
        data=Digits(),
        optimizer=AdamW(lr=3e-3, b2=0.98, weight_decay=0.1),
        schedule=Cosine(warmup=20, min_ratio=0.01),
        steps=300,
        batch=64,
        eval_every=100,
        compute=dict.fromkeys(("height", "width", "image", "channels"), ()),  # whole on every device
    )
