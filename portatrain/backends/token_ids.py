"""Check the ids of every batch against the tables in which a model looks them up, before a device sees the batch.

Frameworks differ for an id beyond a table: torch raises an error or ends the process, XLA takes the last row. So the
host looks first. It knows the table of an array of a batch as soon as the model hands the array to `ops.embed` or
`ops.cross_entropy`. A model does that for the first time while its first step is traced or run, before anything is
updated. If a model never hands over ``tokens`` or ``targets`` as they are, the axis ``vocab`` says which table they
have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from portatrain.errors import UserError
from portatrain.model.module import Definition

KEYS = ("tokens", "targets")
"""The arrays of a batch that sources of tokens give."""
PREDICTED = ("tokens",)
"""Those of them from which a model predicts."""


class TokenIds:
    """The limits of the ids in the batches of one program.

    Attributes:
        limits: for a key of a batch, the (rows, name) of the smallest table that its ids index.
    """

    def __init__(self, definition: Definition) -> None:
        tables = [(t.shape[t.axes.index("vocab")], t.name) for t in definition.params.values() if "vocab" in t.axes]
        sizes = {rows for rows, _ in tables}
        # Tables of several sizes say nothing of which array indexes which table.
        self._guess = tables[0] if len(sizes) == 1 else None
        self._guessed: set[str] = set()
        self.limits: dict[str, tuple[int, str]] = {}
        self._batch: Mapping[str, np.ndarray] = {}

    def begin(self, batch: Mapping[str, np.ndarray]) -> None:
        """Check a batch. Raises UserError for an id that is in no row of its table."""
        self._batch = batch
        for key in self.limits.keys() & batch.keys():
            self._check(key)

    def note(self, given: Mapping[str, Any], ids: Any, rows: int) -> None:
        """Record that a model indexes a table of `rows` rows with `ids`, and check the batch if `ids` is one of its
        arrays. `given` holds the arrays of the batch as the model received them."""
        for key, array in given.items():
            if array is ids and (key in self._guessed or rows < self.limits.get(key, (rows + 1, ""))[0]):
                self._guessed.discard(key)
                guess = self._guess if key in KEYS else None
                self.limits[key] = guess if guess and guess[0] == rows else (rows, "")
                self._check(key)

    @contextlib.contextmanager
    def model_runs(self, keys: Sequence[str] = KEYS) -> Iterator[None]:
        """Surround a run or a trace of the model. Those of `keys` that it has not shown to `note` are then taken to
        index the table with the axis ``vocab``, and the batch is checked, also if the ids end the run."""
        try:
            yield
        except (IndexError, RuntimeError):
            self._take_guess(keys)
            raise
        self._take_guess(keys)

    def _take_guess(self, keys: Sequence[str]) -> None:
        for key in keys:
            if self._guess is not None and key not in self.limits:
                self._guessed.add(key)
                self.limits[key] = self._guess
                self._check(key)

    def _check(self, key: str) -> None:
        ids, (rows, name) = self._batch.get(key), self.limits[key]
        if ids is None or ids.dtype.kind not in "iu" or not ids.size:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise UserError(
                f"the data: {key!r} of a batch",
                expected=f"ids from 0 to {rows - 1}, the rows of the model's table{f' {name}' if name else ''}",
                got=str(low if low < 0 else high),
                do=f"Give the model a vocabulary of at least {high + 1}, or correct the source."
                if low >= 0
                else "Correct the source: a target that does not count has mask 0 and any id of the table.",
            )
