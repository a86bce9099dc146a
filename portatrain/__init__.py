"""portatrain: one definition of a model, one trajectory, one state, on any chip.

Importing this package loads no framework and no NumPy: the names below are fetched from their
modules when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# The public surface: name -> the module of this package that defines it. A class that can stand in a recipe is
# written into run.json, and hashed, under the outermost package that exports it: keep it here when its file moves.
_PUBLIC = {
    "Module": "model.module",
    "Param": "model.module",
    "State": "model.module",
    "Stack": "model.module",
    "Layout": "model.layout",
    "Mesh": "model.layout",
    "Ops": "model.ops",
    "RopeScaling": "model.rope",
    "LoRA": "model.lora",
    "MuP": "model.widths",
    "Recipe": "recipe",
    "Retention": "recipe.retention",
    "Hook": "training.hooks",
    "TextSample": "training.hooks",
    "TrigramBaseline": "training.hooks",
    "UserError": "errors",
    "TrainedModel": "training.trained",
    "load": "training.trained",
    "load_trained": "training.trained",
    "audit": "testing",
}

if TYPE_CHECKING:
    from types import ModuleType

    __version__: str
    audit: ModuleType  # `portatrain.testing.audit`: an import here would let the lowest room know a high one
    from portatrain.errors import UserError as UserError
    from portatrain.model.layout import Layout as Layout
    from portatrain.model.layout import Mesh as Mesh
    from portatrain.model.lora import LoRA as LoRA
    from portatrain.model.module import Module as Module
    from portatrain.model.module import Param as Param
    from portatrain.model.module import Stack as Stack
    from portatrain.model.module import State as State
    from portatrain.model.ops import Ops as Ops
    from portatrain.model.rope import RopeScaling as RopeScaling
    from portatrain.model.widths import MuP as MuP
    from portatrain.recipe import Recipe as Recipe
    from portatrain.recipe.retention import Retention as Retention
    from portatrain.training.hooks import Hook as Hook
    from portatrain.training.hooks import TextSample as TextSample
    from portatrain.training.hooks import TrigramBaseline as TrigramBaseline
    from portatrain.training.trained import TrainedModel as TrainedModel
    from portatrain.training.trained import load as load
    from portatrain.training.trained import load_trained as load_trained

__all__ = [
    "Module",
    "Param",
    "State",
    "Stack",
    "Layout",
    "Mesh",
    "Ops",
    "RopeScaling",
    "LoRA",
    "MuP",
    "Recipe",
    "Retention",
    "Hook",
    "TextSample",
    "TrigramBaseline",
    "UserError",
    "TrainedModel",
    "load",
    "load_trained",
    "audit",
]


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` on first use (PEP 562)."""
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name not in _PUBLIC:
        raise AttributeError(f"module 'portatrain' has no attribute {name!r}")
    value = getattr(import_module(f"portatrain.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def _version() -> str:
    """Return the version that pyproject.toml gave the installed package."""
    from importlib.metadata import PackageNotFoundError, version  # not at import: it takes longer than all the rest

    try:
        return version("portatrain")
    except PackageNotFoundError:  # the source on PYTHONPATH, not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "__version__"])
