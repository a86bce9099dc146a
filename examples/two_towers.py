"""two-towers: a contrastive model. It learns which upper half of a handwritten digit belongs to which lower half, with
the other images of the batch as negatives (Radford et al. 2021, arXiv:2103.00020).

Train it:  launch --cluster local examples/two_towers.py

`ops.across_samples` compares all samples of the step's batch, whatever the mesh and the number of microbatches.

Shapes are in names: B batch, P pixels of half an image, E embed; G groups of N samples, M the samples beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain import Module, Ops, Param, Recipe
from portatrain.data import Digits
from portatrain.model.layers import MLP
from portatrain.model.ops import Array, Batch, Loss
from portatrain.optim import AdamW, Cosine


class Tower(Module):
    """Half an image as a vector of length 1."""

    def __init__(self, c: TowersConfig) -> None:
        self.into = Param(pixels=c.pixels, embed=c.embed)
        self.mlp = MLP(embed=c.embed, mlp=4 * c.embed)

    def __call__(self, ops: Ops, half_BP: Array) -> Array:
        x_BE = ops.einsum("bp,pe->be", half_BP, self.into)
        x_BE = x_BE + self.mlp(ops, x_BE[:, None])[:, 0]
        return ops.rms_norm(x_BE) * x_BE.shape[-1] ** -0.5


class TwoTowers(Module):
    def __init__(self, c: TowersConfig) -> None:
        self.pixels, self.group = c.pixels, c.group
        self.upper, self.lower = Tower(c), Tower(c)
        self.scale = Param(embed=c.embed, fan_in_axes=0, init=0.5)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        image_BP = batch["image"].reshape(-1, 2 * self.pixels)
        upper_BE = self.upper(ops, image_BP[:, : self.pixels])
        lower_BE = self.lower(ops, image_BP[:, self.pixels :])

        def contrast(upper_GNE: Array, lower_GNE: Array, there_GN: Array) -> tuple[Array, Array, dict[str, Array]]:
            upper_GNE = upper_GNE * (ops.weight(self.scale) + 8.0)
            scores_GNM = ops.einsum("gne,gme->gnm", upper_GNE, lower_GNE, dtype="float32")
            own_GN = ops.einsum("gne,gne->gn", upper_GNE, lower_GNE, dtype="float32")
            # Blank rows, which fill up the last batch of an evaluation, are no negatives.
            lower_GNM = ops.where(there_GN[:, None, :], scores_GNM, -1e9)
            upper_GNM = ops.where(there_GN[:, :, None], scores_GNM, -1e9)
            loss_GN = (ops.logsumexp(lower_GNM, axis=2) + ops.logsumexp(upper_GNM, axis=1)) * 0.5 - own_GN
            right_GN = ops.argmax(lower_GNM, axis=2) == ops.arange(upper_GNE.shape[1])[None, :]
            weight_GN = ops.cast(there_GN, "float32")
            return loss_GN * weight_GN, weight_GN, {"accuracy": ops.cast(right_GN, "float32")}

        return ops.across_samples(contrast, upper_BE, lower_BE, group=self.group)


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """group: the number of samples that are compared with each other; None: all of the batch."""

    pixels: int = 32
    embed: int = 32
    group: int | None = None

    def build(self) -> TwoTowers:
        return TwoTowers(self)


def recipe() -> Recipe:
    return Recipe(
        name="two-towers",
        model=TowersConfig(),
        data=Digits(),
        optimizer=AdamW(lr=2e-3, b2=0.98, weight_decay=0.1),
        schedule=Cosine(warmup=20, min_ratio=0.01),
        steps=300,
        batch=64,
        accumulation=2,
        eval_every=100,
        compute={"pixels": ()},  # whole on every device
    )
