"""A decoder of 48 parameters, with LoRA or without, which the float64 oracle can train by finite differences. Tests
copy this file; it reads the tokens beside it (`tiny_fork.write`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from portatrain import Recipe
from portatrain.data import TokenMemmap
from portatrain.model.lora import LoRA
from portatrain.optim import AdamW, Constant
from recipes.models.decoder import DecoderConfig

HERE = Path(__file__).parent
SIZES = DecoderConfig(vocab=7, embed=2, layers=1, heads=1, head_dim=2, mlp=2)


def plain() -> Recipe:
    return Recipe(
        name="tiny-decoder",
        model=SIZES,
        data=TokenMemmap(paths=str(HERE / "a.bin"), seq_len=6, vocab=7, validation=0.0),
        optimizer=AdamW(lr=0.02, b2=0.95, weight_decay=0.1),
        schedule=Constant(warmup=2),
        steps=7,
        batch=4,
        checkpoint_every=2,
        checkpoint_keep=99,
        eval_batches=1,
    )


def adapted() -> Recipe:
    return replace(plain(), name="tiny-adapted", lora=LoRA(rank=1, alpha=2.0))


def recipe() -> Recipe:
    return plain()
