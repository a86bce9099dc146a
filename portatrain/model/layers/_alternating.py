"""A row of layers of several kinds in as few Stacks as possible, so that jax scans over them.

The kind of a layer is static (a window, rotary positions or none, dense or routed), so every kernel knows it. Layers
that repeat a pattern become one Stack of groups, one group a period.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from portatrain.model.module import Module, Stack
from portatrain.model.ops import Ops


class Group(Module):
    """Layers in a row, the block of a Stack: 'layer/0', 'layer/1', ..."""

    def __init__(self, layers: Sequence[Module]) -> None:
        self.layer = list(layers)

    def __call__(self, ops: Ops, carry: Any, *shared: Any) -> tuple[Any, None]:
        """Return the carry after all layers. What a layer returns beside it must be None."""
        for layer in self.layer:
            carry, _ = layer(ops, carry, *shared)
        return carry, None


class Row(Module):
    """Stacks in a row: 'runs/0', 'runs/1', ... It is called as a Stack is, without `per_layer`."""

    def __init__(self, runs: Sequence[Stack]) -> None:
        self.runs = list(runs)

    def __call__(self, ops: Ops, carry: Any, *shared: Any) -> tuple[Any, None]:
        """Return the carry after all layers."""
        for run in self.runs:
            carry, _ = run(ops, carry, *shared)
        return carry, None


def layers_of(kinds: Sequence[Hashable], make: Callable[[Any], Module]) -> Stack | Row:
    """Return the layers `make(kind)` for each of `kinds`, in order; equal kinds share the axis of a Stack if they can.

    Layers of one kind are one Stack. A pattern that repeats is a Stack of its periods, with what is left of a period
    after it; kinds that do not repeat are a Stack for each run of equal ones. Of these two the one that traces fewer
    layers is taken. `places_of` says where each layer is.
    """
    made = [_stack(kinds, first, size, n, make) for first, size, n in _runs(kinds)]
    return made[0] if len(made) == 1 and len(set(kinds)) == 1 else Row(made)


def _stack(kinds: Sequence[Any], first: int, size: int, n: int, make: Callable[[Any], Module]) -> Stack:
    blocks = [make(kind) for kind in kinds[first : first + size]]
    return Stack(blocks[0] if size == 1 else Group(blocks), n)


def places_of(kinds: Sequence[Hashable], path: str) -> list[tuple[str, int]]:
    """Return (the path of its block, the index in its Stack) for each layer that `layers_of` puts at `path`."""
    runs = _runs(kinds)
    alone = len(runs) == 1 and len(set(kinds)) == 1
    found = []
    for number, (_, size, n) in enumerate(runs):
        run = path if alone else f"{path}/runs/{number}"
        found += [(run if size == 1 else f"{run}/layer/{i % size}", i // size) for i in range(size * n)]
    return found


def _runs(kinds: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """Return (first layer, layers of a period, number of periods) for each Stack."""
    n = len(kinds)
    period = next(p for p in range(1, n + 1) if all(kinds[i] == kinds[i % p] for i in range(n)))
    periodic = [(0, period, n // period)]
    if left := n % period:
        periodic.append((n - left, left, 1))
    starts = [i for i in range(n) if not i or kinds[i] != kinds[i - 1]]
    straight = [(a, 1, b - a) for a, b in zip(starts, [*starts[1:], n], strict=True)]
    return min((straight, periodic), key=lambda runs: sum(size for _, size, _ in runs))
