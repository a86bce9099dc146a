"""Trees of arrays: nested tuples, lists, dicts, `Loss` and None, which models take and return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portatrain.model.ops import Loss


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` on every leaf of `tree`, with the leaves at the same place of the `others`; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: tree_map(function, item, *(o[key] for o in others)) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(function, *items) for items in zip(tree, *others, strict=True))
    if isinstance(tree, Loss):
        fields = ("sum", "weight_B", "loss_B")
        return Loss(*(function(getattr(tree, f), *(getattr(o, f) for o in others)) for f in fields))
    return function(tree, *others)
