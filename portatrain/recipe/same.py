"""Compare a recipe with the one that a record or a checkpoint holds, and name the fields that differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from portatrain import config
from portatrain.errors import UserError
from portatrain.recipe.recipe import Recipe

FREE = (
    "name",
    "data",
    "remat",
    "compute",
    "params",
    "eval_every",
    "eval_batches",
    "eval_final_batches",
    "checkpoint_every",
    "checkpoint_every_s",
    "checkpoint_keep",
    "checkpoint_keep_every",
    "checkpoint_keep_best",
    "checkpoint_busy",
    "probe_every",
    "statistics_every",
    "hooks",
)
"""The fields that do not decide the curve. The data is compared by its fingerprint, which other paths leave the same.
"""


def changed_fields(
    stored: object, recipe: Recipe, *, trusted: Callable[[str], bool] = lambda module: True
) -> dict[str, tuple[Any, Any]]:
    """Return the dotted fields in which `recipe` differs from the JSON `stored`, each with both values.

    An older release may have written the same recipe with other module names, or without newer fields; that is no
    difference. `trusted`: the modules that `stored` may import, as in `config.from_json`; all of them for the record of
    a run. If it names another one, its JSON is compared as it stands.
    """
    was: Any = stored
    try:
        known = Recipe.from_json(dict(was), trusted=trusted)
    except (UserError, ImportError, AttributeError, KeyError, TypeError, ValueError):
        pass  # a class that is not installed here, or not trusted: compare with the stored JSON
    else:
        if known.sha256 == recipe.sha256:
            return {}
        was = known.to_json()
    return _differences(was, recipe.to_json())


def deciding_changes(
    meta: Mapping[str, Any], recipe: Recipe, *, trusted: Callable[[str], bool]
) -> dict[str, tuple[Any, Any]]:
    """Return the fields that decide the curve in which `recipe` differs from the recipe in a checkpoint's meta.

    A meta without a recipe, as of tensors that no run has saved, differs in nothing. A hash counts if it is that of the
    recipe beside it, since either may have been edited. `trusted`: as in `changed_fields`.
    """
    stored = meta.get("recipe")
    if not isinstance(stored, Mapping) or (meta.get("recipe_sha256") == recipe.sha256 == _sha256(stored)):
        return {}
    return {k: v for k, v in changed_fields(stored, recipe, trusted=trusted).items() if k.split(".")[0] not in FREE}


def _sha256(stored: Mapping[str, Any]) -> str:
    """Return the hash of a recipe's JSON as it stands; '' if it has none."""
    try:
        return config.sha256_of_json(stored)
    except (TypeError, ValueError):
        return ""


def in_words(changes: Mapping[str, tuple[Any, Any]], most: int = 6) -> str:
    """Return the names of changed fields, each with both values if they are short."""
    found = []
    for name, (was, now) in sorted(changes.items())[:most]:
        values = f"{was!r} there, {now!r} here"
        found.append(f"{name} ({values})" if len(values) <= 60 else name)
    return ", ".join(found) + (" ..." if len(changes) > most else "")


def _differences(old: object, new: object, path: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*old, *new}):
            found |= _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if _plain(old) == _plain(new) else {path: (old, new)}


def _plain(value: object) -> object:
    """Return lists for tuples, which JSON does not tell apart."""
    return [_plain(v) for v in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
