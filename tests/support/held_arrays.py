"""A backend that only holds arrays, for tests of saving and restoring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from portatrain.backends.base import LocalBox
from portatrain.backends.program import Program
from portatrain.checkpoint.format_layout import format_layout
from portatrain.model.layout import Layout
from portatrain.model.module import Module, Param, describe
from portatrain.optim import AdamW


class Toy(Module):
    def __init__(self) -> None:
        self.w = Param(rows=64, columns=96)
        self.b = Param(columns=96)


class Holding:
    """A backend as far as a checkpoint needs one: it holds arrays."""

    def __init__(self) -> None:
        definition = describe(Toy())
        names = frozenset(definition.params)
        self.program = Program(
            definition=definition, layout=Layout.of(definition), optimizer=AdamW(lr=1e-3), trainable=names, decay=names
        )
        self.fetched_bytes: list[int] = []

    def state(self, value: int) -> dict[str, np.ndarray]:
        made = {}
        for i, t in enumerate(format_layout(self.program).tensors):
            made[t.name] = (np.arange(np.prod(t.shape), dtype=t.dtype) + i).reshape(t.shape) * value
        return made

    def local_boxes(self, state: Mapping[str, np.ndarray]) -> Iterator[LocalBox]:
        for full, array in state.items():
            role, _, name = full.rpartition("/") if full != "opt/count" else (full, "", "")

            def fetch(array: np.ndarray = array) -> np.ndarray:
                self.fetched_bytes.append(array.nbytes)
                return array.copy()

            yield LocalBox(name=name, role=role, offset=(0,) * array.ndim, shape=array.shape, fetch=fetch)

    def irregular_shards(self, state: Mapping[str, np.ndarray]) -> dict[tuple[str, str], Any]:
        return {}

    def agree(self, value: int) -> int:
        return value
