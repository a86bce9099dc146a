"""tiny-chat: fine-tune a small decoder on chats, of which only the answers are targets, in a minute on two
cores.

The chats are those of `python -m recipes.chats chats`, and the weights those of a tiny-lm with the same tokens
(docs/start/chat.md has all commands). Yours: other paths, tokenizer and model.
"""

from __future__ import annotations

from portatrain.data import Jsonl
from portatrain.optim import AdamW, Cosine
from portatrain.recipe import Recipe
from recipes.chats import TEXT, VOCAB
from recipes.models.decoder import DecoderConfig

MODEL = DecoderConfig(vocab=VOCAB, embed=128, layers=4, heads=4, kv_heads=2, mlp=384)


def recipe() -> Recipe:
    return Recipe(
        name="tiny-chat",
        model=MODEL,
        data=Jsonl(
            paths="chats/chats.jsonl",
            messages="messages",
            tokenizer="chats/tokenizer",
            bos=TEXT,
            seq_len=256,
            packing="best-fit",
        ),
        optimizer=AdamW(lr=1e-3, b2=0.95, weight_decay=0.0),
        schedule=Cosine(warmup=10, min_ratio=0.1),
        steps=120,
        batch=8,
        eval_every=40,
    )
