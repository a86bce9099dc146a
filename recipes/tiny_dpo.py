"""tiny-dpo: direct preference optimisation of a small decoder on pairs of answers, beside a frozen copy of itself.

The pairs are those of `python -m recipes.chats chats`, and the weights those that tiny-chat trained
(docs/start/preferences.md has all commands).
"""

from __future__ import annotations

from portatrain.data import Preferences
from portatrain.optim import AdamW, Cosine
from portatrain.recipe import Recipe
from recipes.chats import TEXT
from recipes.models.preference import REFERENCE, DPOConfig
from recipes.tiny_chat import MODEL


def recipe() -> Recipe:
    return Recipe(
        name="tiny-dpo",
        model=DPOConfig(policy=MODEL, beta=0.1),
        frozen=(REFERENCE,),
        data=Preferences(paths="chats/pairs.jsonl", tokenizer="chats/tokenizer", bos=TEXT, seq_len=160),
        optimizer=AdamW(lr=2e-5, b2=0.95, weight_decay=0.0),
        schedule=Cosine(warmup=10, min_ratio=0.1),
        steps=60,
        batch=8,
        eval_every=20,
    )
