"""deepseek-v3: a mixture with the sizes of the released DeepSeek-V3, 671 billion parameters, 37 billion of them active.

Sizes are those of config.json of deepseek-ai/DeepSeek-V3 (the defaults of transformers' DeepseekV3Config), without the
scaling of rotary positions, which came after pre-training. As in the release there is one module that predicts a
further token: 11.6 billion more parameters, 14 with its two tables, which are the model's own. In its tokenizer 0
(`<｜begin▁of▁sentence｜>`) begins a document. The training data is yours: files of token ids, named with
``--set data.paths=/data/tokens/*.bin`` (uint32, with the id 0 before every document). This recipe is planned;
no test trains it.

Source of the hyperparameters: DeepSeek-V3 Technical Report (DeepSeek-AI 2024, arXiv:2412.19437), section 4.2: 14.8
trillion tokens in texts of 4,096; AdamW with beta 0.9 and 0.95 and weight decay 0.1; 2,000 steps of warm-up to 2.2e-4,
constant for 10 trillion tokens, down to 2.2e-5 over 4.3 trillion, then 2.2e-5 and 7.3e-6 for 500 billion; norm of the
gradient clipped at 1; the balance moves by 0.001, and its loss counts 0.0001; the further token counts 0.3 for 10
trillion tokens, then 0.1.

This differs from it: the decay is a straight line to 2.2e-5 and not half a cosine; the further token counts 0.3
throughout; the batch is 15,360 samples from the beginning and does not grow from 3,072 (set `batch_start` and
`batch_ramp` with an `accumulation` whose microbatch divides both); and matmuls are computed from bfloat16 operands
(`--set precision=fp8` computes them from 8-bit ones, on chips that have them).
"""

from __future__ import annotations

from portatrain.data import TokenMemmap
from portatrain.optim import AdamW
from portatrain.optim.schedules import WSD
from portatrain.recipe import Recipe
from recipes.models.deepseek_v3 import DeepseekV3Config


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="deepseek-v3",
        model=DeepseekV3Config(
            vocab=129_280,
            embed=7168,
            layers=61,
            dense_layers=3,
            heads=128,
            q_rank=1536,
            kv_rank=512,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            mlp=18_432,
            expert_mlp=2048,
            experts=256,
            shared_experts=1,
            chosen=8,
            groups=8,
            chosen_groups=4,
            weight_scale=2.5,
            tied=False,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            balance_rate=0.001,
            balance_loss=0.0001,
            predict_depth=1,
            predict_weight=0.3,
        ),
        data=TokenMemmap(paths=(), seq_len=4096, vocab=129_280, dtype="uint32", separator=0, validation=0.001),
        optimizer=AdamW(lr=2.2e-4, b2=0.95, weight_decay=0.1),
        schedule=WSD(warmup=2000, decay=76_294, min_ratio=0.1),  # the decay: the last 4.8 trillion tokens
        steps=235_240,  # 14.8 trillion tokens
        batch=15_360,  # samples, 62.9 million tokens
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
