"""Read rows of metrics.jsonl and events.jsonl, and small JSON files, and check their types.

Any file in a run directory may be damaged. These functions return values of the expected types, or raise a ValueError
that `json_files` converts to an error with file and line, so that no caller has to check again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from portatrain.errors import UserError
from portatrain.system import json_files

MOST_STEPS, LATEST_S, LONGEST_S = 10**12, 1e11, 1e12
"""The largest valid steps of a run, Unix seconds (the year 5138) and seconds of an attempt; more means damage."""


def metric(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl with `loss`, `grad_norm` and `aux` as floats, which can be NaN or infinite."""
    whole(row, "step", least=1, required=True)
    for key in ("loss", "grad_norm", "lr"):
        if key in row:
            row[key] = json_files.number(row[key])
    for key in ("time_s", "step_s", "data_wait_s", "tokens_per_s"):
        if row.get(key) is not None:
            row[key] = bounded(row[key], key, 1e30 if key == "tokens_per_s" else LONGEST_S)
        elif key in row:
            del row[key]
    for key in ("tokens", "memory_bytes"):
        whole(row, key, most=10**24)
    if row.get("mfu") is not None:
        row["mfu"] = json_files.number(row["mfu"])
    for key in ("aux", "statistics"):
        if key in row:
            row[key] = numbers(row[key] or {}, key)
    if "layers" in row:
        row["layers"] = of_layers(row["layers"] or {})
    return row


def of_layers(value: object) -> dict[str, list[Any]]:
    """Return the metrics of layers: by name a number for each layer, or a list of numbers for each; ValueError for
    anything else."""
    if not isinstance(value, dict) or not all(isinstance(rows, list) and rows for rows in value.values()):
        raise ValueError("'layers' is no object of lists")
    found: dict[str, list[Any]] = {}
    for name, rows in value.items():
        if any(isinstance(row, list) for row in rows):
            if not all(isinstance(row, list) and row for row in rows):
                raise ValueError("'layers' has numbers beside lists")
            found[str(name)] = [[json_files.number(x) for x in row] for row in rows]
        else:
            found[str(name)] = [json_files.number(x) for x in rows]
    return found


def event(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of events.jsonl after checking that its kind is text and its known numbers are numbers."""
    if not isinstance(row.get("event"), str):
        raise ValueError("'event' is no text")
    if row.get("unix_s") is not None:
        row["unix_s"] = bounded(row["unix_s"], "unix_s", LATEST_S)
    else:
        row.pop("unix_s", None)
    for key in ("step", "committed"):
        whole(row, key)
    for key, value in row.items():
        if key in ("loss", "grad_norm") or key.endswith(("_difference", "_bound")):
            row[key] = None if value is None and key != "loss" else json_files.number(value)
    if "metrics" in row:
        row["metrics"] = numbers(row["metrics"] or {}, "metrics")
    return row


def whole(row: dict[str, Any], key: str, *, least: int = 0, most: int = MOST_STEPS, required: bool = False) -> None:
    """Raise ValueError unless row[key] is a whole number in range, or is missing or null and not `required`."""
    value = row.get(key)
    if value is None and not required:
        return
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key!r} is no whole number from {least} to {most}")


def bounded(value: object, key: str, most: float) -> float:
    """Return `value` as a float in [0, most]; ValueError for another."""
    if isinstance(value, (bool, str)):
        raise ValueError(f"{key!r} is no number")
    found = json_files.number(value)
    if not math.isfinite(found) or not 0 <= found <= most:
        raise ValueError(f"{key!r} is no number from 0 to {most:g}")
    return found


def numbers(value: object, key: str) -> dict[str, float]:
    """Return a mapping of names to floats, which can be NaN or infinite; ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"{key!r} is no object")
    return {str(k): json_files.number(v) for k, v in value.items()}


def attempt_info(path: Path) -> dict[str, Any]:
    """Return attempt.json; {} if it is missing, UserError if it is damaged."""
    found = json_files.read_object(path) if path.exists() else {}
    try:
        if found.get("began_unix_s") is not None:
            found["began_unix_s"] = bounded(found["began_unix_s"], "began_unix_s", LATEST_S)
        else:
            found.pop("began_unix_s", None)
        if not isinstance(found.get("source") or {}, dict):
            raise ValueError("'source' is no object")
    except ValueError as error:
        raise damaged(path, error) from error
    return found


def run_info(path: Path) -> dict[str, Any]:
    """Return run.json; UserError if it is missing or damaged."""
    found = json_files.read_object(path)
    recipe = found.get("recipe")
    try:
        if not isinstance(recipe, dict):
            raise ValueError("'recipe' is no object")
        whole(recipe, "steps")
        for key in ("name", "recipe_sha256", "code_sha256"):
            if not isinstance(found.get(key, ""), str):
                raise ValueError(f"{key!r} is no text")
        if not isinstance(recipe.get("data") or {}, dict):
            raise ValueError("'recipe.data' is no object")
    except ValueError as error:
        raise damaged(path, error) from error
    return found


def damaged(path: Path, error: object) -> UserError:
    """Return the error for a file of a run directory with content that portatrain does not write."""
    return UserError(
        str(path),
        expected="what portatrain wrote",
        got=str(error),
        do="Restore the file from a copy, or use a new run directory.",
    )
