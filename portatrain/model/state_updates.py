"""State updates after a step: runs `Module.after_step` of every module, for all backends.

A backend calls `run_after_step` inside its compiled step, with its own arrays and operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from portatrain.errors import UserError, choice
from portatrain.model.bind import bind, source_of
from portatrain.model.module import Definition, Module, Param, Stack, State, children

Array = Any
Index = tuple[int, ...]


def run_after_step(
    definition: Definition, states: Mapping[str, Array], ops: Any, stack_arrays: Callable[[Sequence[Array]], Array]
) -> dict[str, Array]:
    """Run `after_step` of every module that overrides it and return the new States, with the keys of `states`.

    A module in a Stack runs once per layer, on the slices of that layer. Every module reads the States from before the
    first one ran, so the order of the modules does not matter.

    Args:
        states: logical arrays by name, with the leading axes of Stacks.
        ops: the backend's operations.
        stack_arrays: a function that joins arrays of equal shape along a new leading axis.

    Raises:
        UserError: an `ops.update` with an unknown State or another shape, or a call of `ops.tally`.
    """
    updates: dict[str, dict[Index, Array]] = {}
    for module, sizes in _overriding(definition.model):
        for index in itertools.product(*map(range, sizes)):

            def value_of(p: Param | State, index: Index = index) -> Any:
                if isinstance(p, Param):
                    return p
                return _at(states[definition.owners[id(p)]], index)

            bind(module, value_of).after_step(_Updating(ops, definition, updates, index))
    merged = dict(states)
    for name, changed in updates.items():
        sizes = definition.states[name].shape[: definition.states[name].stack_dims]
        if not sizes:
            merged[name] = changed[()]
            continue
        slices = [
            changed[index] if index in changed else _at(states[name], index)
            for index in itertools.product(*map(range, sizes))
        ]
        flat = stack_arrays(slices)
        merged[name] = flat if len(sizes) == 1 else flat.reshape(definition.states[name].shape)
    return merged


def needs_after_step(definition: Definition) -> bool:
    """Return True if any module of the model overrides `after_step`."""
    return next(_overriding(definition.model), None) is not None


def _at(array: Array, index: Index) -> Array:
    return array[index] if index else array


def _overriding(model: Module) -> Iterator[tuple[Module, Index]]:
    """Yield every module that overrides `after_step`, with the sizes of the Stacks around it, outermost first."""
    seen: set[int] = set()

    def walk(module: Module, sizes: Index) -> Iterator[tuple[Module, Index]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if type(module).after_step is not Module.after_step:
            yield module, sizes
        inner = (*sizes, module.n) if isinstance(module, Stack) else sizes
        for _, held in children(module):
            if isinstance(held, Module):
                yield from walk(held, inner)

    return walk(model, ())


class _Updating:
    """The backend's operations, with `update` for the layer `index`, and without `tally`."""

    def __init__(self, ops: Any, definition: Definition, updates: dict[str, dict[Index, Array]], index: Index) -> None:
        self._ops, self._definition, self._updates, self._index = ops, definition, updates, index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def update(self, module: Module, **values: Array) -> None:
        source = source_of(module)
        held = {name: value for name, value in children(source) if isinstance(value, State)}
        for name, value in values.items():
            what = f"ops.update({type(source).__name__}, {name}=...)"
            if name not in held:
                raise choice(what, name, held)
            full = self._definition.owners[id(held[name])]
            info = self._definition.states[full]
            wanted = info.shape[info.stack_dims :]
            if tuple(value.shape) != wanted or len(self._index) != info.stack_dims:
                raise UserError(
                    what,
                    expected=f"an array of shape {wanted}, as in State({', '.join(held[name].axes)})",
                    got=f"shape {tuple(value.shape)}",
                    do="Give a State a new array of its whole shape.",
                )
            self._updates.setdefault(full, {})[self._index] = value

    def tally(self, module: Module, **values: Array) -> None:
        raise UserError(
            f"ops.tally({type(source_of(module)).__name__}, ...) in after_step",
            expected="ops.update, which sets a State",
            got="ops.tally, which adds to one in the forward pass",
            do="Call ops.update(self, name=self.name + value).",
        )
