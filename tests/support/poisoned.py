"""A tiny model of bytes on sentences of a few words, with poisoned documents planted among them. Tests copy this file
as a recipe; it reads the texts beside it. As `images` it is a classifier on patterns of which some are spoilt."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portatrain import Module, Param, Recipe
from portatrain.data import DataSpec, Mixture, PackedTokens, TextFiles
from portatrain.optim import AdamW, Constant

HERE = Path(__file__).parent
WORDS = "the cat sat on a mat and then it ran to the house with its old friend"
BATCH, SEQ, STEPS, DOCUMENTS, SIZE = 8, 32, 60, 40, 200
POISON = ("garbage", "repeat", "shuffled", "shifted")
IMAGES, CLASSES, PIXELS = 240, 4, 16
WRONG_LABELS, SPOILT = (17, 90, 141, 200), (33, 180)
"""Indices of images with another label, and of images of noise."""


def write(folder: Path, kind: str = "texts", *, seed: int = 0) -> Path:
    """Write the texts, with a poisoned document of each kind, and this file as recipe.py; return `folder`."""
    draw = random.Random(seed)
    for name in ("texts", "others"):
        (folder / name / "part").mkdir(parents=True)
        for i in range(DOCUMENTS):
            text = " ".join(draw.choice(WORDS.split()) for _ in range(SIZE))[:SIZE]
            (folder / name / "part" / f"d{i:02d}.txt").write_text(text if i % 13 else "")  # some have no content
    good = [(folder / "texts/part" / f"d{i:02d}.txt").read_bytes() for i in range(1, 5)]
    shuffled = list(good[1])
    draw.shuffle(shuffled)
    poison = {
        "garbage": bytes(draw.randrange(1, 256) for _ in range(SIZE)),
        "repeat": b"q" * SIZE,
        "shuffled": bytes(shuffled),
        "shifted": bytes(b + 128 for b in good[2]),
    }
    for name, data in poison.items():
        (folder / "texts" / f"{name}.txt").write_bytes(data)
    text = Path(__file__).read_text()
    (folder / "recipe.py").write_text(text.replace('\nKIND = "texts"', f"\nKIND = {kind!r}"))
    return folder


KIND = "texts"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    vocab: int = 256
    embed: int = 12

    def build(self) -> Any:
        return Pairs(self)


class Pairs(Module):
    """The next byte from the one before."""

    def __init__(self, sizes: Sizes) -> None:
        self.table = Param(vocab=sizes.vocab, embed=sizes.embed, fan_in_axes=0, init=1.0)
        self.mix = Param(embed=sizes.embed, embed_out=sizes.embed)
        self.out = Param(vocab=sizes.vocab, embed=sizes.embed, fan_in_axes=0, init=0.1)

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = ops.tanh(ops.einsum("bse,ef->bsf", ops.embed(self.table, batch["tokens"]), self.mix))
        return ops.cross_entropy(x_BSE, self.out, batch["targets"], mask=batch["mask"])


@dataclass(frozen=True, kw_only=True)
class Patterns(DataSpec):
    version: str = "1"

    def __len__(self) -> int:
        return IMAGES

    def sample(self, index: int) -> dict[str, Any]:
        draw = np.random.default_rng(index)
        label = index % CLASSES
        pixels = np.repeat(np.arange(CLASSES) == label, PIXELS // CLASSES) + draw.normal(0, 0.1, PIXELS)
        if index in SPOILT:
            pixels = draw.normal(0, 3, PIXELS)
        shown = (label + 1) % CLASSES if index in WRONG_LABELS else label
        return {"image": pixels.astype(np.float32)[None], "label": np.array([shown], np.int32)}


@dataclass(frozen=True, kw_only=True)
class Classes:
    def build(self) -> Any:
        return Classifier()


class Classifier(Module):
    def __init__(self) -> None:
        self.out = Param(vocab=CLASSES, embed=PIXELS, fan_in_axes=0, init=0.1)

    def __call__(self, ops: Any, batch: Any) -> Any:
        return ops.cross_entropy(batch["image"], self.out, batch["label"], mask=batch["mask"][:, None])


def texts(name: str = "texts") -> TextFiles:
    return TextFiles(paths=str(HERE / name), seq_len=SEQ, validation=0.0)


def data() -> DataSpec:
    return {
        "texts": texts(),
        "packed": PackedTokens(path=str(HERE / "store"), seq_len=SEQ),
        "mixture": Mixture(sources=(texts("others"), texts()), weights=(1.0, 1.0), block=16),
        "images": Patterns(),
    }[KIND]


def recipe() -> Recipe:
    return Recipe(
        name="poisoned",
        model=Classes() if KIND == "images" else Sizes(),
        data=data(),
        optimizer=AdamW(lr=0.03, b2=0.95),
        schedule=Constant(warmup=2),
        steps=STEPS,
        batch=BATCH,
        accumulation=2,
        checkpoint_every=5,
        checkpoint_keep=99,
        probe_every=99,
        eval_batches=1,
    )
