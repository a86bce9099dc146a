"""A diffusion transformer (Peebles and Xie 2023, arXiv:2212.09748) that learns a flow from noise to images (Lipman et
al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003).

At time t between 0 and 1 an image is x_t = (1 - t) noise + t image, and the model predicts the velocity image - noise.
Noise and times are pure functions of seed, step, site and sample (`ops.noise`): the loss of a step is the same on any
mesh, for any microbatch and after any move, and every evaluation draws what step 0 draws.

Shape letters: B batch, R rows, C columns, K channels, P patches, E embed, F frequencies, V what the time and the class
make of E, N the six modulations of a layer (two in front of the output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from portatrain.errors import UserError
from portatrain.model.layers import MLP, PatchEmbedding
from portatrain.model.module import Module, Param, Stack
from portatrain.model.ops import Array, Batch, Loss, Ops
from recipes.models.encoder import EncoderSizes, attention

if TYPE_CHECKING:
    import numpy as np

AXES = ("rows", "columns", "channels")


@dataclass(frozen=True, kw_only=True)
class DiTConfig(EncoderSizes):
    """The sizes of a `DiT` for images of (rows, columns, channels) with values about 0 to 1."""

    rows: int
    columns: int
    channels: int
    patch: int
    """Rows and columns of a patch."""
    classes: int
    frequencies: int = 8
    """The features of time are sine and cosine of pi t, 2 pi t, 4 pi t and so on: of so many frequencies."""
    unlabelled: float = 0.1
    """The fraction of training samples whose class is hidden, so that the model also learns all classes together, which
    guidance needs (Ho and Salimans 2022, arXiv:2207.12598)."""
    activation: str = "gelu_tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.unlabelled < 1:
            raise UserError(
                "model.unlabelled", expected="a fraction in [0, 1)", got=repr(self.unlabelled), do="Use 0.1."
            )
        if self.frequencies < 1:
            raise UserError("model.frequencies", expected="at least 1", got=str(self.frequencies), do="Use 8.")

    def build(self) -> DiT:
        """Return the model."""
        return DiT(self)

    def small(self) -> DiTConfig:
        """Return the same kind of model with small sizes, for images of the same size (`portatrain check`)."""
        return replace(self, **self.small_sizes(), frequencies=4)

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.rows // self.patch) * (self.columns // self.patch)

    def flops_per_sample(self) -> float:
        """Return the floating-point operations of forward and backward for one image, without recomputation."""
        ends = 6.0 * 2 * self.patch**2 * self.channels * self.embed * self.patches
        condition = 6.0 * self.embed**2 * (6 * self.layers + 2) + 6.0 * self.embed * (2 * self.frequencies + self.embed)
        return ends + condition + self.flops_of(self.patches)


class Modulation(Module):
    """N vectors (B, V) from what conditions the model, (B, E): all 0 at first, so that a layer adds nothing."""

    def __init__(self, c: DiTConfig, n: int) -> None:
        self.weight = Param(embed=c.embed, modulations=n, projected=c.embed, init="zeros")
        self.bias = Param(modulations=n, projected=c.embed, fan_in_axes=0, init="zeros")
        self.n = n

    def __call__(self, ops: Ops, condition_BE: Array) -> list[Array]:
        """Return N arrays (B, 1, V)."""
        made_BNV = ops.bias(ops.einsum("be,env->bnv", ops.silu(condition_BE), self.weight), self.bias)
        return [made_BNV[:, i : i + 1] for i in range(self.n)]


class Block(Module):
    """x + gate * attention(norm(x)), then x + gate * mlp(norm(x)); the condition makes scale and shift of the norms,
    which have none of their own, and the gates (adaLN-Zero)."""

    def __init__(self, c: DiTConfig) -> None:
        self.modulation = Modulation(c, 6)
        self.attn = attention(c, bias="qvo")
        self.mlp = MLP(embed=c.embed, mlp=c.mlp_size, activation=c.activation)
        self.eps = c.norm_eps

    def __call__(self, ops: Ops, x_BPE: Array, condition_BE: Array) -> tuple[Array, None]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(ops, condition_BE)
        x_BPE = x_BPE + gate * self.attn(ops, ops.layer_norm(x_BPE, eps=self.eps) * (1 + scale) + shift)
        return x_BPE + mlp_gate * self.mlp(ops, ops.layer_norm(x_BPE, eps=self.eps) * (1 + mlp_scale) + mlp_shift), None


class Condition(Module):
    """A time and a class as one vector, (B, E)."""

    def __init__(self, c: DiTConfig) -> None:
        self.into = Param(frequencies=2 * c.frequencies, projected=c.embed)
        self.into_bias = Param(projected=c.embed, fan_in_axes=0, init="zeros")
        self.out = Param(projected=c.embed, embed=c.embed)
        self.out_bias = Param(embed=c.embed, fan_in_axes=0, init="zeros")
        self.label = Param(classes=c.classes + 1, embed=c.embed, fan_in_axes=0)
        self.frequencies = c.frequencies

    def __call__(self, ops: Ops, time_B: Array, label_B: Array) -> Array:
        # Powers of 2 and whole turns change no digit of a time, so the angles are rounded once, however fast they turn.
        turns_BF = ops.join([time_B * 2.0**n for n in range(self.frequencies)], axis=1)
        angle_BF = (turns_BF - 2 * ops.floor(turns_BF / 2)) * math.pi
        wave_BF = ops.cast(ops.concat([ops.sin(angle_BF), ops.cos(angle_BF)], axis=1), "compute")
        hidden_BV = ops.silu(ops.bias(ops.einsum("bf,fv->bv", wave_BF, self.into), self.into_bias))
        time_BE = ops.bias(ops.einsum("bv,ve->be", hidden_BV, self.out), self.out_bias)
        return time_BE + ops.embed(self.label, label_B)


class DiT(Module):
    """A model of images given their class. A batch has image, (B, R, C, K) float, and label, (B,) integers."""

    def __init__(self, c: DiTConfig) -> None:
        self.patches = PatchEmbedding(rows=c.rows, columns=c.columns, channels=c.channels, patch=c.patch, embed=c.embed)
        self.place = Param(patches=c.patches, embed=c.embed, fan_in_axes=0)
        self.condition = Condition(c)
        self.blocks = Stack(Block(c), c.layers)
        self.final = Modulation(c, 2)
        sizes = {"patch_rows": c.patch, "patch_columns": c.patch, "channels": c.channels}
        self.out = Param(embed=c.embed, **sizes, init="zeros")
        self.out_bias = Param(**sizes, fan_in_axes=0, init="zeros")
        self.config = c

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the squared error of the velocity, its mean over an image, summed over images."""
        c = self.config
        noise_BRCK = ops.noise(c.rows, c.columns, c.channels, site=self.site)
        time_B = ops.noise(1, site=self.site, kind="uniform", draw=1)[:, 0]
        hidden_B = ops.noise(1, site=self.site, kind="uniform", draw=2)[:, 0] < (c.unlabelled if ops.training else 0.0)
        label_B = ops.where(hidden_B, c.classes, batch["label"])
        image_BRCK = ops.cast(batch["image"], "float32") * 2 - 1
        time_B111 = time_B[:, None, None, None]
        seen_BRCK = (1 - time_B111) * noise_BRCK + time_B111 * image_BRCK
        off_BRCK = self.velocity(ops, seen_BRCK, time_B, label_B) - (image_BRCK - noise_BRCK)
        loss_B = ops.mean(off_BRCK * off_BRCK, ("batch", *AXES), over=AXES)
        return ops.loss(loss_B, ops.cast(time_B >= 0, "float32"))  # 1 for every image

    def predict(self, ops: Ops, batch: Batch) -> Array:
        """Return the velocity, (B, R, C, K) float32, at image, (B, R, C, K) between noise and -1 to 1, time, (B,)
        float, and label, (B,) integers; the label `classes` stands for all classes together."""
        return self.velocity(ops, batch["image"], batch["time"], batch["label"])

    def velocity(self, ops: Ops, image: Array, time_B: Array, label_B: Array) -> Array:
        """Return the velocity, (B, R, C, K) float32."""
        c = self.config
        condition_BE = self.condition(ops, time_B, label_B)
        x_BPE = self.patches(ops, ops.cast(image, "compute")) + ops.weight(self.place)
        x_BPE, _ = self.blocks(ops, ops.shard(x_BPE, "batch", "res_seq", None), condition_BE)
        shift, scale = self.final(ops, condition_BE)
        x_BPE = ops.layer_norm(ops.shard(x_BPE, "batch", "seq", None), eps=c.norm_eps) * (1 + scale) + shift
        cut = ops.bias(ops.einsum("bpe,exyk->bpxyk", x_BPE, self.out, dtype="float32"), self.out_bias)
        rows, columns = c.rows // c.patch, c.columns // c.patch
        cut = ops.transpose(cut.reshape(-1, rows, columns, c.patch, c.patch, c.channels), (0, 1, 3, 2, 4, 5))
        return cut.reshape(-1, c.rows, c.columns, c.channels)


def sampled(
    predict: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    config: DiTConfig,
    labels: np.ndarray,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Return images, (B, R, C, K) float32 with values in 0 to 1, from noise along the predicted velocity by Euler's
    method.

    Args:
        predict: the prediction of a trained `DiT`, such as `portatrain.load(run).predict`.
        config: its sizes.
        labels: (B,) integers, the class of each image; `config.classes` for none.
        steps: the number of steps of equal length.
        guidance: w of the velocity v(none) + w (v(class) - v(none)); 1 is that of the class alone.
        seed: seed of the noise. An image depends on it and on the image's number in `labels`.

    Raises:
        UserError: steps below 1, or a label that is no class.
    """
    import numpy as np

    labels = np.asarray(labels, np.int32)
    if steps < 1:
        raise UserError("sampled, steps", expected="at least 1", got=str(steps), do="Use about 50.")
    if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() > config.classes:
        raise UserError(
            "sampled, labels",
            expected=f"one or more classes from 0 to {config.classes - 1}, or {config.classes} for none",
            got=str(labels.tolist()),
            do="Give the class of each image.",
        )
    shape = (config.rows, config.columns, config.channels)
    image = np.stack([np.random.default_rng([seed, n]).normal(size=shape) for n in range(len(labels))])
    none = np.full_like(labels, config.classes)
    for step in range(steps):
        given = {"image": image.astype(np.float32), "time": np.full(len(labels), step / steps, np.float32)}
        velocity = predict({**given, "label": labels}).astype(np.float64)
        if guidance != 1:
            free = predict({**given, "label": none}).astype(np.float64)
            velocity = free + guidance * (velocity - free)
        image = image + velocity / steps
    return np.clip((image + 1) / 2, 0, 1).astype(np.float32)
