"""Recipes with the sizes of released models have as many parameters as transformers' class with the same config.json,
and as the publisher says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from portatrain.model.module import describe
from portatrain.recipe import load_recipe, shipped_recipes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PUBLISHED = {
    # Billions, as the reports and the cards of the models say; Gemma 3 without its vision.
    "deepseek-v3": "671",
    "gemma2-2b": "2.61",
    "gemma2-9b": "9.24",
    "gemma2-27b": "27.2",
    "gemma3-1b": "1.00",
    "gemma3-4b": "3.88",
    "gemma3-12b": "11.8",
    "gemma3-27b": "27.0",
    "gpt2": "0.124",
    "gpt2-medium": "0.355",
    "gpt2-large": "0.774",
    "gpt2-xl": "1.56",
    "gpt-oss-20b": "20.9",
    "gpt-oss-120b": "117",
    "llama3-1b": "1.24",
    "llama3-8b": "8.03",
    "llama3-70b": "70.6",
    "llama3-405b": "406",
    "mistral-7b": "7.24",
    "mixtral-8x7b": "46.7",
    "mixtral-8x22b": "141",
    "olmo2-7b": "7.30",
    "olmo2-13b": "13.7",
    "olmo2-32b": "32.2",
    "olmo3-7b": "7.30",
    "phi3-mini": "3.82",
    "phi3-medium": "14.0",
    "qwen2-7b": "7.62",
    "qwen3-4b": "4.02",
    "qwen3-8b": "8.19",
    "qwen3-14b": "14.8",
    "qwen3-32b": "32.8",
    "qwen3-30b-a3b": "30.5",
    "qwen3-235b-a22b": "235",
    "smollm3-3b": "3.08",
}
DEFAULTS = ("deepseek-v3", "gpt2", "gpt-oss-120b", "mistral-7b", "mixtral-8x7b", "phi3-mini", "smollm3-3b")
"""Transformers' default sizes of the type are those of this released model."""
EACH = {"gemma3-4b", "olmo2-7b", "olmo3-7b", "qwen2-7b", "qwen3-8b", "qwen3-30b-a3b", *DEFAULTS}
"""One of each family; the others are tried by the long tests."""


def counted(config: Any) -> int:
    """Return the parameters of transformers' class, made without memory; tied ones count once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EACH else pytest.mark.full) for name in PUBLISHED]
)
def test_it_has_the_parameters_of_the_released_model(name: str) -> None:
    model: Any = load_recipe(name).model
    if getattr(model, "predict_depth", 0):
        model = replace(model, predict_depth=0)  # transformers has no such module
    ours = describe(model.build()).parameters
    assert f"{ours / 1e9:.3g}" == f"{float(PUBLISHED[name]):.3g}"
    given = dict(model.huggingface().config)
    config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
    assert counted(config) == ours
    if name in DEFAULTS:
        assert counted(type(config)()) == ours


def test_every_recipe_of_a_released_model_is_compared() -> None:
    assert set(PUBLISHED) == {name for name in shipped_recipes() if not name.startswith("tiny-")}
