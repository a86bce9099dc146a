"""Lower a portable model to a real `flax.nnx.Module`.

The native class inherits from the portable one and from nnx.Module, so `super()`, properties, helpers and isinstance
work; it is made once per portable class. Parameters of a Stack are stacked on leading axes, as its scan wants them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from portatrain.model.measured import measuring
from portatrain.model.module import Definition, Module, Param, State


class StateVariable(nnx.Variable):
    """A portable `State`: part of the model, without gradient."""


@functools.cache
def native_class(portable: type[Module]) -> type:
    """Return the nnx class of a portable class, always the same object."""

    def __init__(self: Any, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    return type(
        portable.__name__,
        (portable, nnx.Module),
        {
            "__init__": __init__,
            "__call__": measuring(portable),
            "__module__": portable.__module__,
            "__doc__": portable.__doc__,
            "__hash__": nnx.Module.__hash__,
            "__eq__": nnx.Module.__eq__,
        },
    )


def lower(definition: Definition, array: Callable[[str, str], Any]) -> tuple[nnx.Module, dict[tuple, tuple[str, str]]]:
    """Return the native module, and (role, name) by nnx path. `array(role, name)` gives the arrays.

    A tied parameter is one nnx.Param under several paths, and the map has all of them. Its metadata has `axes`, the
    logical axes of one layer.
    """
    made: dict[int, Any] = {}
    paths: dict[tuple, tuple[str, str]] = {}

    def convert(value: Any, at: tuple) -> Any:
        if isinstance(value, (Param, State)):
            role = "params" if isinstance(value, Param) else "state"
            name = definition.owners[id(value)]
            paths[at] = (role, name)
            if id(value) not in made:
                kind = nnx.Param if role == "params" else StateVariable
                made[id(value)] = kind(array(role, name), axes=tuple(value.axes))
            return made[id(value)]
        if isinstance(value, Module):
            attributes = {n: convert(v, (*at, n)) for n, v in vars(value).items()}
            if id(value) not in made:
                made[id(value)] = native_class(type(value))(attributes)  # type: ignore[arg-type]  # a class is hashable
            return made[id(value)]
        if isinstance(value, (list, tuple)) and _holds(value):
            return nnx.List([convert(v, (*at, i)) for i, v in enumerate(value)])
        if isinstance(value, dict) and _holds(value):
            return nnx.Dict({k: convert(v, (*at, k)) for k, v in value.items()})
        return nnx.static(value)

    return convert(definition.model, ()), paths


def _holds(value: Any) -> bool:
    """Return whether a container has anything native in it."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(v, (Param, State, Module)) or _holds(v) for v in items)
