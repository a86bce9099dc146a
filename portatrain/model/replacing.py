"""Replace what the modules of a model hold, in place: weights by adapted, quantised or scaled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portatrain.model.module import Module, children


def replace_held(
    model: Module, change: Callable[[str, Any], Any], stop: Callable[[Module], bool] | None = None
) -> None:
    """Set each attribute of `model` and of every module in it to `change(name, value)`.

    A module is visited once, before those in it; a module that `change` puts in is not visited. stop: which modules
    stay as they are; none by default.
    """
    seen: set[int] = set()

    def walk(module: Module) -> None:
        if id(module) in seen or (stop is not None and stop(module)):
            return
        seen.add(id(module))
        inner = [value for _, value in children(module) if isinstance(value, Module)]
        for name, value in list(vars(module).items()):
            setattr(module, name, change(name, value))
        for child in inner:
            walk(child)

    walk(model)
