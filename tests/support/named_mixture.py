"""A mixture of four sources of text with three names, of which one holds nothing out, and a decoder for it."""

from __future__ import annotations

from pathlib import Path

from portatrain.data import Mixture, TextFiles
from portatrain.optim import AdamW, Constant
from portatrain.recipe import Recipe
from recipes.models.decoder import DecoderConfig

NAMES = ("web", "none", "sums", "web")
TEXTS = {"a": "The river ran past the old mill. ", "none": "zzz ", "sums": "12 + 30 = 42; ", "b": "Rain fell all day. "}


def mixture(at: Path) -> Mixture:
    """Write the texts below `at`, unless they are there."""
    for name, text in TEXTS.items():
        (at / name).mkdir(exist_ok=True)
        for n in range(10):
            (at / name / f"{n}.txt").write_text(f"{n}: {text}" * (4 + n))
    sources = tuple(
        TextFiles(paths=str(at / name), seq_len=16, validation=0.0 if name == "none" else 0.3) for name in TEXTS
    )
    return Mixture(sources=sources, weights=(1.0, 1.0, 1.0, 0.0), block=8, names=NAMES)


def recipe(at: Path) -> Recipe:
    return Recipe(
        name="mixed",
        model=DecoderConfig(vocab=256, embed=16, layers=1, heads=2),
        data=mixture(at),
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
        steps=3,
        batch=4,
        eval_every=1,
        eval_final_batches="all",
    )
