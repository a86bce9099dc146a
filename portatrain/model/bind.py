"""Copies of portable modules with arrays in place of their `Param`s and `State`s. Plain Python, no framework.

Backends that make native classes do not need it; the oracle and `after_step` do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from portatrain.model.module import Module, Param, Stack, State


def bind(module: Module, value_of: Callable[[Param | State], Any]) -> Module:
    """A copy of `module` and of all that it holds, with `value_of(p)` for every Param and State `p`.

    A module or tensor held in two places stays one. A Stack keeps its portable block, which has values only once a
    layer is chosen: whoever runs the Stack binds the block, layer by layer. `source_of` gives the original back.
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
    """The portable module that `bind` made this copy of."""
    return vars(bound)["_source"]
