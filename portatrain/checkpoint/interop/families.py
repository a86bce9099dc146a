"""Find the family of a model in transformers by the `model_type` of its config.json.

A family is one file of recipes/models: the sizes (a config with `build()` and `huggingface()`), the model, and a
function `from_hub(fields)` that makes the sizes from a config.json. Another package adds one by an entry point of the
group `portatrain.families`, with the model_type as its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from portatrain.checkpoint.interop.hub_fields import Fields
from portatrain.checkpoint.interop.hub_table import Hub
from portatrain.errors import UserError
from portatrain.system.plugins import Registry


class Sizes(Protocol):
    """The sizes of a model of a family: a frozen dataclass."""

    def build(self) -> Any:
        """Return the model."""

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""


FromHub = Callable[[Fields], Sizes]
FAMILIES = Registry(
    kind="model_type",
    group="portatrain.families",
    ours={
        "llama": "recipes.models.decoder:from_hub",
        "mistral": "recipes.models.decoder:from_hub",
        "qwen2": "recipes.models.qwen2:from_hub",
        "qwen3": "recipes.models.qwen3:from_hub",
        "gemma2": "recipes.models.gemma:from_hub",
        "gemma3_text": "recipes.models.gemma:from_hub",
        "olmo2": "recipes.models.olmo2:from_hub",
        "olmo3": "recipes.models.olmo3:from_hub",
        "olmo_hybrid": "recipes.models.olmo_hybrid:from_hub",
        "smollm3": "recipes.models.smollm3:from_hub",
        "phi3": "recipes.models.phi3:from_hub",
        "gpt2": "recipes.models.gpt2:from_hub",
        "mixtral": "recipes.models.mixtral:from_hub",
        "qwen3_moe": "recipes.models.qwen3_moe:from_hub",
        "deepseek_v3": "recipes.models.deepseek_v3:from_hub",
        "gpt_oss": "recipes.models.gpt_oss:from_hub",
        "vit": "recipes.models.class_token_vit:from_hub",
        "siglip": "recipes.models.siglip:from_hub",
    },
)


def sizes_from(config: Mapping[str, Any], what: str = "config.json") -> Any:
    """Return the sizes, of its family, of the model that a config.json describes.

    Raises:
        UserError: no family has its model_type, or a field decides what the model computes and its family does not
            know it or cannot compute its value. The message names the fields, and for an unknown type the family that
            lacks least.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        near, problems = _nearest(config)
        raise UserError(
            f"{what}: model_type {kind!r}",
            expected=f"one of {', '.join(FAMILIES.names())}",
            got=f"no family of that type; the nearest is {near}, but for {'; '.join(problems[:8]) or 'its name'}",
            do=f"Write a family as the one of {near}, and register it under {FAMILIES.group} (docs/start/families.md).",
        )
    sizes, problems = _tried(FAMILIES.load(kind), config, what)
    if problems:
        raise UserError(
            what,
            expected=f"a {kind} that its family can compute",
            got="; ".join(problems),
            do="These fields decide what the weights compute. Use another model, or add the option to the family.",
        )
    return sizes


def _tried(family: FromHub, config: Mapping[str, Any], what: str) -> tuple[Any, list[str]]:
    fields = Fields(config, what)
    sizes = family(fields)
    return sizes, [
        *fields.problems,
        *(f"{each} (not a field that is known to change nothing)" for each in fields.unread()),
    ]


def _nearest(config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the model_type of the family with the fewest problems, and these."""
    return min(_compared(config), key=lambda found: len(found[1]))


def _compared(config: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for kind in FAMILIES.names():
        try:
            yield kind, _tried(FAMILIES.load(kind), {**config, "model_type": kind}, "config.json")[1]
        except UserError as error:
            yield kind, [str(error)] * 99  # one that cannot even read it is the last


def family_of(hub: Hub) -> FromHub | None:
    """Return the family that reads what a table of ours describes; None if it is of no family."""
    kind = str(hub.config.get("model_type"))
    found: FromHub | None = FAMILIES.load(kind) if kind in FAMILIES else None
    return found
