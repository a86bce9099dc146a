"""my-recipe: a model of one's own: it classifies images from all their pixels at once.

Train it:  launch --cluster local my_recipe.py
See it:    portatrain show my_recipe.py

Shapes are in names: B batch, P pixels, M mlp, E embed, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain import Module, Ops, Param
from portatrain.data import Digits
from portatrain.model.ops import Array, Batch, Loss
from portatrain.optim import AdamW, Cosine
from portatrain.recipe import Recipe

# Data: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which need no download (pip install scikit-learn).
DATA = Digits()


class Model(Module):
    def __init__(self, config: Config) -> None:
        # A Param is one line: keywords are logical axes with their sizes, in the order in which they lie in memory.
        # The mesh splits axes by name: `embed` over fsdp, `mlp` over tensor. `portatrain show` says what that gives.
        self.pixels = config.pixels
        self.into = Param(pixels=config.pixels, mlp=config.mlp)
        self.bias = Param(mlp=config.mlp, fan_in_axes=0, init="zeros")
        self.out = Param(mlp=config.mlp, embed=config.embed)
        self.head = Param(classes=config.classes, embed=config.embed, fan_in_axes=0, init=config.embed**-0.5)

    def features(self, ops: Ops, batch: Batch) -> Array:
        # `ops` has the operations, the same on every framework; + - * / and slices work on arrays as they are.
        image_BP = batch["image"].reshape(-1, self.pixels)
        hidden_BM = ops.gelu(ops.bias(ops.einsum("bp,pm->bm", image_BP, self.into), self.bias))
        return ops.einsum("bm,me->be", hidden_BM, self.out)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the loss: here a cross-entropy, with the share of right answers beside it in the metrics."""
        x_BE = self.features(ops, batch)
        logits_BC = ops.einsum("be,ce->bc", x_BE, self.head, dtype="float32")
        right_B = ops.top_k(logits_BC, 1)[1][:, 0] == batch["label"]
        ops.aux("accuracy", ops.cast(right_B, "float32"))
        return ops.cross_entropy(x_BE, self.head, batch["label"])


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes of the model: what --set model.mlp=256 changes, and what a run's record holds."""

    pixels: int = 64
    mlp: int = 128
    embed: int = 32
    classes: int = 10

    def build(self) -> Model:
        return Model(self)


def recipe() -> Recipe:
    """Return everything that decides the run. Every field can be changed from outside: --set model.mlp=256."""
    return Recipe(
        name="my-recipe",
        model=Config(),
        data=DATA,
        # Other rules: Muon, Lion, Adafactor, SGD. The schedule multiplies lr: up over `warmup` steps, then down.
        optimizer=AdamW(lr=3e-3, b2=0.98, weight_decay=0.1),
        schedule=Cosine(warmup=20, min_ratio=0.01),
        steps=300,
        batch=64,  # images a step, over all devices; accumulation=2 takes them in two halves
        eval_every=50,
        compute={"pixels": ()},  # an axis of this model's own: whole on every device
        precision="fp32",  # "bf16" on accelerators
    )
