"""What the tests of meshes run: models, batches and programs by name, the same in the parent and in every process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends.program import Program
from portatrain.model.fp8 import quantise
from portatrain.model.layout import Layout, Mesh
from portatrain.model.lora import Adapted, LoRA, adapt, is_factor
from portatrain.model.module import Module, Normal, describe
from portatrain.model.precision import stored
from portatrain.model.widths import MuP, with_widths
from portatrain.optim import SGD, Adafactor, AdamW, Lion, Muon, Rule
from portatrain.recipe.building import lr_factor
from recipes.models.decoder import DecoderConfig
from recipes.models.deepseek_v3 import DeepseekV3Config
from recipes.models.olmo_hybrid import OlmoHybridConfig
from recipes.models.vit import ViTConfig
from tests.support.running import image_batch, tokens_batch
from tests.support.toy_models import Latent, Mixture, Nested, Routed, Ruled, TwoTowers

Batch = dict[str, np.ndarray]

ROWS, SEQ, VOCAB = 16, 16, 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how it is trained, and on which samples."""

    model: Any
    optimizer: Rule = dataclasses.field(default_factory=lambda: AdamW(lr=1e-3, b2=0.95, weight_decay=0.1))
    accumulation: int = 1
    grows: bool = False
    """The first step takes one microbatch, each after it one more, up to `accumulation`."""
    steps: int = 4
    images: bool = False
    predicts: bool = True
    left_out: int = 1
    """The number of rows that are not evaluated, so that the rest does not divide over a mesh."""
    blank_step: int | None = None
    """The step whose loss is not a number."""
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Laid over the layout's params mapping."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: Mapping[str, Any] | None = None
    """The fields of the model at the base width of muP. None: the standard parametrization."""
    scaling: str = "row"
    """What shares a scale in precision fp8."""

    def program(self, mesh: str) -> Program:
        model = self.model if isinstance(self.model, Module) else self.model.build()
        mup = None if self.base is None else MuP(base=self.base)
        widths = None if mup is None else mup.apply(model, mup.spec_at_base(self.model).build())
        precision = self.options.get("precision", "fp32")
        definition = quantise(model, scaling=self.scaling) if precision == "fp8" else stored(describe(model), precision)
        if widths is not None:
            definition = with_widths(definition, widths, functools.partial(lr_factor, self.optimizer))
        names = frozenset(definition.params)
        given: dict[str, Any] = {
            "trainable": names,
            "decay": frozenset(n for n in names if n.endswith(("w", "table"))),
            "seed": 5,
            **self.options,
        }
        for key in ("trainable", "ema"):  # rules by name, as a recipe has them
            if callable(given.get(key)):
                given[key] = frozenset(n for n in names if given[key](n))
        layout = Layout.of(definition, Mesh.parse(mesh), params=self.params)
        layout.check_batch(ROWS // self.accumulation, None if self.images else SEQ)
        return Program(definition=definition, layout=layout, optimizer=self.optimizer, **given)

    def batches(self) -> list[Batch]:
        """A global batch a step, cut into microbatches."""
        made = []
        for step in range(1, self.steps + 1):
            if self.images:
                batch = image_batch(classes=10, batch=ROWS, seed=step)
            else:
                batch = tokens_batch(vocab=VOCAB, batch=ROWS, seq=SEQ, seed=step)
                # As in text, few tokens are frequent and what follows can be learnt: of uniform noise the gradients
                # cancel to little more than rounding.
                batch["tokens"] = (batch["tokens"] ** 3 // VOCAB**2).astype(np.int32)
                batch["targets"] = (batch["tokens"] * 5 + 1) % VOCAB
            batch["sample"] = batch["sample"] + step * ROWS
            if step == self.blank_step:
                batch["mask"] = np.full_like(batch["mask"], np.nan)
            n = min(step, self.accumulation) if self.grows else self.accumulation
            made.append({k: v.reshape(self.accumulation, -1, *v.shape[1:])[:n] for k, v in batch.items()})
        return made


def _lm(**sizes: Any) -> DecoderConfig:
    return DecoderConfig(**{"vocab": VOCAB, "embed": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 64, **sizes})


_VIT = ViTConfig(rows=8, columns=8, channels=1, patch=2, classes=10, embed=32, layers=2, heads=4, mlp=64, dropout=0.1)


def _adapted() -> Module:
    """A decoder with low-rank factors, those that would begin at zero drawn, so that all gradients are something.

    None beside queries and keys: gradients that nearly cancel, of which jax and torch on one device differ by 3e-6.
    """
    model = adapt(_lm(dropout=0.1).build(), LoRA(rank=4, targets=("*/wv", "*/wo", "*/mlp/*")))
    for module in describe(model).modules.values():
        if isinstance(module, Adapted):
            module.lora_b.init = Normal(std=0.05)
    return model


def _routed() -> Routed:
    return Routed(vocab=VOCAB, embed=16, layers=2, experts=4, chosen=2, rate=0.01)


_AHEAD = DeepseekV3Config(
    **{"vocab": VOCAB, "embed": 16, "layers": 1, "dense_layers": 1, "heads": 4, "mlp": 24, "predict_depth": 2},
    **{"experts": 4, "chosen": 2, "expert_mlp": 16, "groups": 2, "tied": False},
    **{"q_rank": 12, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 6},
)
"""A dense layer, and two routed ones that predict further tokens."""


_HYBRID = OlmoHybridConfig(
    **{"vocab": VOCAB, "embed": 16, "layers": 3, "heads": 4, "kv_heads": 2, "mlp": 32, "tied": False, "chunk": 6},
    **{"key_heads": 2, "value_heads": 4, "key_size": 4, "value_size": 6, "recurrent": (True, True, False)},
)
"""Chunks that do not divide the positions."""


def _mixture(*, layers: int = 1, clamped: bool = False, halves: bool = False) -> Mixture:
    return Mixture(vocab=VOCAB, embed=16, layers=layers, experts=4, chosen=2, clamped=clamped, halves=halves)


def _adapted_mixture() -> Module:
    model = adapt(_mixture(clamped=True), LoRA(rank=4, targets=("*/experts/*",)))
    for module in describe(model).modules.values():
        if isinstance(module, Adapted):
            module.lora_b.init = Normal(std=0.05)
    return model


def _all(name: str) -> bool:
    return True


CASES: dict[str, Case] = {
    "lm": Case(model=_lm()),
    "lm, accumulation, dropout": Case(model=_lm(dropout=0.1), accumulation=2),
    "lm, untied, all options": Case(
        model=_lm(
            **{"tied": False, "kv_heads": 1, "softcap": 20.0, "logit_softcap": 30.0, "z_loss": 1e-3, "window": 7},
            **{"dropout": 0.1, "sinks": True, "value_head_dim": 12},
        ),
        accumulation=2,
        optimizer=AdamW(lr=1e-4),
    ),
    # Not over tensor: there the loss is computed from parts of the logits, and the scales of these norms (whose
    # gradients nearly cancel) then differ by 1.9e-6 from one process, which itself is 2.0e-6 off in float64.
    "lm, norms of queries and keys": Case(model=_lm(tied=False, kv_heads=1, qk_norm=True), optimizer=AdamW(lr=1e-4)),
    "vit, accumulation, dropout": Case(model=_VIT, accumulation=2, images=True),
    "lm, clipping, averages, frozen": Case(
        model=_lm(dropout=0.1),
        accumulation=2,
        optimizer=SGD(lr=0.1, momentum=0.9),
        options={
            "clip_norm": 0.1,
            "ema_decay": 0.9,
            "ema": lambda name: "mlp" in name,
            "trainable": lambda name: "attn/wo" not in name and name != "final_norm/scale",
        },
    ),
    "lm, growing batch, averages": Case(
        model=_lm(dropout=0.1), accumulation=4, grows=True, options={"ema_decay": 0.9, "ema": _all}
    ),
    "lm, tensor and fsdp on one axis": Case(
        model=_lm(dropout=0.1),
        accumulation=2,
        params={"embed": (), "mlp": ("tensor", "fsdp"), "vocab": ("tensor", "fsdp"), "heads": ("tensor", "fsdp")},
    ),
    "lm, remat": Case(model=_lm(dropout=0.1), accumulation=2, options={"remat": "block"}),
    "lm, remat by name": Case(
        model=_lm(dropout=0.1), accumulation=2, options={"remat": "keep:normed+qkv+projected+product"}
    ),
    "lm, remat of dots": Case(model=_lm(dropout=0.1, softcap=20.0), options={"remat": "dots"}),
    "lm, remat but attention": Case(model=_lm(dropout=0.1), options={"remat": "attention"}),
    "lm, a step that is not finite": Case(model=_lm(), accumulation=2, blank_step=2),
    "lm, a step that is not finite, odd sizes": Case(
        model=_lm(embed=31, head_dim=8, layers=1), accumulation=2, blank_step=2
    ),
    "lm, Muon": Case(model=_lm(), optimizer=Muon(lr=0.02)),
    "lm, Adafactor": Case(model=_lm(), optimizer=Adafactor(lr=1e-3)),
    "lm, Lion": Case(model=_lm(), optimizer=Lion(lr=3e-5)),
    "lm, LoRA": Case(
        model=_adapted(), accumulation=2, options={"trainable": is_factor, "ema_decay": 0.9, "ema": is_factor}
    ),
    "lm, muP": Case(
        model=_lm(mlp=48, dropout=0.1, attention_bias=True),
        accumulation=2,
        base={"embed": 16, "heads": 2, "kv_heads": 1, "head_dim": 4},  # mlp does not grow: an output and an input
    ),
    "routed": Case(model=_routed(), accumulation=2, predicts=False),
    "routed, Muon": Case(model=_routed(), optimizer=Muon(lr=0.02), predicts=False),
    "routed, bf16": Case(
        model=_routed(), accumulation=2, predicts=False, options={"precision": "bf16", "remat": "block"}
    ),
    "latent": Case(
        model=Latent(
            **{"vocab": VOCAB, "embed": 16, "layers": 2, "heads": 4, "nope_dim": 8, "rope_dim": 4, "value_dim": 12},
            **{"kv_rank": 8, "q_rank": 12, "mlp": 32},
        ),
        accumulation=2,
    ),
    "mixture": Case(model=_mixture(layers=2), accumulation=2, predicts=False),
    "mixture, one layer": Case(model=_mixture(), predicts=False),
    "mixture, clamped with biases": Case(model=_mixture(clamped=True), accumulation=2, steps=2, predicts=False),
    "mixture, bf16": Case(model=_mixture(), accumulation=2, predicts=False, options={"precision": "bf16"}),
    "mixture in halves, bf16": Case(
        model=_mixture(halves=True), accumulation=2, predicts=False, options={"precision": "bf16"}
    ),
    "mixture, LoRA": Case(
        model=_adapted_mixture(), accumulation=2, steps=2, predicts=False, options={"trainable": is_factor}
    ),
    "routed, further tokens": Case(model=_AHEAD, accumulation=2),
    "hybrid": Case(model=_HYBRID, accumulation=2),
    "nested": Case(model=Nested(vocab=VOCAB, embed=16, layers=2, inner=2, rate=0.1), accumulation=2, predicts=False),
    "towers": Case(model=TwoTowers(vocab=VOCAB, embed=16, rate=0.1), accumulation=2, optimizer=AdamW(lr=1e-4)),
    "towers, groups in a microbatch": Case(
        model=TwoTowers(vocab=VOCAB, embed=16, rate=0.1, group=8), accumulation=2, predicts=False, left_out=0
    ),
    "towers, groups in a device's rows": Case(
        model=TwoTowers(vocab=VOCAB, embed=16, rate=0.1, group=2), accumulation=2, predicts=False, left_out=2
    ),
    "attention by rule": Case(model=Ruled(vocab=VOCAB, embed=16, heads=4, kv_heads=2), accumulation=2, predicts=False),
    "lm, compiled": Case(model=_lm(dropout=0.1), accumulation=2, options={"compile": True}),
    "lm, bf16 state": Case(
        model=_lm(dropout=0.1), accumulation=2, options={"precision": "bf16-state", "ema_decay": 0.9, "ema": _all}
    ),
    "lm, fp8": Case(model=_lm(dropout=0.1), accumulation=2, options={"precision": "fp8"}),
    "lm, fp8, a scale for a tensor": Case(
        model=_lm(dropout=0.1), accumulation=2, options={"precision": "fp8"}, scaling="tensor"
    ),
    "lm, bf16": Case(model=_lm(dropout=0.1), accumulation=2, options={"precision": "bf16"}),
}
