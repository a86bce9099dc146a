"""Every number of every recipe and family, at 0 and below: refused by name before anything runs, or stated here."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import recipes.models
from portatrain.checkpoint.interop import Fields
from portatrain.errors import UserError
from portatrain.recipe import apply_overrides, load_recipe, shipped_recipes
from portatrain.recipe.overrides import override

# A number that may be 0. None of ours may be negative.
MAY_BE_0 = {
    "alpha",
    "b1",
    "b2",
    "balance_loss",
    "balance_rate",
    "decay",
    "batch_ramp",
    "dense_layers",
    "dropout",
    "max_skips",
    "min_ratio",
    "mscale",
    "norm_eps",
    "predict_depth",
    "predict_weight",
    "rotary",
    "router_z_loss",
    "seed",
    "separator",
    "shared_experts",
    "unlabelled",
    "validation",
    "warmup",
    "weight_decay",
    "z_loss",
}


def numbers(config: Any, before: str = "") -> Iterator[str]:
    """Yield the path of every number in a config and in the configs that it holds."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{before}{field.name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield before + field.name


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_no_recipe_takes_a_number_out_of_range(name: str) -> None:
    recipe = load_recipe(name)
    for path in numbers(recipe):
        for bad in (-1, 0):
            if bad == 0 and path.split(".")[-1] in MAY_BE_0:
                continue
            with pytest.raises(UserError) as refused:
                apply_overrides(recipe, [f"{path}={bad}"]).model.build()
            assert path.split(".")[-1].removeprefix("norm_") in str(refused.value), path


def families() -> list[str]:
    """Return the modules of the families that read a config.json."""
    names = [f"recipes.models.{found.name}" for found in pkgutil.iter_modules(recipes.models.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "from_hub")]


@pytest.mark.parametrize("module", families())
def test_no_family_takes_a_number_out_of_range(module: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = importlib.import_module(module).from_hub(Fields(sizes)).small()
    for path in numbers(model):
        for bad in (-1, 0):
            if bad == 0 and path.split(".")[-1] in MAY_BE_0:
                continue
            with pytest.raises(UserError) as refused:
                override(model, [f"{path}={bad}"]).build()
            assert path.split(".")[-1].removeprefix("norm_") in str(refused.value), path


def test_an_integer_is_a_number_where_one_may_be_0() -> None:
    assert override(load_recipe("llama3-1b").model, ["z_loss=0"]).z_loss == 0
    assert dataclasses.replace(load_recipe("llama3-1b").model, z_loss=0, dropout=0).z_loss == 0
