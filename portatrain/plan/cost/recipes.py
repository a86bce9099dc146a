"""Turn a recipe into the shape that the planner needs, from the list of its logical tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from portatrain.errors import choice
from portatrain.model.layers import GatedDeltaNet
from portatrain.model.module import Definition
from portatrain.optim import declared_slots
from portatrain.plan.cost.policy import PRECISIONS
from portatrain.plan.cost.shapes import PRESETS, ModelShape, Recurrence, from_tensors
from portatrain.plan.cost.tensors import LogicalTensor
from portatrain.recipe import Recipe, load_recipe, shipped_recipes

_SLOT_BYTES = {"float32": 4, "bfloat16": 2, "int32": 4, "float16": 2}


def find(name: str, *, cwd: Path | None = None) -> Recipe | ModelShape:
    """Return the recipe of that name or file, else the preset shape of that name.

    Raises:
      UserError: there is neither, or the file does not load.
    """
    shipped = shipped_recipes()
    if name in shipped or name.endswith(".py") or "/" in name:
        return load_recipe(name, cwd=cwd)
    if name not in PRESETS:
        raise choice(f"recipe {name!r} (a file ends in .py)", name, dict.fromkeys([*shipped, *PRESETS]))
    return PRESETS[name]


def shape_of(recipe: Recipe | ModelShape) -> ModelShape:
    """Return the shape that the planner needs of ``recipe``."""
    if isinstance(recipe, ModelShape):
        return recipe
    definition = recipe.describe()
    tensors = logical_tensors(definition, recipe)
    positions = recipe.data.tokens_per_sample() or _positions(tensors)
    trained = [t for t in tensors if t.trainable]
    slots = sum(
        math.prod(slot.shape) * _SLOT_BYTES.get(slot.dtype, 4)
        for tensor in trained
        for slot in declared_slots(recipe.optimizer, tensor).values()
    )
    # Averages are fp32 whatever the dtype of the slots, which the precision scales.
    averaged = sum(4 * t.size for t in tensors if recipe.averages(t.name)) / PRECISIONS[recipe.precision].slots
    numel = sum(t.size for t in trained)
    modules = definition.modules.values()
    return from_tensors(
        recipe.name,
        tensors,
        seq_len=positions,
        batch=recipe.batch,
        options=_options(definition, packed=recipe.data.tokens_per_sample() is not None),
        causal=all(getattr(module, "causal", True) for module in modules),
        tied=not any(t.matmul for t in tensors[1:]),
        **_recurrence(definition, tensors),
        experts_per_token=max((getattr(module, "experts_per_token", 0) for module in modules), default=0),
        slot_bytes=(slots + averaged) / numel if numel else 0.0,
        precision=recipe.precision,
        train_tokens=float(recipe.samples_after(recipe.steps) * positions),
        flops_per_sample=recipe.flops_per_sample(),
        compute=dict(recipe.compute or {}),
        params=dict(recipe.params or {}),
        source=f"recipe {recipe.name}",
    )


def _recurrence(definition: Definition, tensors: tuple[LogicalTensor, ...]) -> dict[str, Any]:
    """Return the shape's fields for recurrent layers: what they are, and how many others there are."""
    found: list[Recurrence] = []
    for path, module in definition.modules.items():
        if isinstance(module, GatedDeltaNet):
            rates = definition.params[f"{path}/decay_log"]
            n = math.prod(rates.shape[: rates.stack_dims])
            found.append(Recurrence(layers=n, **module.sizes))
    if not found:
        return {}
    layers = sum(each.layers for each in found)
    fields: dict[str, Any] = {"recurrence": replace(max(found, key=lambda each: each.flops), layers=layers)}
    if not any("heads" in t.axes for t in tensors):
        fields["layers"] = 1  # no layer has attention; the shape counts one, without width
        fields["recurrence"] = replace(fields["recurrence"], layers=max(1, layers - 1))
    return fields


def logical_tensors(definition: Definition, recipe: Recipe) -> tuple[LogicalTensor, ...]:
    """Return the parameters of a model. The last table over the vocabulary is the one that the loss multiplies with:
    once, and once more for each of the `predict_depth` further tokens that the model says it predicts."""
    tables = [name for name, info in definition.params.items() if "vocab" in info.axes and not info.fan_in_axes]
    return tuple(
        LogicalTensor(
            name=info.name,
            shape=info.shape,
            axes=info.axes,
            batch_dims=info.batch_dims,
            fan_in_axes=info.fan_in_axes,
            trainable=recipe.trains(info.name),
            matmul=1 + getattr(definition.model, "predict_depth", 0) if tables and info.name == tables[-1] else 0,
        )
        for info in definition.params.values()
    )


def _options(definition: Definition, *, packed: bool) -> frozenset[str]:
    """Return the traits of attention that the attributes of modules show, as `causal` does."""
    shown = {"window": "window", "softcap": "softcap", "sinks": "sink_bias"}
    modules = definition.modules.values()
    found = {trait for trait, name in shown.items() if any(getattr(m, name, None) is not None for m in modules)}
    return frozenset(found | ({"segments"} if packed else set()))


def _positions(tensors: tuple[LogicalTensor, ...]) -> int:
    """Return the length of a sample that is not text: the length of its table of positions, else 1."""
    return max((t.shape[t.axes.index("patches")] for t in tensors if "patches" in t.axes), default=1)
