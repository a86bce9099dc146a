"""A corpus, a tokenizer for it, and packed stores of it in small groups."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.data import DataSpec
from portatrain.data.store import packing
from portatrain.data.store.layout import Manifest
from portatrain.data.store.places import place

SHARD_BYTES = 40_000
RECIPE = '''"""A small decoder on the packed corpus."""

from portatrain import Recipe
from portatrain.data import TextFiles
from portatrain.optim import AdamW, Constant
from recipes.models.decoder import DecoderConfig


def recipe() -> Recipe:
    return Recipe(
        name="packed",
        model=DecoderConfig(vocab=512, embed=16, layers=1, heads=2),
        data=TextFiles(paths={paths!r}, seq_len=16, validation=0.2, tokenizer={tokenizer!r}),
        optimizer=AdamW(lr=1e-3),
        schedule=Constant(),
        steps=4,
        batch=4,
    )
'''


def corpus(folder: Path, documents: int = 60, words: int = 1500) -> Path:
    """Write text files of 0 to `words` words: empty ones, accents, CRLF, a BOM, one document longer than the others."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    known = [f"w{n}é" if n % 7 == 0 else f"w{n}" for n in range(300)]
    for n in range(documents):
        size = int(rng.integers(1, words)) * (4 if n == 5 else 1)
        text = " ".join(rng.choice(known, size)) if n not in (3, 17) else ""
        ends = ("\ufeff" + text, text.replace(" ", "\r\n"), text)[min(n, 2)]
        (folder / f"{n:03d}.txt").write_bytes(ends.encode())
    return folder


def tokenizer(path: Path) -> Path:
    """Write a tokenizer of about 280 byte pairs."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([" ".join(f"w{n}" for n in range(300))], trainer)
    made.save(str(path))
    return path


def packed(spec: DataSpec, where: Path | str, *, workers: int = 1, **more: Any) -> Manifest:
    return packing.pack(
        spec, place(str(where)), workers=workers, shard_bytes=more.pop("shard_bytes", SHARD_BYTES), **more
    )


def contents(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of everything below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
