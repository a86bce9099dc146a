"""The recipes of released models: what the planner sees of a mixture is the published shape, and every family is
planned for a TPU, an NVIDIA and an AMD cluster."""

from __future__ import annotations

import pytest

from portatrain.plan.clusters import names
from portatrain.plan.cost.recipes import find, shape_of
from portatrain.plan.cost.shapes import PRESETS
from portatrain.plan.search import plan
from portatrain.recipe import Recipe, apply_overrides, shipped_recipes

CLUSTERS = ("tpu-v5p-256", "h100-256", "mi355x-256")
SMALLEST = (
    "deepseek-v3",
    "gemma2-2b",
    "gemma3-1b",
    "gpt2",
    "gpt-oss-20b",
    "mistral-7b",
    "mixtral-8x7b",
    "olmo2-7b",
    "olmo3-7b",
    "phi3-mini",
    "qwen2-7b",
    "qwen3-4b",
    "qwen3-30b-a3b",
    "smollm3-3b",
)
OTHERS = tuple(name for name in shipped_recipes() if not name.startswith(("tiny-", "llama3-")) and name not in SMALLEST)
TOO_LARGE = {("deepseek-v3", "tpu-v5p-256")}
"""Parameters and slots in fp32 are 12 bytes a parameter, 64 GB a chip; its gradients do not fit beside them."""


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3"])
def test_a_mixture_is_the_published_shape(name: str) -> None:
    recipe = find(name)
    assert isinstance(recipe, Recipe)
    published = PRESETS[name]
    if name == "deepseek-v3":
        recipe = apply_overrides(recipe, ["model.predict_depth=0"])  # the published shape is without it
    mine = shape_of(recipe)
    for field in ("parameters", "active", "layers", "stacks", "q_width", "kv_width", "out_width", "attention_flops"):
        assert getattr(mine, field) == getattr(published, field), field
    assert mine.model_flops == pytest.approx(published.model_flops, rel=1e-12)
    assert (mine.batch, mine.seq_len, mine.tied) == (published.batch, published.seq_len, published.tied)


@pytest.mark.parametrize("name", [*SMALLEST, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_it_is_planned_for_chips_of_three_vendors(name: str) -> None:
    shape = shape_of(find(name))
    for cluster in CLUSTERS:
        made = plan(shape, names.resolve(cluster))
        assert bool(made.best) == ((name, cluster) not in TOO_LARGE), (cluster, made.hints)
        assert bool(made.best) != bool(made.hints)  # a hint is given where nothing fits
