"""qwen3-4b, -8b, -14b, -32b and the mixtures qwen3-30b-a3b, -235b-a22b: the sizes of the released Qwen 3 models.

Sizes are those of config.json of Qwen/Qwen3-4B, -8B, -14B, -32B, -30B-A3B and -235B-A22B. In their tokenizer 151643
(`<|endoftext|>`) ends a document. The training data is yours: files of token ids, named with
``--set data.paths=/data/tokens/*.bin`` (uint32, with the id 151643 between documents). These recipes are planned; no
test trains them.

The length and the number of tokens are those of the first two stages of their training (Yang et al. 2025,
arXiv:2505.09388, section 3.2); the base of the rotary frequencies is the released one, which the third stage brought.
The optimizer has not been published: learning rates, warm-up, decay and tokens a step are those that Llama 3 had at
about as many active parameters (`llama3.py`). The weight of the balance loss is that of config.json; the released
mixtures balanced over the global batch, and here each sample is balanced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portatrain.data import TokenMemmap
from portatrain.errors import choice
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.qwen3 import Qwen3Config
from recipes.models.qwen3_moe import Qwen3MoeConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """The fields that differ between the recipes."""

    embed: int
    layers: int
    heads: int
    kv_heads: int = 8
    mlp: int = 0
    """Hidden features of the feed-forward block. 0: it is a mixture."""
    expert_mlp: int = 0
    """Hidden features of each of the 128 experts, of which a token goes to 8."""
    tied: bool = False
    """True if the output projection is the embedding table."""
    lr: float


# The keys are the names under which portatrain ships these recipes.
RECIPES = {
    # 4.02, 8.19, 14.8 and 32.8 billion parameters.
    "qwen3-4b": Size(embed=2560, layers=36, heads=32, mlp=9728, tied=True, lr=3e-4),
    "qwen3-8b": Size(embed=4096, layers=36, heads=32, mlp=12_288, lr=3e-4),
    "qwen3-14b": Size(embed=5120, layers=40, heads=40, mlp=17_408, lr=3e-4),
    "qwen3-32b": Size(embed=5120, layers=64, heads=64, mlp=25_600, lr=1.5e-4),
    # 30.5 billion parameters, 3.3 billion of them active; 235 billion, 22 billion active.
    "qwen3-30b-a3b": Size(embed=2048, layers=48, heads=32, kv_heads=4, expert_mlp=768, lr=3e-4),
    "qwen3-235b-a22b": Size(embed=4096, layers=94, heads=64, kv_heads=4, expert_mlp=1536, lr=1.5e-4),
}


def recipe(name: str = "qwen3-8b") -> Recipe:
    """Return the recipe of that name. A copy of this file, given by its path, makes the 8B.

    Raises:
        UserError: `RECIPES` has no such name.
    """
    if name not in RECIPES:
        raise choice("Qwen 3 recipe", name, RECIPES)
    size = RECIPES[name]
    sizes: dict[str, Any] = {
        "vocab": 151_936,
        "embed": size.embed,
        "layers": size.layers,
        "heads": size.heads,
        "kv_heads": size.kv_heads,
        "head_dim": 128,
        "tied": size.tied,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
    }
    if size.expert_mlp:
        experts: dict[str, Any] = {"experts": 128, "chosen": 8, "expert_mlp": size.expert_mlp, "balance_loss": 0.001}
        model: Qwen3Config | Qwen3MoeConfig = Qwen3MoeConfig(**sizes, **experts)
    else:
        model = Qwen3Config(**sizes, mlp=size.mlp)
    return Recipe(
        name=name,
        model=model,
        data=TokenMemmap(paths=(), seq_len=4096, vocab=151_936, dtype="uint32", separator=151_643, validation=0.001),
        optimizer=AdamW(lr=size.lr, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=8_345_000,  # 35 trillion tokens
        batch=1024,  # samples, 4.2 million tokens
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
