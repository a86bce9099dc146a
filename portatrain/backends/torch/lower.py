"""Lower a portable model to a real `torch.nn.Module`.

The native class inherits from nn.Module and from the portable one, so `super()`, properties, helpers and isinstance
work; it is made once per portable class. A Stack becomes an nn.ModuleList of its layers ('blocks.0.attn.wq').
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from portatrain.model.measured import measuring
from portatrain.model.module import Definition, Module, Param, Stack, State


@functools.cache
def native_class(portable: type[Module]) -> type:
    """Return the nn.Module class of a portable class, always the same object."""
    base = nn.ModuleList if issubclass(portable, Stack) else nn.Module
    return type(
        portable.__name__,
        (base, portable),
        {
            "forward": measuring(portable),
            "__call__": nn.Module.__call__,
            "__module__": portable.__module__,
            "__doc__": portable.__doc__,
        },
    )


@dataclass(frozen=True)
class Piece:
    """Name the part of a logical tensor that one torch tensor holds: `tensor` is slice `index` of its Stacks' axes."""

    role: str
    name: str
    index: tuple[int, ...]
    tensor: torch.Tensor


def lower(
    definition: Definition, piece: Callable[[str, str, tuple[int, ...]], torch.Tensor]
) -> tuple[nn.Module, list[Piece]]:
    """Return the native module and a list of its tensors, in order. `piece(role, name, index)` gives each tensor."""
    made: dict[tuple[int, tuple[int, ...]], Any] = {}
    pieces: list[Piece] = []

    def tensor(value: Param | State, index: tuple[int, ...]) -> torch.Tensor:
        key = (id(value), index)
        if key not in made:
            role = "params" if isinstance(value, Param) else "state"
            data = piece(role, definition.owners[id(value)], index)
            made[key] = nn.Parameter(data) if role == "params" else data
            pieces.append(Piece(role, definition.owners[id(value)], index, made[key]))
        return made[key]

    def module(value: Module, index: tuple[int, ...]) -> nn.Module:
        if (id(value), index) in made:
            return made[id(value), index]
        kind: Any = native_class(type(value))  # type: ignore[arg-type]  # a class is hashable
        native = kind.__new__(kind)
        if isinstance(value, Stack):
            nn.ModuleList.__init__(native, [module(value.block, (*index, i)) for i in range(value.n)])
        else:
            nn.Module.__init__(native)
        made[id(value), index] = native
        for name, held in vars(value).items():
            if isinstance(value, Stack) and name == "block":
                continue
            if isinstance(held, State):
                native.register_buffer(name, tensor(held, index))
            else:
                setattr(native, name, convert(held, index))
        return native

    def convert(held: Any, index: tuple[int, ...]) -> Any:
        if isinstance(held, Module):
            return module(held, index)
        if isinstance(held, (Param, State)):
            return tensor(held, index)
        if isinstance(held, (list, tuple)) and any(isinstance(v, Module) for v in held):
            return nn.ModuleList([convert(v, index) for v in held])
        if isinstance(held, (list, tuple)) and any(isinstance(v, Param) for v in held):
            return nn.ParameterList([convert(v, index) for v in held])
        if isinstance(held, dict) and any(isinstance(v, Module) for v in held.values()):
            return nn.ModuleDict({k: convert(v, index) for k, v in held.items()})
        if isinstance(held, dict) and any(isinstance(v, Param) for v in held.values()):
            return nn.ParameterDict({k: convert(v, index) for k, v in held.items()})
        return held

    return module(definition.model, ()), pieces
