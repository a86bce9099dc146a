"""olmo2-7b, olmo2-13b, olmo2-32b and olmo3-7b: decoders with the sizes of the released OLMo 2 and 3 models.

Sizes are those of config.json of allenai/OLMo-2-1124-7B, -13B, OLMo-2-0325-32B and Olmo-3-1025-7B, whose table has
100,352 rows for 100,278 ids; positions are unscaled, as in pre-training. In their tokenizer 100257 (`<|endoftext|>`)
ends a document. The training data is yours: files of token ids, named with ``--set data.paths=/data/tokens/*.bin``
(uint32, with the id 100257 between documents). These recipes are planned; no test trains them.

Hyperparameters are those of the first stage of the released models: OLMo 2 by OLMo Team 2025, arXiv:2501.00656, table
3, configs/official-1124/OLMo2-7B-stage1.yaml of allenai/OLMo, and src/scripts/official/OLMo2 of allenai/OLMo-core; OLMo
3 by src/scripts/official/OLMo3/OLMo-3-1025-7B-pretrain-1.py of the same. Of the 13B the table says 9e-4 and the file
3e-4; its second stage begins at 9e-5, so 9e-4 is taken. All weights decay but the embedding table. The cosine is that
of the whole schedule: OLMo 2 7B stopped after 928,646 of these steps, and OLMo 3 7B stretched it at step 597,046.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.data import TokenMemmap
from portatrain.errors import choice
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.olmo2 import Olmo2Config
from recipes.models.olmo3 import Olmo3Config


@dataclass(frozen=True, kw_only=True)
class Size:
    """The fields that differ between the recipes."""

    config: type[Olmo2Config] = Olmo2Config
    embed: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    seq_len: int = 4096
    lr: float
    batch: int
    """The number of samples in a step."""
    steps: int


# The keys are the names under which portatrain ships these recipes.
RECIPES = {
    # 7.30 billion parameters; 5 trillion tokens, 4.2 million a step.
    "olmo2-7b": Size(embed=4096, layers=32, heads=32, kv_heads=32, mlp=11_008, lr=3e-4, batch=1024, steps=1_192_093),
    # 13.7 billion parameters; 5 trillion tokens, 8.4 million a step.
    "olmo2-13b": Size(embed=5120, layers=40, heads=40, kv_heads=40, mlp=13_824, lr=9e-4, batch=2048, steps=596_046),
    # 32.2 billion parameters; 6.5 trillion tokens, 8.4 million a step.
    "olmo2-32b": Size(embed=5120, layers=64, heads=40, kv_heads=8, mlp=27_648, lr=6e-4, batch=2048, steps=774_860),
    # 7.30 billion parameters; 5 trillion tokens, 4.2 million a step.
    "olmo3-7b": Size(
        config=Olmo3Config,
        embed=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        mlp=11_008,
        seq_len=8192,
        lr=3e-4,
        batch=512,
        steps=1_192_093,
    ),
}


def recipe(name: str = "olmo2-7b") -> Recipe:
    """Return the recipe of that name. A copy of this file, given by its path, makes the 7B.

    Raises:
        UserError: `RECIPES` has no such name.
    """
    if name not in RECIPES:
        raise choice("OLMo recipe", name, RECIPES)
    size = RECIPES[name]
    return Recipe(
        name=name,
        model=size.config(
            vocab=100_352,
            embed=size.embed,
            layers=size.layers,
            heads=size.heads,
            kv_heads=size.kv_heads,
            head_dim=128,
            mlp=size.mlp,
            tied=False,
            rope_theta=500_000.0,
            norm_eps=1e-6,
            z_loss=1e-5,
        ),
        data=TokenMemmap(
            paths=(), seq_len=size.seq_len, vocab=100_352, dtype="uint32", separator=100_257, validation=0.001
        ),
        optimizer=AdamW(lr=size.lr, b2=0.95, weight_decay=0.1),
        decay=("*",),
        no_decay=("embed/table",),
        schedule=Cosine(warmup=2000, min_ratio=0.1),
        steps=size.steps,
        batch=size.batch,
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
