"""recurrent: a gated recurrent unit (Cho et al. 2014, arXiv:1406.1078) that reads a handwritten digit row by row.

Train it:  launch --cluster local examples/recurrent.py

Shapes are in names: B batch, S rows of the image (the sequence), P pixels of a row, E embed, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain import Module, Ops, Param, Recipe
from portatrain.data import Digits
from portatrain.model.ops import Array, Batch, Loss
from portatrain.optim import AdamW, Cosine


class GRU(Module):
    """A gated recurrent unit: (B, S, P) to its last state (B, E)."""

    def __init__(self, *, pixels: int, embed: int) -> None:
        self.embed = embed
        self.into = Param(pixels=pixels, gates=3, embed=embed)
        self.gates = Param(embed=embed, gates=2, embed_out=embed)
        self.candidate = Param(embed=embed, embed_out=embed)
        self.bias = Param(gates=3, embed=embed, fan_in_axes=0, init="zeros")

    def __call__(self, ops: Ops, x_BSP: Array) -> Array:
        x_BSGE = ops.bias(ops.einsum("bsp,pge->bsge", x_BSP, self.into), self.bias)
        # Parameters are read once, before the scan, so that a mesh gathers them once.
        gates, candidate = ops.weight(self.gates), ops.weight(self.candidate)

        def cell(h_BE: Array, x_BGE: Array) -> tuple[Array, Array]:
            gates_BGE = ops.sigmoid(x_BGE[:, :2] + ops.einsum("be,egf->bgf", h_BE, gates))
            update_BE, reset_BE = gates_BGE[:, 0], gates_BGE[:, 1]
            new_BE = ops.tanh(x_BGE[:, 2] + ops.einsum("be,ef->bf", h_BE * reset_BE, candidate))
            h_BE = update_BE * h_BE + (1.0 - update_BE) * new_BE
            return h_BE, h_BE

        return ops.scan(cell, x_BSGE[:, 0, 0] * 0.0, x_BSGE)[0]


class Recurrent(Module):
    def __init__(self, c: RecurrentConfig) -> None:
        self.rows, self.pixels = c.rows, c.pixels
        self.gru = GRU(pixels=c.pixels, embed=c.embed)
        self.head = Param(classes=c.classes, embed=c.embed, fan_in_axes=0, init=c.embed**-0.5)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        x_BE = self.gru(ops, batch["image"].reshape(-1, self.rows, self.pixels))
        logits_BC = ops.einsum("be,ce->bc", x_BE, self.head, dtype="float32")
        ops.aux("accuracy", ops.cast(ops.argmax(logits_BC) == batch["label"], "float32"))
        return ops.cross_entropy(x_BE, self.head, batch["label"])


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    rows: int = 8
    pixels: int = 8
    embed: int = 64
    classes: int = 10

    def build(self) -> Recurrent:
        return Recurrent(self)


def recipe() -> Recipe:
    return Recipe(
        name="recurrent",
        model=RecurrentConfig(),
        data=Digits(),
        optimizer=AdamW(lr=3e-3, b2=0.98, weight_decay=0.1),
        schedule=Cosine(warmup=20, min_ratio=0.01),
        steps=300,
        batch=64,
        eval_every=100,
        compute={"pixels": (), "gates": (), "embed_out": ()},  # whole on every device
    )
