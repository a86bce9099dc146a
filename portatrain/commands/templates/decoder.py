"""my-recipe: a small decoder language model.

Train it:  launch --cluster local my_recipe.py
See it:    portatrain show my_recipe.py
"""

from __future__ import annotations

from portatrain.data import Stdlib
from portatrain.optim import AdamW, Cosine
from portatrain.recipe import Recipe
from recipes.models.decoder import DecoderConfig

# Data: the source code of Python's standard library, which needs no download. A token is a byte.
# Yours: TextFiles(paths="folder of text files", ...), Jsonl(...) or TokenMemmap(...), all in portatrain.data.
DATA = Stdlib(seq_len=128, validation=0.03)
VOCAB = 256


def recipe() -> Recipe:
    """Return everything that decides the run. Every field can be changed from outside: --set model.layers=4."""
    return Recipe(
        name="my-recipe",
        # Rotary positions, grouped-query attention (kv_heads), a gated MLP; more fields in recipes/models/decoder.py.
        model=DecoderConfig(vocab=VOCAB, embed=64, layers=2, heads=4, kv_heads=2, mlp=192),
        data=DATA,
        # Other rules: Muon, Lion, Adafactor, SGD. The schedule multiplies lr: up over `warmup` steps, then down.
        optimizer=AdamW(lr=4e-3, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=20, min_ratio=0.1),
        steps=200,
        batch=16,  # samples a step, over all devices; accumulation=2 takes them in two halves
        eval_every=50,
        precision="fp32",  # "bf16" on accelerators
    )
