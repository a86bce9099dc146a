"""The decoders that the proof times: shapes of 1B and 8B parameters with as many layers as fit, and a tiny one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from portatrain.recipe import Recipe, apply_overrides, load_recipe

SHAPES = {
    "8b": ("llama3-8b", ()),
    "1b": ("llama3-1b", ()),
    "tiny": (
        "llama3-1b",
        (
            "model.vocab=256",
            "model.embed=64",
            "model.heads=4",
            "model.kv_heads=2",
            "model.head_dim=16",
            "model.mlp=128",
        ),
    ),
}
BYTES = 18
"""Of a parameter: float32 of the weight, its gradient and two averages, and bf16 of the weight for the step."""
SPARE = 0.3
"""Share of the free memory that is left to activations and to what the framework keeps."""


def recipe_of(job: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a job, of `layers` layers and one sample of `seq` tokens a step."""
    name, sizes = SHAPES[job["shape"]]
    tokens = (f"data.seq_len={job['seq']}", f"batch={job['batch']}", "accumulation=1")
    how = (f"model.layers={job['layers']}", f"precision={job['precision']}", "remat=block")
    return apply_overrides(load_recipe(name), [*sizes, *how, *tokens, "eval_every=none", "hooks=()"])


def layers_that_fit(shape: str, free_bytes: int) -> int:
    """Return how many layers of a shape fit in the memory, at most as many as the model has."""
    base = {"shape": shape, "seq": 1024, "batch": 1, "precision": "bf16"}
    one, two = (recipe_of({**base, "layers": n}).describe().parameters for n in (1, 2))
    most = load_recipe(SHAPES[shape][0]).model.layers  # type: ignore[attr-defined]
    fit = int((free_bytes * (1 - SPARE) / BYTES - (one - (two - one))) // (two - one))
    return max(0, min(most, fit))


def matmul_flops(job: Mapping[str, Any]) -> float:
    """Return the FLOPs of the weights' products in a step, forward and backward: 6 a parameter and token. The table
    counts once, for the output; attention's own products and what is computed again do not count."""
    recipe = recipe_of(job)
    table = 0 if recipe.model.tied else recipe.model.vocab * recipe.model.embed  # type: ignore[attr-defined]
    return 6.0 * (recipe.describe().parameters - table) * job["seq"] * job["batch"]


def batch_of(job: Mapping[str, Any], recipe: Recipe) -> dict[str, np.ndarray]:
    """Return tokens and targets (B, S) int32 and sample (B,), drawn at random."""
    b, s = job["batch"], job["seq"]
    model: Any = recipe.model
    ids_BS = np.random.default_rng(0).integers(0, model.vocab, (b, s + 1)).astype(np.int32)
    return {"tokens": ids_BS[:, :-1].copy(), "targets": ids_BS[:, 1:].copy(), "sample": np.arange(b, dtype=np.int64)}
