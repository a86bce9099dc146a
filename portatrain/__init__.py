"""portatrain: one definition of a model, one trajectory, one state, on any chip.

Importing this package loads no framework and no NumPy: the names below are fetched from their
modules when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

# The public surface: name -> the module of this package that defines it.
_PUBLIC = {
    "Module": "module",
    "Param": "module",
    "State": "module",
    "Stack": "module",
    "Layout": "layout",
    "Mesh": "layout",
    "Ops": "ops",
    "Recipe": "recipe",
    "UserError": "errors",
}

if TYPE_CHECKING:
    from portatrain.errors import UserError as UserError
    from portatrain.layout import Layout as Layout
    from portatrain.layout import Mesh as Mesh
    from portatrain.module import Module as Module
    from portatrain.module import Param as Param
    from portatrain.module import Stack as Stack
    from portatrain.module import State as State
    from portatrain.ops import Ops as Ops
    from portatrain.recipe import Recipe as Recipe

__all__ = ["Module", "Param", "State", "Stack", "Layout", "Mesh", "Ops", "Recipe", "UserError"]


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'portatrain' has no attribute {name!r}")
    value = getattr(import_module(f"portatrain.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
