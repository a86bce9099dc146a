"""Copies of portable modules with arrays in place of their `Param`s and `State`s. Plain Python, no framework.

The oracle and `Module.after_step` use it; backends that make native modules do not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from portatrain.model.module import Module, Param, Stack, State


def bind(module: Module, value_of: Callable[[Param | State], Any]) -> Module:
    """Return a deep copy of `module` with every Param and State `p` replaced by `value_of(p)`.

    A module that two others hold is copied once. The block of a Stack is not copied, since its values depend on the
    layer: the code that runs the Stack binds the block for each layer. `source_of` returns the original module.
    """
    made: dict[int, Module] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, (Param, State)):
            return value_of(value)
        if isinstance(value, Module):
            if id(value) not in made:
                clone = made[id(value)] = copy.copy(value)
                if not isinstance(value, Stack):
                    vars(clone).update({name: copied(held) for name, held in vars(value).items()})
                vars(clone)["_source"] = value
            return made[id(value)]
        if isinstance(value, (list, tuple)):
            return type(value)(copied(item) for item in value)
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        return value

    return copied(module)


def source_of(bound: Module) -> Module:
    """Return the portable module from which `bind` made the copy `bound`."""

    return vars(bound)["_source"]
