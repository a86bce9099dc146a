"""The points of a sweep: what --grid says, and the run that each point is."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portatrain.errors import UserError
from portatrain.recipe import Recipe, apply_overrides
from portatrain.runs.differing import as_text

LONGEST_NAME = 63


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep. overrides: as --set takes them, those of all points first."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe


def grid(given: Sequence[str], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return field -> values of `--grid FIELD=VALUE,VALUE`, which may be given several times.

    Raises:
        UserError: no field, no value, a field that is given twice, or also by --set.
    """
    found: dict[str, list[str]] = {}
    fixed = {one.partition("=")[0].strip() for one in overrides}
    for text in given:
        path, _, values = (part.strip() for part in text.partition("="))
        listed = split(values)
        if not path or not listed or not all(listed):
            raise UserError(
                f"--grid {text!r}",
                expected="FIELD=VALUE,VALUE",
                got="no field" if not path else "a value that is missing",
                do="Write it as in --grid optimizer.lr=1e-3,3e-3.",
            )
        if path in found or path in fixed:
            raise UserError(
                f"--grid {text!r}",
                expected=f"{path} once",
                got="a second --grid for it" if path in found else f"--set {path} too",
                do="Put all values into one --grid.",
            )
        found[path] = listed
    return found


def split(text: str) -> list[str]:
    """Return the parts of `text` between its commas, but for those within brackets: 'a,(b,c)' has two parts."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def points(base: str, recipe: Recipe, fields: Mapping[str, Sequence[str]], overrides: Sequence[str]) -> list[Point]:
    """Return every combination of the values, the last field changing fastest.

    `recipe` is without `overrides`. A point's run is called after `base` and the point's values, as its recipe has
    them: '1e-3' and '0.001' are one point.

    Raises:
        UserError: a value that its field does not take, one point twice, or fewer than two points.
    """
    combinations = list(itertools.product(*fields.values()))
    if len(combinations) < 2:
        raise UserError(
            "--grid",
            expected="at least two points",
            got="one",
            do="Give more values, as in --grid optimizer.lr=1e-3,3e-3; `launch` starts a single run.",
        )
    given = [
        (*overrides, *(f"{path}={value}" for path, value in zip(fields, values, strict=True)))
        for values in combinations
    ]
    recipes = [apply_overrides(recipe, words) for words in given]
    _check_different(recipes, given, len(fields))
    short = _short(list(fields))
    names = [_name(base, [(short[path], _value(one, path)) for path in fields]) for one in recipes]
    return [
        Point(
            name=name if names.count(name) == 1 else _hashed(name, repr(words[len(overrides) :])),
            overrides=words,
            recipe=one,
        )
        for name, words, one in zip(names, given, recipes, strict=True)
    ]


def _check_different(recipes: Sequence[Recipe], given: Sequence[tuple[str, ...]], fields: int) -> None:
    seen: dict[str, tuple[str, ...]] = {}
    for recipe, words in zip(recipes, given, strict=True):
        if recipe.sha256 in seen:
            one, other = (" ".join(w[-fields:]) for w in (seen[recipe.sha256], words))
            raise UserError(
                "--grid",
                expected="points that differ",
                got=f"{one} and {other}, which are the same recipe",
                do="Leave one of the values out.",
            )
        seen[recipe.sha256] = words


def _short(paths: Sequence[str]) -> dict[str, str]:
    """Return for each field the shortest end of its path that no other field has: 'lr' for optimizer.lr."""

    def ends(path: str) -> Iterable[str]:
        parts = path.split(".")
        return (".".join(parts[-n:]) for n in range(1, len(parts) + 1))

    every = [end for path in paths for end in ends(path)]
    return {path: next((end for end in ends(path) if every.count(end) == 1), path) for path in paths}


def _value(recipe: Recipe, path: str) -> str:
    found: Any = recipe
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
    return _text(found)


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(_text, value)) or "()"
    return type(value).__name__ if dataclasses.is_dataclass(value) else as_text(value)


def _name(base: str, values: Sequence[tuple[str, str]]) -> str:
    """Return the name of a point's run. One that no folder can have gets the hash of what it stands for."""
    whole = "-".join([base, *(f"{field}{value}" for field, value in values)])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", whole)
    return name if name == whole and len(name) <= LONGEST_NAME else _hashed(name, whole)


def _hashed(name: str, whole: str) -> str:
    return f"{name[: LONGEST_NAME - 7].rstrip('-')}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"
