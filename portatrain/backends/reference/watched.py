"""Record the oracle's operations of a forward pass (`backends/watched`), and change one of their results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.ops import ReferenceOps
from portatrain.backends.reference.run import Arrays, Forward, forward
from portatrain.backends.watched import Call, put_together, taken_apart, watching
from portatrain.model.module import Definition


def is_array(x: Any) -> bool:
    return isinstance(x, (np.ndarray, np.generic))


def watch_oracle(
    definition: Definition,
    params: Arrays,
    batch: Arrays,
    context: Context,
    *,
    states: Arrays | None = None,
    added: Mapping[tuple[int, int], np.ndarray] | None = None,
    taken: Mapping[tuple[int, int], np.ndarray] | None = None,
) -> tuple[list[Call], Forward]:
    """Run the model in float64; return its calls, without gradients, and the forward pass.

    `added`: arrays that are added to results, by (number of the call, number of the result): to see what the loss makes
    of a small change there. `taken`: arrays in the place of results, by the same numbers: to follow choices that
    rounding has made.
    """
    calls: list[Call] = []
    tags: dict[int, tuple[str, tuple[int, ...]]] = {}
    held: list[Any] = []

    def watcher(ops: Any, run: Any, call: Call, arrays: list[Any]) -> Any:
        call.args, call.tags = [np.asarray(a) for a in arrays], [tags.get(id(a)) for a in arrays]
        results: list[Any] = []
        template = taken_apart(run(arrays), is_array, results)
        for (number, i), value in (taken or {}).items():
            if number == len(calls):
                results[i] = value.astype(np.asarray(results[i]).dtype)
        for (number, i), change in (added or {}).items():
            if number == len(calls):
                results[i] = results[i] + change
        # A result that is an argument gets an identity of its own: one can then see which call uses which result.
        results = [r.view() if any(r is a for a in arrays) else r for r in results]
        call.results = [np.asarray(r) for r in results]
        calls.append(call)
        return put_together(template, results)

    def value(self: Any, p: Any) -> Any:
        array = ReferenceOps.value(self, p)
        tags[id(array)] = (definition.owners[id(p)], self._index)
        held.append(array)  # so that its id stays its own
        return array

    made = watching(ReferenceOps, is_array, watcher, lambda ops: int(ops.layer) if ops._index else None)
    made.value = value  # type: ignore[attr-defined]
    with np.errstate(all="ignore"):
        found = forward(definition, params, batch, context, states=states, operations=made)
    return calls, found
