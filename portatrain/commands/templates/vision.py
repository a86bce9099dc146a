"""my-recipe: a small vision transformer.

Train it:  launch --cluster local my_recipe.py
See it:    portatrain show my_recipe.py
"""

from __future__ import annotations

from portatrain.data import Digits
from portatrain.optim import AdamW, Cosine
from portatrain.recipe import Recipe
from recipes.models.vit import ViTConfig

# Data: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which need no download (pip install scikit-learn).
DATA = Digits()


def recipe() -> Recipe:
    """Return everything that decides the run. Every field can be changed from outside: --set model.layers=4."""
    return Recipe(
        name="my-recipe",
        # The image is cut into patches of 2 x 2 pixels, which are the sequence that attention sees.
        model=ViTConfig(rows=8, columns=8, channels=1, patch=2, classes=10, embed=48, layers=2, heads=4, dropout=0.1),
        data=DATA,
        # Other rules: Muon, Lion, Adafactor, SGD. The schedule multiplies lr: up over `warmup` steps, then down.
        optimizer=AdamW(lr=3e-3, b2=0.98, weight_decay=0.5),
        schedule=Cosine(warmup=20, min_ratio=0.01),
        steps=300,
        batch=64,  # images a step, over all devices; accumulation=2 takes them in two halves
        eval_every=50,
        precision="fp32",  # "bf16" on accelerators
    )
