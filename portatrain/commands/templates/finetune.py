"""my-recipe: fine-tune the model in the folder INIT, whose config.json gave the sizes below.

Train it:  launch --cluster local my_recipe.py
See it:    portatrain show my_recipe.py
Export it: portatrain ckpt export runs/my-recipe exported --to huggingface
"""

from __future__ import annotations

from portatrain.data import Stdlib
from portatrain.optim import AdamW, Cosine
from portatrain.recipe import Recipe

# A folder of transformers; each process reads its own ranges of the .safetensors files.
INIT = "FOLDER"

MODEL = None

# Data: the source code of Python's standard library, which needs no download.
# Yours: TextFiles(paths="folder of text files", ...), Jsonl(...) or TokenMemmap(...), all in portatrain.data.
DATA = Stdlib(seq_len=128, validation=0.03)


def recipe() -> Recipe:
    """Return everything that decides the run. Every field can be changed from outside: --set steps=2000."""
    return Recipe(
        name="my-recipe",
        model=MODEL,
        init=INIT,
        data=DATA,
        # A tenth of the rate that trained such a model is usual. lora=LoRA(rank=16) trains factors alone.
        optimizer=AdamW(lr=2e-5, b2=0.95, weight_decay=0.0),
        schedule=Cosine(warmup=20, min_ratio=0.1),
        steps=200,
        batch=16,  # samples a step, over all devices; accumulation=2 takes them in two halves
        eval_every=50,
        precision="fp32",  # "bf16" on accelerators
    )
