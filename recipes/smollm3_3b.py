"""smollm3-3b: a decoder with the sizes of the released SmolLM3, 3.08 billion parameters.

Sizes are those of config.json of HuggingFaceTB/SmolLM3-3B (the defaults of transformers' SmolLM3Config, but for the
base of the rotary frequencies, which later stages with longer texts raised to the one here). In its tokenizer 128001
(`<|end_of_text|>`) ends a document. The training data is yours: files of token ids, named with
``--set data.paths=/data/tokens/*.bin`` (uint32, with the id 128001 between documents). This recipe is planned; no test
trains it.

Source of the hyperparameters: Bakouch et al. 2025, huggingface.co/blog/smollm3, and the card of
HuggingFaceTB/SmolLM3-3B-checkpoints: three stages of 4,720,000 steps in all of 2,359,296 tokens, in texts of 4,096;
AdamW with beta 0.9 and 0.95, weight decay 0.1 but for the embedding table, norm of the gradient clipped at 1; 2,000
steps of warm-up to 2e-4, and a straight line to 0 in the last stage, of 520,000 steps. The stages differ in their data.
"""

from __future__ import annotations

from portatrain.data import TokenMemmap
from portatrain.optim import AdamW
from portatrain.optim.schedules import WSD
from portatrain.recipe import Recipe
from recipes.models.smollm3 import SmolLM3Config


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="smollm3-3b",
        model=SmolLM3Config(
            vocab=128_256,
            embed=2048,
            layers=36,
            heads=16,
            kv_heads=4,
            head_dim=128,
            mlp=11_008,
            tied=True,
            rope_theta=5e6,
            norm_eps=1e-6,
        ),
        data=TokenMemmap(paths=(), seq_len=4096, vocab=128_256, dtype="uint32", separator=128_001, validation=0.001),
        optimizer=AdamW(lr=2e-4, b2=0.95, weight_decay=0.1),
        no_decay=("embed/table",),
        schedule=WSD(warmup=2000, decay=520_000),
        steps=4_720_000,  # 11.1 trillion tokens
        batch=576,  # samples, 2.4 million tokens
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
