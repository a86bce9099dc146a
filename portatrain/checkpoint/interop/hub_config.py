"""Compare a config.json of transformers with what a recipe computes, field by field.

Names and shapes of weights do not determine the function: the same tensors with another rotary base, epsilon or
activation give other logits. So every field either agrees, is known to have no effect, or is refused. The family makes
its sizes from the config (`families.sizes_from`), and their own table is compared with the recipe's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portatrain.checkpoint.interop.families import FAMILIES, family_of, sizes_from
from portatrain.checkpoint.interop.hub_fields import HARMLESS
from portatrain.checkpoint.interop.hub_table import Hub
from portatrain.errors import UserError, of_reading
from portatrain.system import json_files

FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field that determines the function, with its value in config.json and its value in the recipe."""

    field: str
    theirs: Any
    ours: Any
    override: str = ""
    """The override with which the recipe agrees; '' if there is none."""

    def __str__(self) -> str:
        mend = f" ({self.override})" if self.override else " (this model has no such option)"
        return f"{self.field} {_text(self.theirs)}, the recipe {_text(self.ours)}{mend}"


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of `folder`. Raises UserError if it is missing or is no JSON object."""
    path = folder / FILE
    try:
        found = json_files.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"folder {folder}",
            expected=f"a {FILE}, which decides what the weights compute",
            got="none" if folder.is_dir() else "no such folder",
            do="Fetch the model again, with all its files." if folder.is_dir() else "Check the path.",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise of_reading(error)(f"file {path}", expected="JSON", got=str(error), do="Fetch it again.") from error
    if not isinstance(found, dict):
        raise UserError(f"file {path}", expected="a JSON object", got=type(found).__name__, do="Fetch it again.")
    return found


def check(folder: Path, hub: Hub, recipe: str) -> None:
    """Raise UserError unless config.json in `folder` describes the function that `hub`, of `recipe`, computes."""
    found, what = read_config(folder), f"file {folder / FILE}"
    kind = str(found.get("model_type"))
    if kind in FAMILIES and FAMILIES.load(kind) is not family_of(hub):
        raise UserError(
            what,
            expected=f"model_type {hub.config.get('model_type')!r}, the family of recipe {recipe}",
            got=repr(kind),
            do=f"Make a recipe for this model: portatrain init my_recipe.py --from {folder}.",
        )
    sizes = sizes_from(found, what)
    theirs, ours = _deciding(sizes.huggingface().config), _deciding(hub.config)
    listed = [str(each) for each in differences(theirs, ours, hub.overrides)]
    if listed:
        raise UserError(
            what,
            expected=f"the function that recipe {recipe} computes",
            got="; ".join(listed),
            do="Add the overrides that are named, or make a recipe for this model: "
            f"portatrain init my_recipe.py --from {folder}.",
        )


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a table's config that decide the function, each fact once."""
    same = {"rope_parameters"} if "rope_scaling" in config else set()
    return {name: value for name, value in config.items() if name not in HARMLESS - {"max_position_embeddings"} | same}


def differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], overrides: Mapping[str, str]
) -> Iterable[Difference]:
    """Return the fields in which two configs differ. `overrides`: config.json's name -> the recipe's field."""
    for name in sorted({*theirs, *ours}):
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, bool) or isinstance(b, bool):
            a, b = bool(a), bool(b)  # a switch that is not there is off
        if not _same(a, b):
            field = overrides.get(name)
            how = "" if field is None else _override(name, field, a)
            yield Difference(field=name, theirs=a, ours=b, override=how)


def _override(name: str, field: str, value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"set {field} in the recipe"
    return f"--set {field}={'none' if value is None else str(value).lower() if isinstance(value, bool) else value}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-12)  # both come from decimal text: equal, except for the last digit
    return bool(a == b)


def _text(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (Mapping, list, str)) else str(value)
    return text if len(text) <= 200 else text[:200] + " ..."
