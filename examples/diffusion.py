"""diffusion: a small diffusion model of handwritten digits, which predicts the noise that was added (Ho, Jain and
Abbeel 2020, arXiv:2006.11239).

Train it:  launch --cluster local examples/diffusion.py

Noise and times are pure functions of seed, step, site and sample (`ops.noise`), so that a run that moves adds the same
noise, and every evaluation adds the noise of step 0.

Shapes are in names: B batch, P pixels, E embed, M mlp, F frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from portatrain import Module, Ops, Param, Recipe
from portatrain.data import Digits
from portatrain.model.layers import MLP, LayerNorm
from portatrain.model.ops import Array, Batch, Loss
from portatrain.optim import AdamW, Cosine


class Diffusion(Module):
    def __init__(self, c: DiffusionConfig) -> None:
        self.pixels, self.frequencies = c.pixels, c.frequencies
        self.into = Param(pixels=c.pixels, embed=c.embed)
        self.when = Param(frequencies=2 * c.frequencies, embed=c.embed)
        self.what = Param(classes=c.classes, embed=c.embed, fan_in_axes=0)
        self.norms = [LayerNorm(embed=c.embed) for _ in range(c.layers)]
        self.mlps = [MLP(embed=c.embed, mlp=4 * c.embed) for _ in range(c.layers)]
        self.out_norm = LayerNorm(embed=c.embed)
        self.out = Param(embed=c.embed, pixels=c.pixels)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        image_BP = batch["image"].reshape(-1, self.pixels) * 2.0 - 1.0
        noise_BP = ops.noise(self.pixels, site=self.site)
        time_B = ops.noise(1, site=self.site, kind="uniform", draw=1)[:, 0]
        angle_B = time_B * (math.pi / 2)
        noisy_BP = image_BP * ops.cos(angle_B)[:, None] + noise_BP * ops.sin(angle_B)[:, None]
        off_BP = self.predicted(ops, noisy_BP, time_B, batch["label"]) - noise_BP
        return ops.loss((off_BP * off_BP).mean(-1) * batch["mask"], batch["mask"])

    def predicted(self, ops: Ops, noisy_BP: Array, time_B: Array, label_B: Array) -> Array:
        """Return the noise in images at these times, (B, P) float32."""
        octaves_F = ops.exp(ops.cast(ops.arange(self.frequencies), "float32") * math.log(2.0))
        angles_BF = time_B[:, None] * octaves_F * math.pi
        waves_BF = ops.concat([ops.sin(angles_BF), ops.cos(angles_BF)], axis=1)
        x_BE = ops.einsum("bp,pe->be", noisy_BP, self.into) + ops.einsum("bf,fe->be", waves_BF, self.when)
        x_BE = x_BE + ops.embed(self.what, label_B)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x_BE = x_BE + mlp(ops, norm(ops, x_BE)[:, None])[:, 0]
        return ops.einsum("be,ep->bp", self.out_norm(ops, x_BE), self.out, dtype="float32")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    pixels: int = 64
    classes: int = 10
    embed: int = 64
    layers: int = 3
    frequencies: int = 4

    def build(self) -> Diffusion:
        return Diffusion(self)


def recipe() -> Recipe:
    return Recipe(
        name="diffusion",
        model=DiffusionConfig(),
        data=Digits(),
        optimizer=AdamW(lr=2e-3, b2=0.98),
        schedule=Cosine(warmup=20, min_ratio=0.01),
        steps=400,
        batch=64,
        eval_every=100,
        compute={"pixels": (), "frequencies": ()},  # whole on every device
    )
